"""The mesh applied to the model: who holds which part of every parameter, and who talks to whom.

Everything is built on the ranks that are handed in; the module keeps no state, so several models can live in one job.
"""

from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from conf.errors import Refused
from conf.plan import Plan
from real import fp8
from real.attention import Attend, Gathered, Ring, Ulysses, spread
from real.collectives import Line
from real.layers import COLUMNS, ROWS, Linear
from real.model import Attention, Decoder, LatentAttention
from real.moe import Experts, Mixture
from real.timeline import Timeline

# The one value that is executed, where sim predicts others: other frameworks' ways.
ONLY = {
    "model.mtp": 0, "mesh.etp": 1, "mesh.dispatch": "copies", "mesh.overlap_experts": False, "train.scaling": "tensor",
    "train.graphs": False, "train.fused_gradients": False, "train.fused_experts": False, "train.fused_attention": True,
}  # fmt: skip
V_SHAPED = ("zbv", "dualpipev")  # schedules in which a rank hands work to itself, which older gloo cannot
gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the older names warn from torch 2.13 on
scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def refuse_unbuilt(plan: Plan) -> None:
    """What `sim` predicts and this trainer does not execute, one line each.

    Raises Refused.
    """
    found = [f"{what}: real cannot execute it, sim predicts it; {cure}" for what, cure in _unbuilt(plan)]
    if found:
        raise Refused(*found)


def _unbuilt(plan: Plan) -> Iterator[tuple[str, str]]:
    """Each value that this trainer does not execute, and the one that it does."""
    for key, value in ONLY.items():
        if (said := attrgetter(key)(plan)) != value:
            yield f"{key}={str(said).lower()}", f"set {key}={str(value).lower()}"
    yield from _unbuilt_model(plan)
    yield from _unbuilt_mesh(plan)


def _unbuilt_model(plan: Plan) -> Iterator[tuple[str, str]]:
    model, precision = plan.model, plan.train.precision
    if plan.gpu.kind == "tpu":
        yield "gpu.kind=tpu", "choose a gpu of kind cpu or cuda, for example gpu=cpu_core"
    if precision in ("fp16", "fp4"):
        yield f"train.precision={precision}", "set train.precision=" + ("bf16" if plan.gpu.bf16_peak else "fp32")
    if plan.train.optimizer == "adamw8bit" and plan.gpu.kind == "cpu":
        yield "train.optimizer=adamw8bit on a CPU", "set train.optimizer=adamw"
    if model.positions == "alibi":
        yield "model.positions=alibi", "set model.positions=rope"
    if model.moe.experts and (model.layer_norm or not model.gated):
        yield "a mixture of experts with model.layer_norm or without model.gated", "set model.layer_norm=false model.gated=true"
    if model.mla.kv_rank and (model.qk_norm or model.layer_norm):
        yield "model.mla with model.qk_norm or model.layer_norm", "set model.qk_norm=false model.layer_norm=false"
    if plan.finetune.method != "none" and plan.failures.restart == "replica":
        yield "fine-tuning where replicas restart alone", "set failures.restart=job"
    if plan.align.method != "none" and plan.mesh.pp * plan.mesh.cp > 1:
        yield "an alignment over mesh.pp or mesh.cp", "set mesh.pp=1 mesh.cp=1; mesh.dp_shard and mesh.tp are executed"
    if plan.align.engine_tp > 1:
        yield f"align.engine_tp={plan.align.engine_tp}", "set align.engine_tp=1: a generator is one rank"
    if plan.train.recompute == "attention":
        yield "train.recompute=attention", "set train.recompute=selective"
    if model.moe.experts and plan.train.compile and plan.train.recompute != "none":
        yield f"train.compile=true with train.recompute={plan.train.recompute} in a mixture of experts", "set train.compile=false"


def _unbuilt_mesh(plan: Plan) -> Iterator[tuple[str, str]]:
    model, mesh = plan.model, plan.mesh
    if mesh.pp > 1 and mesh.pipeline in V_SHAPED and plan.gpu.kind == "cpu" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        yield f"mesh.schedule={mesh.pipeline} on a CPU with torch {torch.__version__}", "use torch 2.13, or mesh.schedule=zero_bubble"
    if mesh.zero != 3 and plan.dp_shard * mesh.cp > 1:
        yield f"mesh.zero={mesh.zero}", "set mesh.zero=3" + (", or dp_replicate for dp_shard" if mesh.zero == 0 else "")
    if model.vocab % mesh.tp:
        yield f"model.vocab={model.vocab} on mesh.tp={mesh.tp} ranks", f"set model.vocab={-(-model.vocab // mesh.tp) * mesh.tp}"
    tokens, heads = plan.train.seq_len, model.heads // mesh.tp if model.mla.kv_rank else model.kv_heads // mesh.tp
    if mesh.cp > 1 and mesh.cp_kind == "ulysses" and heads % mesh.cp:
        yield f"mesh.cp_kind=ulysses with mesh.cp={mesh.cp} and {heads} heads of keys a rank", "set mesh.cp_kind=ring"
    if mesh.cp > 1 and mesh.cp_kind != "ulysses" and tokens % (2 * mesh.cp):
        yield f"mesh.cp_kind={mesh.cp_kind} with train.seq_len={tokens}, no multiple of 2 × mesh.cp={mesh.cp}", "set mesh.cp_kind=ulysses"


class Axes:
    """The mesh of a job as one rank sees it. Ranks are laid out pp, dp_replicate, dp_shard, cp, tp, outermost first.

    Three meshes on the same ranks: `shards`, in which FSDP shards over dp_shard and cp together; `experts`, where the
    ranks of dp_shard, cp and tp are dealt anew into ep neighbours that hold different experts and groups that hold the
    same ones; `sequences`, where cp and tp share a sequence. Lines are None along axes of one rank.
    """

    def __init__(self, plan: Plan, timeline: Timeline | None = None, ranks: list[int] | None = None) -> None:
        kind, sizes, ep = plan.gpu.kind, plan.axes, plan.mesh.ep
        table = torch.tensor(ranks if ranks is not None else range(plan.ranks)).view(*sizes.values())
        here = (table == dist.get_rank()).nonzero()[0].tolist()
        self.at = dict(zip(sizes, here, strict=True))
        pp, replicas, shards, cp, tp = sizes.values()
        booked = timeline if kind == "cpu" and not plan.train.compile else None

        def lay(**dims: int) -> DeviceMesh:
            return DeviceMesh(kind, table.view(*dims.values()), mesh_dim_names=tuple(dims))

        def line(mesh: DeviceMesh, name: str, clock: Timeline | None = booked) -> Line | None:
            return Line(mesh.get_group(name), clock) if mesh[name].size() > 1 else None

        self.shards = lay(pp=pp, dp_replicate=replicas, dp_shard=shards * cp, tp=tp)
        self.tp, self.pp = line(self.shards, "tp"), line(self.shards, "pp", None)
        self.experts = lay(pp=pp, dp_replicate=replicas, dp_expert=shards * cp * tp // ep, ep=ep) if plan.model.moe.experts else None
        self.ep = line(self.experts, "ep") if self.experts else None
        self.cp = line(lay(rest=pp * replicas * shards, cp=cp, tp=tp), "cp") if cp > 1 else None
        self.sequence = line(lay(rest=pp * replicas * shards, sequence=cp * tp), "sequence") if self.experts else None
        self.stage = line(lay(pp=pp, stage=plan.ranks // pp), "stage", None)

    @property
    def names(self) -> dict[str, str]:
        """Axis by the name of its process group; FSDP's reach over dp_shard and cp together, and over the ranks of the same experts."""
        meshes = [(self.shards, ("dp_replicate", "dp_shard", "tp")), (self.experts, ("dp_expert", "ep"))]
        groups = [(mesh.get_group(name), name) for mesh, names in meshes if mesh is not None for name in names]
        groups += [(line.group, name) for name, line in (("cp", self.cp), ("sequence", self.sequence)) if line]
        found = defaultdict[str, list[str]](list)  # axes of the same ranks share a group
        for group, name in groups:
            found[group.group_name].append(name)
        return {group: "/".join(names) for group, names in found.items()}

    @property
    def dp_rank(self) -> int:
        """Which share of each batch this rank sees."""
        return self.at["dp_replicate"] * self.shards["dp_shard"].size() // self._cp + self.at["dp_shard"]

    @property
    def _cp(self) -> int:
        return self.cp.size if self.cp else 1


def apply(model: Decoder, plan: Plan, axes: Axes, timeline: Timeline) -> None:
    """Tensor, context and expert parallelism, compilation, and sharding, in this order, on a model without storage."""
    _tensor(model, axes)
    _context(model, plan, axes)
    _experts(model, plan, axes)
    if plan.train.precision == "fp8":
        _eighths(model, axes)
    if plan.train.compile:
        compile_blocks(model)
    _shard(model, plan, axes)
    watch(model, plan, timeline)


def compile_blocks(model: Decoder) -> None:
    """One compilation serves all blocks, because they are alike."""
    for block in model.layers.values():
        block.compile()


def _tensor(model: Decoder, axes: Axes) -> None:
    """Cut matrices over tp; the tokens between them are cut too (sequence parallelism, Korthikanti et al. 2022)."""
    if axes.tp is None:
        return
    mesh = axes.shards["tp"]
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            continue
        if hasattr(module, "tp"):
            module.tp = axes.tp
        name = path.split(".")[-1]
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(distribute_tensor(parameter, mesh, [_cut(name, key)]), parameter.requires_grad))
        if name in ROWS and isinstance(module, Linear):
            module.bias_share = float(axes.tp.rank == 0)
    model.tie()


def _cut(name: str, key: str) -> Placement:
    """How tp cuts a parameter of a matrix: its outputs, its inputs, or not; the bytes of one in four bits are each rank's own."""
    if key == "packed" or (name in COLUMNS and key != "lora_A"):
        return Shard(0)
    return Shard(1) if name in ROWS and key in ("weight", "lora_A") else Replicate()


def _context(model: Decoder, plan: Plan, axes: Axes) -> None:
    """Spread each sequence over cp."""
    kind, line = plan.mesh.cp_kind, axes.cp
    if line is None:
        return
    model.spread = lambda tokens: spread(kind, tokens * line.size, line)
    make: type[Attend] = {"ring": Ring, "gather": Gathered, "ulysses": Ulysses}[kind]
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            module.attend = make(line)  # type: ignore[call-arg]


def _experts(model: Decoder, plan: Plan, axes: Axes) -> None:
    """Deal the experts out over ep."""
    for mixture in (m for m in model.modules() if isinstance(m, Mixture)):
        mixture.sequence, mixture.ep = axes.sequence, axes.ep
        if axes.ep is not None and axes.experts is not None:
            for key, parameter in list(mixture.experts.named_parameters(recurse=False)):
                expert = distribute_tensor(parameter, axes.experts["ep"], [Shard(0)])
                setattr(mixture.experts, key, nn.Parameter(expert, parameter.requires_grad))


def _eighths(model: Decoder, axes: Axes) -> None:
    """Matrix products of the blocks in fp8, where this rank's part has a shape that the kernels take."""
    tp = axes.tp.size if axes.tp else 1
    for path, module in model.layers.named_modules():
        if isinstance(module, Linear) and module.weight is not None:
            name, (rows, columns) = path.split(".")[-1], module.weight.shape
            module.fp8 = fp8.fits(columns // (tp if name in ROWS else 1), rows // (tp if name in COLUMNS else 1))


def _shard(model: Decoder, plan: Plan, axes: Axes) -> None:
    """FSDP2, replicated over dp_replicate: one unit a block, one for its experts, one for norm and head, one for the embedding.

    A tied embedding lives in the root unit, because a parameter has one owner. In a pipeline weights stay gathered for
    the whole step.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if plan.train.half else MixedPrecisionPolicy()
    later: dict[str, Any] = {"reshard_after_forward": False} if plan.mesh.pp > 1 else {}
    replicas = ("dp_replicate",) if plan.mesh.dp_replicate > 1 else ()
    common = {"mesh": axes.shards[(*replicas, "dp_shard")], "mp_policy": policy}
    for block in model.layers.values():
        if isinstance(block.mlp, Mixture) and axes.experts is not None:
            mesh = axes.experts[(*replicas, "dp_expert")]
            rows = plan.model.hidden % mesh.size(-1) == plan.model.moe.ffn % mesh.size(-1) == 0  # each expert's, else whole experts
            fully_shard(block.mlp.experts, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda _, rows=rows: Shard(int(rows)), **later)
        fully_shard(block, **common, **later)
    if model.lm_head is not None and model.norm is not None and not (model.shape.tied and model.embed_tokens is not None):
        fully_shard([model.norm, model.lm_head], reshard_after_forward=False, **common)
    fully_shard(model, **common, **later)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)  # the loss is divided by the global number of tokens
        if plan.gpu.kind == "cpu":
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM


def watch(model: nn.Module, plan: Plan, timeline: Timeline) -> None:
    """Book the time in which FSDP2 waits for its collectives; on GPUs they run beside the compute and cannot be told apart."""
    if plan.gpu.kind == "cpu":
        for unit in units(model):
            unit.set_custom_all_gather(TimedAllGather(timeline))
            unit.set_custom_reduce_scatter(TimedReduceScatter(timeline))


def units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def synchronise(model: nn.Module, last: bool) -> None:
    """Reduce gradients in this backward pass only if it is the step's last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


class TimedAllGather:
    """A collective whose waiting time is booked as exposed communication; on a CPU FSDP2 waits inside the call."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        with self.timeline.during("communication"):
            return gather(output_tensor, input_tensor, group=group, async_op=async_op)


class TimedReduceScatter(TimedAllGather):
    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:  # type: ignore[override]
        with self.timeline.during("communication"):
            return scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
