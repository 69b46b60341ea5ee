"""Rows of measured tables as plans and operations, and their predictions.

What a table's columns say, and what follows from the named part and model: servers as their maker ships them, published
configurations, frameworks that shard parameters run torch's eager code and the others fused kernels, unless they compile.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from conf.arithmetic import flops_per_token
from conf.plan import Mla, Model, Moe, Plan
from conf.program import load
from sim.kernels import Array, Device, Product, Work, attention, beyond, rates
from sim.memory import USABLE, held, memory
from sim.network import VALIDATED, Network
from sim.parallel import columns, predict

# Name of the part, as a pattern, and its group options; servers as their maker ships them. The first that matches holds.
PARTS = (
    ("GB300", "gb300", "gb300_nvl72"), ("GB200", "gb200", "gb200_nvl72"), ("B300", "b300", "dgx_b300"),
    ("P6-B200", "b200", "aws_p6"), ("B200", "b200", "dgx_b200"), ("H200", "h200_sxm", "dgx_h100"), ("H800", "h800", "deepseek_h800"),
    ("H100.*PCI", "h100_pcie", "dgx_h100"), ("H100", "h100_sxm", "dgx_h100"), ("A100.*40", "a100_40", "dgx_a100"),
    ("A100", "a100_80", "dgx_a100"), ("V100.*DGX-2", "v100_sxm", "dgx2_v100"), ("V100", "v100_sxm", "dgx_v100"),
    ("MI300", "mi300x", "mi300x_node"),
)  # fmt: skip

# What a table's columns cannot say of a model, from its published configuration; a pattern for its name and the keys.
FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("deepseek-?v3|kimi-?k2", {"mla": (512, 1536, 64), "head": 128, "shared": 1, "dense_layers": {"kimi": 1, "deepseek": 3}, "groups": 8}),
    ("deepseek-?v2", {"mla": (512, 1536, 64), "head": 128, "shared": 2, "dense_layers": {"": 1}}),
    ("qwen3", {"head": 128}),
    ("gpt-?oss", {"head": 64}),
    ("grok", {"head": 128}),
)
STEPS = (
    "gpu", "num_gpus", "gpus_per_node", "layers", "hidden", "heads", "kv_heads", "ffn_hidden", "gated_mlp", "vocab", "seq_len", "tp",
    "cp", "pp", "vpp", "dp", "micro_batch", "global_batch_seqs", "precision", "step_time_s",
)  # fmt: skip
KERNELS = ("gpu", "op", "peak_tflops", "m", "n", "k", "seq", "heads", "qk_head_dim", "v_head_dim", "efficiency")
COLLECTIVES = ("op", "gpu", "ranks", "nodes", "bytes", "time_us")
BRIDGE, FUSED = (25, 9), (26, 6)  # releases since when Megatron-Bridge is measured, and experts run in fused kernels on BLACKWELL
BLACKWELL = ("b200", "b300", "gb200", "gb300")
FREE = 1.25  # imbalance of a router that is not forced: steps are 8 to 20% longer in published pairs
PRECISIONS = (
    ("fp4", "fp4"), ("fp8", "fp8"), ("int8", "fp8"), ("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"), ("float16", "fp16"),
    ("tf32", "fp32"), ("fp32", "fp32"),
)  # fmt: skip
DEEP = 61  # layers of the whole models that start with dense ones (DeepSeek-V2 has 60)
COLLECTIVE = ("all_reduce", "all_gather", "reduce_scatter")
MOMENT = 100e-6  # s: a hundred products of 100 µs in a row are half over when a power limit acts (SimuMax calls each a hundred times)
HIDDEN = 0.4  # of a product's traffic, where the next call writes to the same place: A100 and B200 alike; fits of steps see all hidden
CALLS = {"attention": 3.0, "expert": 1 / 3}  # host's time of a call from Python, and of an expert in a loop of C++, in launches of a kernel
_CAP = re.compile(r"(?:cap|limit)\w*[^;,.]{0,16}?(\d{3,4}) ?W\b|(\d{3,4}) ?W\b[^;,.]{0,16}?(?:cap|limit)", re.IGNORECASE)
_FABRIC = re.compile(r"(?:(\d+) ?x ?)?(\d+) ?Gb(?:/s|ps)? (?:RoCE|InfiniBand|inter-node)", re.IGNORECASE)


class Replayed(NamedTuple):
    """Predicted rows under the table's index (predicted, spread, ideal, class, kind, and memory where there is any), and the
    reasons of the others."""

    rows: pd.DataFrame
    failed: dict[Any, str]


class Software(NamedTuple):
    """What a release of Megatron does with a mixture of experts."""

    etp: bool = True  # whether tensor-parallel ranks share experts, the default of Megatron-Core
    tokens: bool = False  # whether a token is sent once to a rank (DeepEP, HybridEP)
    fused: bool = False  # whether the experts' other kernels ride on their products, Transformer Engine's on Blackwell


class Kernel(NamedTuple):
    """An operation of a table: the FLOPs that its row counts, what it asks of the device, and the host's launches that it costs."""

    flops: float
    work: Work
    calls: float
    sizes: dict[str, set[int]]


class Unplayable(ValueError):
    """A row that says something no plan can say; the text is the reason."""


def steps_of(frame: pd.DataFrame) -> Replayed:
    """Seconds of a step and bytes on the fullest device of every row.

    Where a row does not say what was recomputed, it is the least that fits in memory.
    """
    settled, frozen, index, failed = _played(frame)
    if not settled:
        return Replayed(tabled([], [], [], [], [], []), failed)
    p, network = arrays(settled, frozen)
    told = predict(p, network.device, network)
    again = 1 + np.where(p.recompute, 1 / 3, 0.0)  # one constant utilisation of what the hardware computes
    ideal = p.tokens_per_step * flops_per_token(p, p.seq_len) * again * np.where(p.frozen, 2 / 3, 1.0) / (p.peak * p.ranks)
    classes = [f"{plan.gpu.name} {plan.train.precision}" for plan in settled]
    kinds = ["moe" if plan.model.moe.experts else "dense" for plan in settled]
    rows = tabled(index, told.step_time, told.error, ideal, classes, kinds)
    return Replayed(rows.assign(memory=told.memory), failed)


def plans_of(frame: pd.DataFrame) -> tuple[list[Plan], Any, list[Any]]:
    """The plans of the rows that can be predicted, where their weights are frozen, and the rows' index."""
    return _played(frame)[:3]


def arrays(plans: list[Plan], frozen: Any) -> tuple[Any, Network]:
    """What sim.parallel.predict asks for."""
    p = columns(plans)
    p.frozen = frozen
    return p, Network(plans, Device([rates(plan) for plan in plans]))


def _played(frame: pd.DataFrame) -> tuple[list[Plan], Any, list[Any], dict[Any, str]]:
    plans, failed = each(frame, plan_of)
    unsaid = [not _word(frame.loc[index], "recompute") for index in plans]
    frozen = [str(frame["method"][index]).lower() == "lora" if "method" in frame else False for index in plans]
    return _least(list(plans.values()), np.array(unsaid), np.array(frozen)), np.array(frozen), list(plans), failed


def kernel_plan(row: Mapping[str, Any]) -> Plan:
    """A plan on the row's device."""
    return _base(*part_of(row)).but(**{"train.precision": "bf16", "train.compile": True})


def _least(plans: list[Plan], unsaid: Any, frozen: Any) -> list[Plan]:
    """The plans with the least recomputation that fits, where it was not said: none, selective, or full in as many blocks as it takes;
    gradients may then be kept in half precision. What does not fit with any was made to fit by something else, so that recomputation
    would not have been needed either."""
    if not plans:
        return plans
    choices = [[plan.but(**{"train.recompute": how}) for plan in plans] for how in ("none", "selective", "full")]
    room = np.array([USABLE * plan.gpu.memory for plan in plans])
    needed = []
    for choice in choices:
        p = columns(choice)
        p.frozen = frozen
        needed.append(memory(p).total - np.where(p.zero == 1, 2 * held(p), 0.0))
    least = np.where((needed[0] < room) | (needed[2] >= room), 0, np.where(needed[1] < room, 1, 2))
    share = np.clip((needed[0] - room) / np.maximum(needed[0] - needed[2], 1.0), 0.0, 1.0)
    found = [choices[k][i] if unsaid[i] else plan for i, (plan, k) in enumerate(zip(plans, least, strict=True))]
    some = unsaid & (least == 2)
    return [plan.but(**{"train.recompute_share": float(share[i])}) if some[i] else plan for i, plan in enumerate(found)]


def kernels_of(frame: pd.DataFrame) -> Replayed:
    """Fraction of the peak of every row's matrix products or attention; attention counts the full square of scores."""
    found, failed = each(frame, lambda row: (kernel_plan(row), kernel(row), float(row["peak_tflops"]) * 1e12, str(row["op"])))
    if not found:
        return Replayed(tabled([], [], [], [], [], []), failed)
    plans, kernels, peaks, ops = (list(column) for column in zip(*found.values(), strict=True))
    efficiency = np.array([kernel.flops for kernel in kernels]) / alone(device_of(plans), kernels) / np.array(peaks)
    spread, names = [plan.gpu.error for plan in plans], [plan.gpu.name for plan in plans]
    out = ["; ".join(beyond(plan, kernel.sizes)) for plan, kernel in zip(plans, kernels, strict=True)]
    return Replayed(tabled(list(found), efficiency, spread, 1.0, names, ops).assign(outside=out), failed)


def kernel(row: Mapping[str, Any]) -> Kernel:
    """The operation of a row, as the benchmark of SimuMax called it: again and again from Python, by the host's clock.

    Attention pads values to the width of queries. Of m tokens of an expert the gradient of the input is as deep as the output
    is wide, that of the weight as deep as the tokens are many; it is added in bf16 or fp32, which the table does not tell.
    """
    op = str(row["op"])
    if op.startswith("sdp"):
        stage = {"sdp_fwd": "forward", "sdp_bwd": "backward"}.get(op)
        if stage is None:
            raise Unplayable(f"op={op} is not sdp_fwd or sdp_bwd")
        heads, seq, queries, values = (_count(row, name) for name in ("heads", "seq", "qk_head_dim", "v_head_dim"))
        wide, tokens = max(queries, values), seq * _count(row, "batch", 1)
        work = attention(tokens, seq, heads * wide, 2, stage, wide)
        sizes = {"seq": {seq}, "head": {queries, values}}
        return Kernel(2 * work.flops * (queries + values) / (2 * wide), work, CALLS["attention"], sizes)
    if op not in ("matmul", "group_matmul"):
        raise Unplayable(f"op={op} is not matmul, group_matmul, sdp_fwd or sdp_bwd")
    grouped, stage = op == "group_matmul", str(row.get("stage"))
    count = _count(row, "groups") if grouped else _count(row, "batch", 1)
    m, n, k = _count(row, "m"), _count(row, "n"), _count(row, "k")
    adds = str(row.get("accumulate", "")).lower() == "true"
    written = 4 if str(row.get("out_dtype", "")) == "fp32" else 3 if adds and grouped else 2
    if grouped and stage == "bwd_grad_act":
        n, k = k, n
    if grouped and stage == "bwd_grad_w":
        m, n, k = n, k, m
    flops, size = 2.0 * m * n * k * count, (2 * (m * k + n * k) + written * m * n * (1 + adds)) * count
    sizes = {"expert": {_count(row, "m")}} if grouped else {"m": {m}, "n": {n}, "k": {k}}
    return Kernel(flops, Work("matmul.forward", flops, size, 1, (Product(m, n, k, count),)), CALLS["expert"] * count * grouped, sizes)


def alone(device: Device, kernels: list[Kernel]) -> Array:
    """Seconds of operations that are measured one by one: those of a moment faster than in a training, none than its calls."""
    seconds = np.empty(len(kernels))
    for kind in {kernel.work.kind for kernel in kernels}:
        index = np.array([place for place, kernel in enumerate(kernels) if kernel.work.kind == kind])
        mine, works = device.take(index), [kernels[place].work for place in index]

        def each(name: str, things: list[Any]) -> Array:
            return np.array([float(getattr(thing, name)) for thing in things])

        flops, size, launches = (each(name, works) for name in ("flops", "bytes", "launches"))
        if works[0].products:
            products = [work.products[0] for work in works]
            product = Product(*(each(name, products) for name in ("m", "n", "k", "matrices")))
            mine.numbers |= {"overlap": np.full(len(index), HIDDEN), "grouped": mine["grouped_alone"]}
            took = mine.seconds(Work(kind, flops, size, launches, (product,)))
            seconds[index] = took / (1 + mine["burst"] / (1 + took / MOMENT))
        else:
            seconds[index] = mine.seconds(Work(kind, flops, size, launches, chain=each("chain", works)))
    return np.maximum(seconds / device["alone"], np.array([kernel.calls for kernel in kernels]) * device["host"])


def collectives_of(frame: pd.DataFrame) -> Replayed:
    """Microseconds of every row's collective."""
    found, failed = each(frame, collective)
    if not found:
        return Replayed(tabled([], [], [], [], [], []), failed)
    plans, kinds, sizes = (list(column) for column in zip(*found.values(), strict=True))
    seconds = together(Network(plans, device_of(plans)), kinds, np.array(sizes))
    classes = [f"{plan.gpu.name} {plan.cluster.nodes}" for plan in plans]
    told = [kind if kind in VALIDATED else f"{kind} (not validated)" for kind in kinds]
    return Replayed(tabled(list(found), seconds * 1e6, [plan.gpu.error for plan in plans], sizes, classes, told), failed)


def collective(row: Mapping[str, Any]) -> tuple[Plan, str, float]:
    """Whose collective a row is, its kind, and the bytes of the whole tensor."""
    op, ranks, nodes = str(row["op"]), _count(row, "ranks"), _count(row, "nodes")
    if op not in COLLECTIVE:
        raise Unplayable(f"op={op} is not {', '.join(COLLECTIVE[:-1])} or {COLLECTIVE[-1]}")
    if ranks % nodes:
        raise Unplayable(f"ranks={ranks} do not divide by nodes={nodes}")
    base = _base(*part_of(row))
    return (
        base.but(cluster=base.cluster.but(nodes=nodes, gpus_per_node=ranks // nodes), mesh=base.mesh.but(dp_shard=ranks)),
        op,
        float(_count(row, "bytes")),
    )


def together(network: Network, kinds: list[str], sizes: Array) -> Array:
    """Seconds of collectives over dp_shard, those of a kind together."""
    told = {kind: network.collective(kind, "dp_shard", sizes) for kind in set(kinds)}
    return np.array([told[kind][place] for place, kind in enumerate(kinds)])


def device_of(plans: list[Plan], changes: Mapping[str, float] | None = None) -> Device:
    """The rates of plans, with some numbers of their gpus changed; each different one is worked out once."""
    keys = [(plan.gpu.name, plan.train.precision, plan.train.compile, plan.power.cap, plan.gpu.early) for plan in plans]
    distinct = dict(zip(keys, plans, strict=True))
    order = {key: place for place, key in enumerate(distinct)}
    changed = [plan.but(gpu=plan.gpu.but(**changes)) if changes else plan for plan in distinct.values()]
    return Device([rates(plan) for plan in changed]).take(np.array([order[key] for key in keys]))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as mappings."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def each(frame: pd.DataFrame, of: Callable[[Mapping[str, Any]], Any]) -> tuple[dict[Any, Any], dict[Any, str]]:
    found, failed = {}, {}
    for index, row in zip(frame.index, records(frame), strict=True):
        try:
            found[index] = of(row)
        except Unplayable as error:
            failed[index] = str(error)
    return found, failed


def tabled(index: Any, predicted: Any, spread: Any, ideal: Any, classes: Any, kinds: Any) -> pd.DataFrame:
    return pd.DataFrame({"predicted": predicted, "spread": spread, "ideal": ideal, "class": classes, "kind": kinds}, index=index)


def narrowest(precision: str) -> str:
    """The precision of the matrix products in a source's words: NVFP4, MXFP8, FP8-CS, bf16-mixed, int8 (at fp8's rate), TF32."""
    said = precision.lower()
    return next((name for word, name in PRECISIONS if word in said), said)


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


def plan_of(row: Mapping[str, Any]) -> Plan:
    """The plan of a row.

    Raises Unplayable with what is wrong in it.
    """
    part = part_of(row)
    sizes = {name: _count(row, name) for name in ("num_gpus", "global_batch_seqs", "seq_len")}
    sizes |= {name: _count(row, name, 1) for name in ("tp", "cp", "pp", "vpp", "micro_batch")}  # blank: not told, the least
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
        raise Unplayable(f"{', '.join(wrong)} must be above 0")
    sizes["dp"] = _count(row, "dp", max(1, sizes["num_gpus"] // (sizes["tp"] * sizes["cp"] * sizes["pp"])))
    product = sizes["tp"] * sizes["cp"] * sizes["pp"] * sizes["dp"]
    if product != sizes["num_gpus"]:
        raise Unplayable(f"tp × cp × pp × dp = {product}, but num_gpus={sizes['num_gpus']}")
    if sizes["global_batch_seqs"] < sizes["dp"]:
        raise Unplayable(f"global_batch_seqs={sizes['global_batch_seqs']} is less than dp={sizes['dp']}")
    base, experts, ep = _base(*part), _count(row, "experts", 0), _count(row, "ep", 1)
    precision = narrowest(_word(row, "precision"))
    if base.gpu.peak(precision) is None:
        raise Unplayable(f"precision={row['precision']}: {base.gpu.name} has no such rate in conf/gpu")
    server = _count(row, "gpus_per_node", base.cluster.gpus_per_node)
    per_node = min(server, sizes["num_gpus"])
    cluster = base.cluster.but(nodes=-(-sizes["num_gpus"] // per_node), gpus_per_node=per_node)
    if nic := fabric(str(row.get("notes", "")), server):
        cluster = cluster.but(nic_bandwidth=nic)
    cap = power_cap(f"{row['gpu']} {row.get('notes', '')}")
    power = base.power.but(cap=cap if cap and cap < base.gpu.max_power else None)
    said, told = str(row.get("zero_stage_or_fsdp", "")), " ".join(_word(row, name) for name in ("group", "source", "notes"))
    stage, batch = zero_stage(said), sizes["global_batch_seqs"]
    early = re.match("FULL_SHARD|SHARD_GRAD_OP|HYBRID_SHARD", said) is not None  # the names of torch's first FSDP, of 2022 and 2023
    # fp16 tables, and the fork of Megatron of 2021, are older than FlashAttention
    old = precision == "fp16" or re.search("megatron-deepspeed|bigscience", told, re.IGNORECASE) is not None
    ours = base.gpu.name == "h800" or re.search("dualpipe|deepep|hybridep", told, re.IGNORECASE) is not None  # DeepSeek's ways
    replicated = re.search(r"zero1=(-?\d+)", said)  # InternEvo's word for the ranks among which optimizer states are sharded
    shards = int(replicated[1]) if replicated and 0 < int(replicated[1]) < sizes["dp"] else sizes["dp"]
    fused = (stage < 2 and replicated is None) or _count(row, "compile", 0) > 0 or re.search("jax|pax", said, re.IGNORECASE) is not None
    made = Software(etp=False, tokens=True) if ours else software(_word(row, "release"))
    etp = sizes["tp"] if made.etp and experts and stage < 3 and sizes["dp"] * sizes["cp"] % ep == 0 else 1
    return base.but(
        gpu=base.gpu.but(early=early),
        model=model_of(row),
        cluster=cluster,
        power=power,
        mesh=base.mesh.but(dp_replicate=sizes["dp"] // shards, dp_shard=shards, cp=sizes["cp"], tp=sizes["tp"], pp=sizes["pp"],
                           vpp=sizes["vpp"], ep=ep, etp=etp, zero=stage, dispatch="tokens" if made.tokens else "copies",
                           overlap_experts=made.tokens and (ours or sizes["vpp"] > 1) and ep > cluster.domain_ranks),
        train=base.train.but(precision=precision, seq_len=sizes["seq_len"], global_batch=batch, compile=fused,
                             micro_batch=min(sizes["micro_batch"], batch // sizes["dp"]), recompute=_recompute(row),
                             fused_gradients=stage < 2 and replicated is None,
                             fused_experts=made.fused and part[0] in BLACKWELL,
                             fused_attention=not old),
    )  # fmt: skip


def _recompute(row: Mapping[str, Any]) -> str:
    said = _word(row, "recompute") or "none"
    if said == "selective" and zero_stage(_word(row, "zero_stage_or_fsdp")) < 3 and not _count(row, "experts", 0):
        return "attention"  # Megatron's word for the core of attention (Korthikanti et al. 2022, section 5)
    if said not in ("none", "selective", "full"):
        raise Unplayable(f"recompute={said} is not none, selective or full")
    return said


def model_of(row: Mapping[str, Any]) -> Model:
    name = str(row.get("model", "model"))
    family = next((keys for pattern, keys in FAMILIES if re.search(pattern, name, re.IGNORECASE)), {})
    latent = family.get("mla")
    classic = not _count(row, "gated_mlp", 1)
    layers, heads, experts = _count(row, "layers"), _count(row, "heads"), _count(row, "experts", 0)
    dense = next((n for maker, n in family.get("dense_layers", {}).items() if maker in name.lower()), 0)
    dense = -(-dense * layers // DEEP)  # a model cut to fewer layers keeps the proportion
    moe = Moe()
    if experts:
        moe = Moe(experts=experts, top_k=_count(row, "top_k"), ffn=_count(row, "moe_ffn"), shared=family.get("shared", 0),
                  imbalance=_imbalance(row),
                  dense_layers=min(dense, layers - 1), groups=family.get("groups", 1))  # fmt: skip
    return Model(
        name=name, layers=layers, hidden=_count(row, "hidden"), heads=heads, kv_heads=_count(row, "kv_heads", heads),
        head=family.get("head"), ffn=_count(row, "ffn_hidden"), gated=not classic, vocab=_count(row, "vocab"), tied=classic,
        positions="learned" if classic else "rope", context=_count(row, "seq_len") if classic else None, layer_norm=classic,
        qk_norm="qwen3" in name.lower(), rope_theta=1e4, norm_epsilon=1e-5, moe=moe,
        mla=Mla(kv_rank=latent[0], q_rank=latent[1], rope=latent[2]) if latent else Mla(), mtp=_further(row, name),
        source="a row of a table",
    )  # fmt: skip


def _imbalance(row: Mapping[str, Any]) -> float:
    """1 where the router is forced to balance, as in benchmarks, unless the row says that tokens choose for themselves."""
    told = _word(row, "notes")
    return FREE if re.search("real routing|not (force-)?balanced|unbalanced", told, re.IGNORECASE) else 1.0


def _further(row: Mapping[str, Any], name: str) -> int:
    """Blocks for further tokens: Megatron-Bridge measures DeepSeek-V3 with its one."""
    return int(re.search("deepseek-?v3", name, re.IGNORECASE) is not None and software(_word(row, "release")).tokens)


def part_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """The options of gpu and cluster for a row."""
    for pattern, gpu, cluster in PARTS:
        if re.search(pattern, str(row["gpu"]), re.IGNORECASE):
            return gpu, cluster
    raise Unplayable(f"gpu={row['gpu']} is not in conf/gpu")


@cache
def _base(gpu: str, cluster: str) -> Plan:
    return load([f"gpu={gpu}", f"cluster={cluster}", "cluster.nodes=1", "train.global_batch=5040", "train.micro_batch=1"])


def _word(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None or pd.isna(value) else str(value)


def _count(row: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of a row, which may be blank only where there is a default."""
    value = row.get(name)
    if value is None or pd.isna(value):
        if default is None:
            raise Unplayable(f"{name} is blank")
        return default
    try:
        number = int(float(value))
    except (TypeError, ValueError):
        raise Unplayable(f"{name}={value} is no number") from None
    if number < (1 if default is None else 0):
        raise Unplayable(f"{name}={value} must be above 0")
    return number
