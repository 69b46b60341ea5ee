"""Rows of measured training steps as plans, and their predictions.

What a table's columns say, and what follows from the named part and model: servers as their maker ships them, published
configurations, frameworks that shard parameters run torch's eager code and the others fused kernels, unless they compile.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.rows import Replayed, Unplayable, base_of, count, each, part_of, tabled, word
from analysis.words import BLACKWELL, Software, blockwise, fabric, imbalance, narrowest, power_cap, software, zero_stage
from conf.arithmetic import flops_per_token
from conf.plan import Mla, Model, Moe, Plan
from sim.kernels import Device, rates
from sim.memory import USABLE, held, memory
from sim.network import Network
from sim.parallel import columns, predict

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
DEEP = 61  # layers of the whole models that start with dense ones (DeepSeek-V2 has 60)


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
    unsaid = [not word(frame.loc[index], "recompute") for index in plans]
    frozen = [str(frame["method"][index]).lower() == "lora" if "method" in frame else False for index in plans]
    return _least(list(plans.values()), np.array(unsaid), np.array(frozen)), np.array(frozen), list(plans), failed


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


def plan_of(row: Mapping[str, Any]) -> Plan:
    """The plan of a row.

    Raises Unplayable with what is wrong in it.
    """
    gpu, cluster = part_of(row)
    base, sizes = base_of(gpu, cluster), _sizes(row)
    precision = narrowest(word(row, "precision"))
    if base.gpu.peak(precision) is None:
        raise Unplayable(f"precision={row['precision']}: {base.gpu.name} has no such rate in conf/gpu")
    plan = _machine(row, base, sizes["num_gpus"])
    batch = sizes["global_batch_seqs"]
    mesh = {name: sizes[name] for name in ("cp", "tp", "pp", "vpp")} | {"ep": count(row, "ep", 1)}
    train = {"precision": precision, "seq_len": sizes["seq_len"], "global_batch": batch, "recompute": _recompute(row),
             "micro_batch": min(sizes["micro_batch"], batch // sizes["dp"])}  # fmt: skip
    plan = plan.but(model=model_of(row), mesh=plan.mesh.but(**mesh), train=plan.train.but(**train))
    return _software(row, plan, sizes["dp"], gpu in BLACKWELL)


def _sizes(row: Mapping[str, Any]) -> dict[str, int]:
    """Degrees, batch and length; what is blank was not told, and is the least."""
    sizes = {name: count(row, name) for name in ("num_gpus", "global_batch_seqs", "seq_len")}
    sizes |= {name: count(row, name, 1) for name in ("tp", "cp", "pp", "vpp", "micro_batch")}
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
        raise Unplayable(f"{', '.join(wrong)} must be above 0")
    sizes["dp"] = count(row, "dp", max(1, sizes["num_gpus"] // (sizes["tp"] * sizes["cp"] * sizes["pp"])))
    product = sizes["tp"] * sizes["cp"] * sizes["pp"] * sizes["dp"]
    if product != sizes["num_gpus"]:
        raise Unplayable(f"tp × cp × pp × dp = {product}, but num_gpus={sizes['num_gpus']}")
    if sizes["global_batch_seqs"] < sizes["dp"]:
        raise Unplayable(f"global_batch_seqs={sizes['global_batch_seqs']} is less than dp={sizes['dp']}")
    return sizes


def _machine(row: Mapping[str, Any], base: Plan, gpus: int) -> Plan:
    """Servers, fabric and power cap."""
    server = count(row, "gpus_per_node", base.cluster.gpus_per_node)
    each = min(server, gpus)
    cluster = base.cluster.but(nodes=-(-gpus // each), gpus_per_node=each)
    if nic := fabric(word(row, "notes"), server):
        cluster = cluster.but(nic_bandwidth=nic)
    cap = power_cap(f"{row['gpu']} {word(row, 'notes')}")
    return base.but(cluster=cluster, power=base.power.but(cap=cap if cap and cap < base.gpu.max_power else None))


def _software(row: Mapping[str, Any], plan: Plan, dp: int, blackwell: bool) -> Plan:
    """What follows from the framework, its age and its release."""
    said, told = word(row, "zero_stage_or_fsdp"), " ".join(word(row, name) for name in ("group", "source", "notes"))
    stage, mesh = zero_stage(said), plan.mesh
    early = re.match("FULL_SHARD|SHARD_GRAD_OP|HYBRID_SHARD", said) is not None  # the names of torch's first FSDP, of 2022 and 2023
    # fp16 tables, and the fork of Megatron of 2021, are older than FlashAttention
    old = plan.train.precision == "fp16" or re.search("megatron-deepspeed|bigscience", told, re.IGNORECASE) is not None
    deepseek = plan.gpu.name == "h800" or re.search("dualpipe|deepep|hybridep", told, re.IGNORECASE) is not None
    replicated = re.search(r"zero1=(-?\d+)", said)  # InternEvo's word for the ranks among which optimizer states are sharded
    shards = int(replicated[1]) if replicated and 0 < int(replicated[1]) < dp else dp
    megatron = stage < 2 and replicated is None
    fused = megatron or count(row, "compile", 0) > 0 or re.search("jax|pax", said, re.IGNORECASE) is not None
    made = Software(etp=False, tokens=True) if deepseek else software(word(row, "release"))
    shared = made.etp and plan.model.moe.experts and stage < 3 and dp * mesh.cp % mesh.ep == 0
    beside = made.tokens and (deepseek or mesh.vpp > 1) and mesh.ep > plan.cluster.domain_ranks
    mesh = mesh.but(dp_replicate=dp // shards, dp_shard=shards, etp=mesh.tp if shared else 1, zero=stage,
                    dispatch="tokens" if made.tokens else "copies", overlap_experts=beside)  # fmt: skip
    train = plan.train.but(compile=fused, fused_attention=not old, fused_gradients=megatron, fused_experts=made.fused and blackwell,
                           scaling="block" if blockwise(word(row, "precision")) else "tensor")  # fmt: skip
    return plan.but(gpu=plan.gpu.but(early=early), mesh=mesh, train=train)


def _recompute(row: Mapping[str, Any]) -> str:
    said = word(row, "recompute") or "none"
    if said == "selective" and zero_stage(word(row, "zero_stage_or_fsdp")) < 3 and not count(row, "experts", 0):
        return "attention"  # Megatron's word for the core of attention (Korthikanti et al. 2022, section 5)
    if said not in ("none", "selective", "full"):
        raise Unplayable(f"recompute={said} is not none, selective or full")
    return said


def model_of(row: Mapping[str, Any]) -> Model:
    name = str(row.get("model", "model"))
    family = next((keys for pattern, keys in FAMILIES if re.search(pattern, name, re.IGNORECASE)), {})
    latent = family.get("mla")
    classic = not count(row, "gated_mlp", 1)
    layers, heads, experts = count(row, "layers"), count(row, "heads"), count(row, "experts", 0)
    dense = next((n for maker, n in family.get("dense_layers", {}).items() if maker in name.lower()), 0)
    dense = -(-dense * layers // DEEP)  # a model cut to fewer layers keeps the proportion
    moe = Moe()
    if experts:
        moe = Moe(experts=experts, top_k=count(row, "top_k"), ffn=count(row, "moe_ffn"), shared=family.get("shared", 0),
                  imbalance=imbalance(row),
                  dense_layers=min(dense, layers - 1), groups=family.get("groups", 1))  # fmt: skip
    return Model(
        name=name, layers=layers, hidden=count(row, "hidden"), heads=heads, kv_heads=count(row, "kv_heads", heads),
        head=family.get("head"), ffn=count(row, "ffn_hidden"), gated=not classic, vocab=count(row, "vocab"), tied=classic,
        positions="learned" if classic else "rope", context=count(row, "seq_len") if classic else None, layer_norm=classic,
        qk_norm="qwen3" in name.lower(), rope_theta=1e4, norm_epsilon=1e-5, moe=moe,
        mla=Mla(kv_rank=latent[0], q_rank=latent[1], rope=latent[2]) if latent else Mla(), mtp=_further(row, name),
        source="a row of a table",
    )  # fmt: skip


def _further(row: Mapping[str, Any], name: str) -> int:
    """Blocks for further tokens: Megatron-Bridge measures DeepSeek-V3 with its one."""
    return int(re.search("deepseek-?v3", name, re.IGNORECASE) is not None and software(word(row, "release")).tokens)
