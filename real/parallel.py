"""The mesh applied to the model: who holds which part of every parameter.

Everything is built on the mesh that is handed in; the module keeps no state, so several models can live in one job.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from conf.errors import Refused
from conf.plan import Plan
from real.model import Decoder
from real.timeline import Timeline

AXES = ("dp_replicate", "dp_shard")
gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the older names warn from torch 2.13 on
scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def refuse_unbuilt(plan: Plan) -> None:
    """What `sim` predicts and this trainer does not execute yet, one line each.

    Raises Refused.
    """
    axes = plan.axes | {"ep": plan.mesh.ep}
    asked = [f"mesh.{axis}={size}" for axis, size in axes.items() if axis not in AXES and size > 1]
    found = [f"{', '.join(asked)}: real executes {' and '.join(AXES)}; sim predicts the others; set them to 1"] if asked else []
    found += [f"{what}: real cannot execute it yet, sim predicts it; {cure}" for what, cure in _unbuilt(plan)]
    if found:
        raise Refused(*found)


def _unbuilt(plan: Plan) -> Iterator[tuple[str, str]]:
    """Each value that this trainer does not execute, and the one that it does."""
    model, precision = plan.model, plan.train.precision
    if plan.gpu.kind == "tpu":
        yield "gpu.kind=tpu", "choose a gpu of kind cpu or cuda, for example gpu=cpu_core"
    if precision in ("fp16", "fp8"):
        yield f"train.precision={precision}", "set train.precision=" + ("bf16" if plan.gpu.bf16_peak else "fp32")
    if model.moe.experts:
        yield f"model.moe.experts={model.moe.experts}", "set model.moe.experts=0 for a dense model"
    if model.mla.kv_rank:
        yield f"model.mla.kv_rank={model.mla.kv_rank}", "set model.mla.kv_rank=0 for ordinary attention"
    if not model.gated:
        yield "model.gated=false", "set model.gated=true"
    if model.positions != "rope":
        yield f"model.positions={model.positions}", "set model.positions=rope"
    if model.layer_norm:
        yield "model.layer_norm=true", "set model.layer_norm=false"
    if model.qk_norm:
        yield "model.qk_norm=true", "set model.qk_norm=false"
    if model.head is not None and model.head * model.heads != model.hidden:
        yield f"model.head={model.head} × model.heads={model.heads} is not model.hidden={model.hidden}", "set model.head=null"


def device_mesh(plan: Plan) -> DeviceMesh | None:
    """The mesh of this job's ranks, or None for one rank alone."""
    if plan.ranks == 1:
        return None
    return init_device_mesh(plan.gpu.kind, (plan.mesh.dp_replicate, plan.dp_shard), mesh_dim_names=AXES)


def shard(model: Decoder, plan: Plan, mesh: DeviceMesh, timeline: Timeline) -> Decoder:
    """FSDP2 over dp_shard, replicated over dp_replicate: one unit a block, one for norm and head, one for the embedding.

    A tied embedding lives in the root unit, because a parameter has one owner.
    """
    bf16 = plan.train.precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    options: dict[str, Any] = {"mesh": mesh if plan.mesh.dp_replicate > 1 else mesh["dp_shard"], "mp_policy": policy}
    for block in model.layers.values():
        fully_shard(block, **options)
    if not plan.model.tied:
        fully_shard([model.norm, model.lm_head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)  # the loss is divided by the global number of tokens
        if plan.gpu.kind == "cpu":
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    watch(model, plan, timeline)
    return model


def watch(model: torch.nn.Module, plan: Plan, timeline: Timeline) -> None:
    """Book the time in which FSDP2 waits for its collectives; on GPUs they run beside the compute and cannot be told apart."""
    if plan.gpu.kind == "cpu":
        for unit in units(model):
            unit.set_custom_all_gather(TimedAllGather(timeline))
            unit.set_custom_reduce_scatter(TimedReduceScatter(timeline))


def units(model: torch.nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def synchronise(model: Decoder, last: bool) -> None:
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


def autocast(plan: Plan) -> Any:
    """bf16 compute for a rank alone; FSDP's own policy does it on a mesh."""
    alone = plan.ranks == 1 and plan.train.precision == "bf16"
    return torch.autocast(plan.gpu.kind, torch.bfloat16) if alone else nullcontext()
