"""What the words of a source mean: precisions, sharding, releases of software, fabrics, power caps."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from analysis.rows import word

BRIDGE, FUSED = (25, 9), (26, 6)  # releases since when Megatron-Bridge is measured, and experts run in fused kernels on BLACKWELL
BLACKWELL = ("b200", "b300", "gb200", "gb300")
FREE = 1.25  # imbalance of a router that is not forced: steps are 8 to 20% longer in published pairs
PRECISIONS = (
    ("fp4", "fp4"), ("fp8", "fp8"), ("int8", "fp8"), ("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"), ("float16", "fp16"),
    ("tf32", "fp32"), ("fp32", "fp32"),
)  # fmt: skip
_CAP = re.compile(r"(?:cap|limit)\w*[^;,.]{0,16}?(\d{3,4}) ?W\b|(\d{3,4}) ?W\b[^;,.]{0,16}?(?:cap|limit)", re.IGNORECASE)
_FABRIC = re.compile(r"(?:(\d+) ?x ?)?(\d+) ?Gb(?:/s|ps)? (?:RoCE|InfiniBand|inter-node)", re.IGNORECASE)


class Software(NamedTuple):
    """What a release of Megatron does with a mixture of experts."""

    etp: bool = True  # whether tensor-parallel ranks share experts, the default of Megatron-Core
    tokens: bool = False  # whether a token is sent once to a rank (DeepEP, HybridEP)
    fused: bool = False  # whether the experts' other kernels ride on their products, Transformer Engine's on Blackwell


def narrowest(precision: str) -> str:
    """The precision of the matrix products in a source's words: NVFP4, MXFP8, FP8-CS, bf16-mixed, int8 (at fp8's rate), TF32."""
    said = precision.lower()
    return next((name for part, name in PRECISIONS if part in said), said)


def blockwise(precision: str) -> bool:
    """Whether a source says that fp8 or fp4 has a scale a block: MXFP8, NVFP4."""
    return re.search("mx|nv|block", precision, re.IGNORECASE) is not None


def zero_stage(text: str) -> int:
    """What is sharded over the data-parallel ranks, 0 to 3: nothing, optimizer states, gradients too, parameters too."""
    said = text.lower()
    if "grad" in said:
        return 2
    if "fsdp" in said or "full" in said or "hybrid" in said:
        return 3
    found = re.match(r"\s*([0-3])", said)
    return int(found[1]) if found else 0


def fabric(notes: str, gpus_per_node: int) -> float | None:
    """Bits a second of network for each device, where a row's notes tell that of its server."""
    found = _FABRIC.search(notes)
    return int(found[1] or 1) * int(found[2]) * 1e9 / gpus_per_node if found else None


def software(release: str) -> Software:
    """What the release of a row does; releases are named by year and month."""
    found = re.match(r"v?(\d\d)\.(\d\d)", release)
    made = (int(found[1]), int(found[2])) if found else (0, 0)
    return Software(etp=made < BRIDGE, tokens=made >= BRIDGE, fused=made >= FUSED)


def power_cap(text: str) -> float | None:
    """Watts to which each device was limited, where a row tells."""
    found = _CAP.search(text)
    return float(found[1] or found[2]) if found else None


def imbalance(row: Mapping[str, Any]) -> float:
    """1 where the router is forced to balance, as in benchmarks, unless the row says that tokens choose for themselves."""
    told = word(row, "notes")
    return FREE if re.search("real routing|not (force-)?balanced|unbalanced", told, re.IGNORECASE) else 1.0
