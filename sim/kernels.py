"""Time of an operation: launches, arithmetic and memory traffic, each at the rate its device was measured at.

    seconds = launches × launch + max(f, b) + (1 − overlap) min(f, b),   f = FLOPs / rate,  b = bytes / bandwidth

With overlap 1 this is the roofline (Williams, Waterman and Patterson 2009), with 0 the sum, as on one CPU thread.
Everything takes arrays over plans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from conf.plan import Plan, digest
from conf.profile import Parameter, read_profile

Array: TypeAlias = NDArray[np.float64]

# kind.stage: (kernels launched, tensor passes over memory), counted in the trainer's eager code
TRAFFIC = {
    "norm.forward": (1, 2), "norm.backward": (2, 5),
    "rotary.forward": (6, 11), "rotary.backward": (6, 11),
    "swiglu.forward": (2, 5), "swiglu.backward": (4, 9),
    "gelu.forward": (1, 2), "gelu.backward": (1, 3),
    "scores.forward": (3, 6), "scores.backward": (3, 8),
    "permute.forward": (4, 4), "permute.backward": (4, 4),
    "add.forward": (1, 3), "add.backward": (0, 0),
    "loss.forward": (2, 4), "loss.backward": (2, 4),
    "embedding.forward": (1, 2), "embedding.backward": (2, 3),
    "optimizer.step": (0, 8),
}  # fmt: skip
KINDS = (*(f"{kind}.{stage}" for kind in ("matmul", "attention") for stage in ("forward", "backward")), *TRAFFIC)


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device and its machine, by name as in a profile; SI."""

    rate: dict[str, float]  # FLOP/s of each kind and stage
    bandwidth: dict[str, float]  # B/s of each kind and stage
    launch: float
    matmul_launch: float
    overlap: float
    composition: float  # time of operations in a row over the sum of their times alone
    glue: float  # s that a block's forward or backward takes besides its operations
    optimizer_tensor: float  # s that the optimizer takes for each parameter tensor, whatever its size
    jitter: float  # coefficient of variation of a block's time
    latency: dict[str, float]  # s a hop of each collective inside a server
    link: dict[str, float]  # B/s of each collective inside a server
    shard_unit: float  # s that sharding adds to a unit's forward and backward
    shard_copy: float  # B/s of copying a unit's parameters and gradients
    extract_rate: float
    dedup_rate: float
    train_rate: float
    encode_rate: float
    storage_write: float
    storage_read: float
    init: float  # s to start the ranks
    workers: float  # s to start the workers of the data stages


COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def rates(plan: Plan) -> Rates:
    """The rates that a plan is predicted with."""
    return given(plan, _measured(plan.profile, digest(Path(plan.profile))) if plan.profile else {})


def given(plan: Plan, found: Mapping[str, Parameter]) -> Rates:
    """Measured rates where there are any, those of the gpu's and the other groups' tables otherwise."""

    def pick(name: str, default: float) -> float:
        return found[name].value if name in found else default

    gpu = plan.gpu
    precision = plan.train.precision
    matmul = (gpu.peak(precision) or gpu.fp32_peak) * gpu.gemm_efficiency
    wide = (gpu.peak("bf16" if precision == "fp8" else precision) or gpu.fp32_peak) * gpu.gemm_efficiency  # attention stays in bf16
    memory = gpu.memory_bandwidth * gpu.memory_efficiency
    default = {"matmul": matmul, "attention": wide * gpu.attention_efficiency}
    return Rates(
        rate={k: pick(f"{k}.rate", default.get(k.split(".")[0], np.inf)) for k in KINDS},
        bandwidth={k: pick(f"{k}.bandwidth", memory) for k in KINDS},
        launch=pick("launch", gpu.launch),
        matmul_launch=pick("launch", gpu.launch + gpu.gemm_half / matmul),
        overlap=gpu.overlap,
        composition=pick("composition", 1.0),
        glue=pick("glue", 0.0),
        optimizer_tensor=pick("optimizer_tensor", gpu.launch),
        jitter=pick("jitter", 0.0),
        latency={c: pick(f"{c}.latency", gpu.link_latency) for c in COLLECTIVES},
        link={c: pick(f"{c}.bandwidth", gpu.link_bandwidth / 8) for c in COLLECTIVES},
        shard_unit=pick("shard_unit.latency", 0.0),
        shard_copy=pick("shard_unit.bandwidth", memory),
        extract_rate=pick("extract_rate", plan.data.extract_rate),
        dedup_rate=pick("dedup_rate", plan.data.dedup_rate),
        train_rate=pick("train_rate", plan.tokenizer.train_rate),
        encode_rate=pick("encode_rate", plan.tokenizer.encode_rate),
        storage_write=pick("storage_write", plan.cluster.storage_write),
        storage_read=pick("storage_read", plan.cluster.storage_read),
        init=pick("init", plan.failures.init),
        workers=pick("workers", 0.5 * plan.failures.init),
    )


@cache
def _measured(path: str, content: str) -> dict[str, Parameter]:
    """Read once for each content."""
    return read_profile(Path(path)).parameters


class Device:
    """Rates of many plans as arrays."""

    def __init__(self, each: Sequence[Rates]) -> None:
        self.numbers: dict[str, Array] = {}
        for field in fields(Rates):
            values = [getattr(r, field.name) for r in each]
            if isinstance(values[0], dict):
                self.numbers |= {f"{field.name}.{k}": np.array([v[k] for v in values]) for k in values[0]}
            else:
                self.numbers[field.name] = np.array(values)

    def __getitem__(self, name: str) -> Array:
        return self.numbers[name]

    def seconds(self, work: "Work") -> Array:
        """Time of some work at this device's rates."""
        arithmetic, memory = work.flops / self[f"rate.{work.kind}"], work.bytes / self[f"bandwidth.{work.kind}"]
        launch = self["matmul_launch"] if work.kind.startswith("matmul") else self["launch"]
        hidden = self["overlap"] * np.minimum(arithmetic, memory)
        return np.asarray(work.launches * launch + arithmetic + memory - hidden)


@dataclass(frozen=True)
class Work:
    """What an operation asks of a device; arrays over plans, or numbers."""

    kind: str  # kind.stage
    flops: Any
    bytes: Any
    launches: Any

    def __mul__(self, times: Any) -> "Work":
        return Work(self.kind, self.flops * times, self.bytes * times, self.launches * times)


def matmul(m: Any, n: Any, k: Any, size: Any, stage: str, matrices: Any = 1) -> Work:
    """[m, k] × [k, n], with the rows of m spread over so many matrices in one grouped product; backward is the two products
    for the input's and the weight's gradient."""
    products = 1 if stage == "forward" else 2
    return Work(f"matmul.{stage}", products * 2 * m * n * k, products * (m * k + matrices * n * k + m * n) * size, products)


def attention(tokens: Any, seq: Any, width: Any, size: Any, stage: str) -> Work:
    """Causal attention of sequences of `seq` tokens: forward 2 t s w, backward 2.5 times that (Dao 2023, FlashAttention-2).

    Its traffic also stands for the tiles on the diagonal, whose masked half is computed: both grow with t w.
    """
    factor = 1.0 if stage == "forward" else 2.5
    return Work(f"attention.{stage}", factor * 2 * tokens * seq * width, factor * 4 * tokens * width * size, 2)


def moved(kind: str, elements: Any, size: Any, stage: str) -> Work:
    """An operation that only moves tensors of so many elements."""
    launches, passes = TRAFFIC[f"{kind}.{stage}"]
    return Work(f"{kind}.{stage}", 0.0 * elements, passes * elements * size, launches)
