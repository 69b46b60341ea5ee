"""What must hold for a plan as a whole; every broken rule is one line with its cure."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from conf.errors import nearest
from conf.plan import Plan

POSITIVE = (
    *(f"cluster.{k}" for k in ("nodes", "gpus_per_node", "cores_per_node", "storage_write", "storage_read")),
    *(f"model.{k}" for k in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")),
    *(f"gpu.{k}" for k in ("fp32_peak", "memory", "memory_bandwidth", "gemm_efficiency", "memory_efficiency", "link_bandwidth")),
    *(f"mesh.{k}" for k in ("dp_replicate", "cp", "tp", "pp", "vpp")),
    *(f"train.{k}" for k in ("seq_len", "global_batch", "micro_batch", "learning_rate", "clip", "epsilon")),
    *("tokenizer.vocab", "tokenizer.sample", "tokenizer.bytes_per_token", "data.limit", "checkpoint.keep", "price.lifetime"),
    *("data.extract_rate", "data.dedup_rate", "tokenizer.train_rate", "tokenizer.encode_rate", "data.document_bytes"),
)
NOT_NEGATIVE = (
    *("cluster.spares", "gpu.launch", "gpu.link_latency", "cluster.nic_latency", "gpu.idle_power", "power.host"),
    *(f"failures.{k}" for k in ("detect", "diagnose", "reallocate", "init", "repair")),
    *("train.warmup", "train.evaluate_every", "train.evaluate_sequences", "checkpoint.every", "train.weight_decay"),
)
CHOICES = {
    "gpu.kind": ("cpu", "cuda"),
    "train.precision": ("fp32", "bf16"),
    "train.schedule": ("cosine", "wsd", "constant"),
    "train.recompute": ("none", "full"),
}
SHARES = ("data.held_out", "data.duplicates", "train.decay", "train.final_rate", "train.beta1", "train.beta2", "gpu.overlap",
          "power.compute", "power.communication", "power.bubble", "power.other")  # fmt: skip


def get(plan: Any, key: str) -> Any:
    for part in key.split("."):
        plan = getattr(plan, part)
    return plan


def problems(plan: Plan) -> list[str]:
    """Every rule that the plan breaks, one line each: key and value, rule, cure."""
    return [*_values(plan), *_shapes(plan), *_mesh(plan), *_training(plan), *_world(plan)]


def _values(plan: Plan) -> Iterator[str]:
    for key in POSITIVE:
        if not get(plan, key) > 0:
            yield f"{key}={get(plan, key)} must be above 0"
    for key in NOT_NEGATIVE:
        if not get(plan, key) >= 0:
            yield f"{key}={get(plan, key)} must not be negative"
    for key, allowed in CHOICES.items():
        if get(plan, key) not in allowed:
            yield f"{key}={get(plan, key)} is not known; {nearest(get(plan, key), allowed)}"
    for key in SHARES:
        if not 0 <= get(plan, key) <= 1:
            yield f"{key}={get(plan, key)} is a share; it must lie between 0 and 1"


def _divides(part: int, whole: int) -> bool:
    return part > 0 and whole % part == 0


def _shapes(plan: Plan) -> Iterator[str]:
    model, tp, pp, cp = plan.model, plan.mesh.tp, plan.mesh.pp, plan.mesh.cp
    rules = (
        ("model.heads", model.heads, "model.hidden", model.hidden),
        ("model.kv_heads", model.kv_heads, "model.heads", model.heads),
        ("mesh.tp", tp, "model.heads", model.heads),
        ("mesh.tp", tp, "model.kv_heads", model.kv_heads),
        ("mesh.tp", tp, "model.ffn", model.ffn),
        ("mesh.cp", cp, "train.seq_len", plan.train.seq_len),
    )
    for part_key, part, whole_key, whole in rules:
        if part > 0 and not _divides(part, whole):
            yield f"{part_key}={part} must divide {whole_key}={whole}; {_near_divisors(part, whole, part_key)}"
    if pp > 0 and model.layers % pp and (model.layers + 2) % pp:
        rule = f"model.layers={model.layers}, or {model.layers + 2} with embedding and head counted as layers"
        yield f"mesh.pp={pp} must divide {rule}; {_near_divisors(pp, model.layers, 'mesh.pp')}"
    stages = pp * plan.mesh.vpp
    if plan.mesh.vpp > 1 and (pp == 1 or (model.layers % stages and (model.layers + 2) % stages)):
        yield f"mesh.vpp={plan.mesh.vpp} × mesh.pp={pp} = {stages} must divide the layers, and pp be above 1; set mesh.vpp=1"
    if _divides(model.heads, model.hidden) and model.head_dim % 2:
        odd = f"model.hidden={model.hidden} / model.heads={model.heads} gives an odd head of {model.head_dim}"
        yield f"{odd}; rotary embedding needs an even one; change model.heads"
    if model.vocab < plan.tokenizer.vocab:
        yield f"model.vocab={model.vocab} is smaller than tokenizer.vocab={plan.tokenizer.vocab}; set model.vocab={plan.tokenizer.vocab}"


def _near_divisors(part: int, whole: int, key: str) -> str:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    below = max(d for d in divisors if d <= part)
    above = min((d for d in divisors if d >= part), default=whole)
    return f"set {key}={below}" + (f" or {above}" if above != below else "")


def _mesh(plan: Plan) -> Iterator[str]:
    sizes, mesh = plan.axes, plan.mesh
    product = " × ".join(f"{name} {size}" for name, size in sizes.items())
    if mesh.dp_shard < 1 and mesh.dp_shard != -1:
        yield f"mesh.dp_shard={mesh.dp_shard} must be above 0, or -1 for what is left"
    elif min(sizes.values()) > 0 and plan.ranks != plan.cluster.ranks:
        have = f"cluster.nodes={plan.cluster.nodes} × cluster.gpus_per_node={plan.cluster.gpus_per_node}"
        yield f"mesh {product} = {plan.ranks} ranks, but {have} = {plan.cluster.ranks}; set mesh.dp_shard=-1 to fill, or change an axis"
    if mesh.tp > plan.cluster.gpus_per_node:
        yield f"mesh.tp={mesh.tp} crosses servers; it must not exceed cluster.gpus_per_node={plan.cluster.gpus_per_node}"
    share = plan.dp * plan.train.micro_batch
    if share > 0 and plan.train.global_batch % share:
        rule = f"data-parallel ranks {plan.dp} × train.micro_batch={plan.train.micro_batch} = {share}"
        near = max(share, plan.train.global_batch // share * share)
        yield f"train.global_batch={plan.train.global_batch} is no multiple of {rule}; set train.global_batch={near}"


def _training(plan: Plan) -> Iterator[str]:
    train = plan.train
    if train.steps is None and train.stop_after is None:
        yield "train.steps and train.stop_after are both null: the run would never end; set one"
    if train.steps is not None and train.steps < 1:
        yield f"train.steps={train.steps} must be above 0, or null for as long as train.stop_after says"
    if train.steps is None and train.schedule != "constant":
        yield f"train.schedule={train.schedule} needs to know the last step; set train.steps, or train.schedule=constant"
    if train.steps is not None and train.warmup > train.steps:
        yield f"train.warmup={train.warmup} is longer than train.steps={train.steps}; set train.warmup={train.steps // 10}"
    if train.precision == "bf16" and plan.gpu.bf16_peak is None:
        yield f"train.precision=bf16: {plan.gpu.name} has no bf16 rate; set train.precision=fp32"
    if plan.data.path is None and plan.data.tokens is None:
        yield "data.path and data.tokens are both null; name a corpus with data.path=…, or say how many tokens exist with data.tokens=…"
    if plan.data.path is not None and plan.data.tokens is not None:
        yield f"data.path={plan.data.path} and data.tokens={plan.data.tokens} contradict each other; set one of them to null"


def _world(plan: Plan) -> Iterator[str]:
    for name, cause in plan.failures.causes.items():
        if cause.per not in ("job", "node", "gpu"):
            yield f"failures.causes.{name}.per={cause.per} is not known; it is one of job, node, gpu"
        if not cause.rate >= 0:
            yield f"failures.causes.{name}.rate={cause.rate} must not be negative"
    if plan.gpu.name not in plan.price.gpu_hours:
        cure = f"add price.gpu_hours.{plan.gpu.name}, or {nearest(plan.gpu.name, plan.price.gpu_hours)}"
        yield f"price.gpu_hours has no price for {plan.gpu.name}; {cure}"
    if plan.gpu.name not in plan.price.embodied:
        yield f"price.embodied has no value for {plan.gpu.name}; add price.embodied.{plan.gpu.name}"
    if plan.power.pue < 1:
        yield f"power.pue={plan.power.pue} must be at least 1: a building uses what its servers use"
    profile = plan.grid.profile
    if profile is not None and (len(profile) != 12 or any(len(month) != 24 for month in profile)):
        yield "grid.profile must hold 12 months of 24 hours; give 12 rows of 24 values, or null"
    for key in ("start", "price.as_of"):
        try:
            datetime.fromisoformat(str(get(plan, key)))
        except ValueError:
            yield f"{key}={get(plan, key)} is not a date; write for example {key}=2026-01-31"
    if plan.profile is not None and not Path(plan.profile).is_file():
        yield f"profile={plan.profile} is no file; make one with: foretold real only=kernels,network && foretold analysis calibrate"
