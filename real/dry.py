"""A rehearsal: the plan's ranks, shards, memory and collectives, traced on fake devices in one process.

The trainer's own code runs on tensors that have shapes and no numbers, in a process group that answers at once. What it
holds and sends is counted, not estimated; only the load of experts is assumed to be even.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from conf.plan import Plan
from conf.units import show
from real import parallel
from real.loss import loss_sum
from real.memory import Ones, Tracker, fused
from real.model import Decoder
from real.moe import weigh
from real.optim import Optimizer, local
from real.pipeline import Pipeline, stages_of
from real.timeline import Timeline
from real.trainer import laid_out

KINDS = {"all_gather": "all-gather", "allgather": "all-gather", "reduce_scatter": "reduce-scatter", "all_reduce": "all-reduce",
         "allreduce": "all-reduce", "all_to_all": "all-to-all", "alltoall": "all-to-all"}  # fmt: skip


@dataclass(frozen=True)
class Rank:
    """What one rank holds, and sends in a step."""

    rank: int
    stages: list[int]
    layers: list[int]
    parameters: int  # of this rank's shards
    state: int  # bytes: fp32 weights, gradients and two moments
    peak: int  # bytes in a step, the optimizer's state included
    collectives: list[dict[str, Any]]  # kind, axis, ranks, calls a step, bytes a step


def build(plan: Plan, foretold: Mapping[str, Any] | None) -> dict[str, Any]:
    """The rehearsal of the first rank of the first and of the last pipeline stage, each in a process of its own."""
    fake = _fake(plan)
    firsts = sorted({0, plan.ranks - plan.ranks // plan.mesh.pp})
    with ProcessPoolExecutor(len(firsts), get_context("fork")) as pool:
        ranks = [asdict(rank) for rank in pool.map(_rehearse, [fake] * len(firsts), firsts, [plan.gpu.kind != "cpu"] * len(firsts))]
    quantities = foretold["quantities"] if foretold else {}
    told = {name: quantities.get(f"pretrain.{name}", {}).get("value") for name in ("step_time", "peak_memory")}
    fullest = max(rank["peak"] for rank in ranks)
    return {"plan": plan.id, "ranks": plan.ranks, "axes": plan.axes | {"ep": plan.mesh.ep}, "rehearsed": ranks, "peak": fullest,
            "fits": fullest <= plan.gpu.memory, "predicted": told}  # fmt: skip


@contextmanager
def _world(plan: Plan, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rehearse(plan: Plan, rank: int, gpu: bool = False) -> Rank:
    """One rank; `gpu` says whose kernels its memory is that of."""
    with _built(plan, rank) as (axes, stages, parts):
        held = [local(p) for part in parts for p in {id(p): p for p in part.parameters()}.values()]
        told = _collectives(plan, axes, parts)
        layers = sorted(int(i) for part in parts for i in part.layers)
        count = sum(p.numel() for p in held)
        return Rank(rank, [s for s in stages if s is not None], layers, count, 4 * 4 * count, _peak(plan, axes, parts, gpu), told)


def collectives(plan: Plan, rank: int) -> list[dict[str, Any]]:
    """What one rank sends in a step; see Rank."""
    fake = _fake(plan)
    with _built(fake, rank) as (axes, _, parts):
        return _collectives(fake, axes, parts)


def peak(plan: Plan, rank: int) -> int:
    """Most bytes that one rank holds at once in a step, with the kernels of the plan's device."""
    fake = _fake(plan)
    with _built(fake, rank) as (axes, _, parts):
        return _peak(fake, axes, parts, plan.gpu.kind != "cpu")


def _fake(plan: Plan) -> Plan:
    return plan.but(gpu=plan.gpu.but(kind="cpu"), train=plan.train.but(compile=False))


@contextmanager
def _built(plan: Plan, rank: int) -> Iterator[tuple[parallel.Axes, Sequence[int | None], list[Decoder]]]:
    """A rank's mesh, and its parts of the model on fake devices."""
    with _world(plan, rank):
        axes = parallel.Axes(plan)
        stages = stages_of(plan, axes.at["pp"]) if axes.pp else [None]
        parts = [laid_out(plan, axes, Timeline(), stage) for stage in stages]
        for part in parts:
            weigh(part, plan.train.global_batch)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for part in parts:
                part.to_empty(device="cpu")
                part.tie()
            yield axes, stages, parts


def _collectives(plan: Plan, axes: parallel.Axes, parts: list[Decoder]) -> list[dict[str, Any]]:
    """The step's collectives: one micro-batch of each kind traced, and counted as often as it comes."""
    calls, sizes = Counter[tuple[str, str, int]](), Counter[tuple[str, str, int]]()
    for times, last in ((min(1, plan.accumulation - 1), False), (plan.accumulation - 2, False), (1, True)):
        if times < 1:
            continue
        with Tally(axes.names) as tally:
            for part in parts:
                _backward(_forward(plan, axes, part, last))
        for key, (number, size) in tally.found.items():
            calls[key] += number * times
            sizes[key] += size * times
    return [{"kind": k, "axis": a, "ranks": n, "calls": calls[k, a, n], "bytes": sizes[k, a, n]} for k, a, n in sorted(calls)]


def _forward(plan: Plan, axes: parallel.Axes, part: Decoder, last: bool) -> torch.Tensor:
    """One micro-batch through a part; `last` is whether its backward pass reduces the gradients."""
    size, tokens = plan.train.micro_batch, plan.train.seq_len // plan.mesh.cp
    dtype = torch.bfloat16 if plan.train.half else torch.float32
    parallel.synchronise(part, last)
    if plan.mesh.pp > 1:  # as torch's pipeline stages do: weights stay gathered until the step's last backward pass
        part.set_reshard_after_backward(last)  # type: ignore[operator]
    targets = torch.zeros(size, tokens, dtype=torch.int64)
    inside = torch.zeros(size, tokens // plan.mesh.tp, plan.model.hidden, dtype=dtype, requires_grad=True)
    out = part(targets if part.embed_tokens is not None else inside)
    return _loss(plan, axes, out, targets) if part.lm_head is not None else out


def _loss(plan: Plan, axes: parallel.Axes, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return loss_sum(logits, targets, axes.tp, plan.train.z_loss) / plan.tokens_per_step


def _backward(out: torch.Tensor) -> None:
    out.backward(None if out.dim() == 0 else torch.zeros_like(out))


def _peak(plan: Plan, axes: parallel.Axes, parts: list[Decoder], gpu: bool) -> int:
    """Most bytes at once in a step: of the trainer's own forward and backward passes in its schedule's order, then of its optimizer.

    The micro-batches that a rank holds at once are rehearsed; later ones hold no more, but for what they are received into.
    """
    optimizer = Optimizer(parts, plan.train)
    optimizer.begin()
    count = plan.accumulation if plan.mesh.pipeline == "gpipe" else min(plan.accumulation, 2 * plan.mesh.pp)
    tokens = torch.zeros(count * plan.train.micro_batch, plan.train.seq_len // plan.mesh.cp, dtype=torch.int64)
    with Ones(), fused() if gpu else nullcontext(), Tracker([*parts, *optimizer.parts]) as tracker:
        if axes.pp is not None:
            lost = partial(_loss, plan, axes)
            Pipeline(parts, plan, axes.pp, tokens.device, Timeline(), lost).step(tokens, tokens, None)
        else:
            for number, micro in enumerate(tokens.split(plan.train.micro_batch), 1):
                parallel.synchronise(parts[0], number == count)
                _loss(plan, axes, parts[0](micro), micro).backward()
        optimizer.step(0.0)
    return tracker.peak() + (plan.accumulation - count) * _received(plan, axes)


def _received(plan: Plan, axes: parallel.Axes) -> int:
    """Bytes that torch's pipeline stages of a rank keep for each micro-batch to receive activations and their gradients into."""
    if axes.pp is None:
        return 0
    last, tokens = plan.mesh.pp * plan.mesh.vpp - 1, plan.train.micro_batch * plan.train.seq_len // (plan.mesh.cp * plan.mesh.tp)
    ends = sum((stage > 0) + (stage < last) for stage in stages_of(plan, axes.pp.rank))
    return ends * tokens * plan.model.hidden * (2 if plan.train.half else 4)


class Tally(TorchDispatchMode):
    """Collectives by kind, axis of the mesh and group size: calls, and bytes of the larger side; a group of one rank sends nothing.

    Messages between pipeline stages are not among them: the stages are rehearsed one after the other.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names  # of the axes, by the name of their group
        self.found: dict[tuple[str, str, int], tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if match := re.match(r"(c10d|_c10d_functional)\.(_?)(all_?gather|reduce_scatter|all_?reduce|all_?to_?all)", str(func)):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            group = _group(args)
            if group is not None and group.size() > 1:
                key = KINDS[match[3]], self.names.get(group.group_name, "other"), group.size()
                calls, size = self.found.get(key, (0, 0))
                self.found[key] = calls + 1, size + max(t.numel() * t.element_size() for t in tensors)
        return out


def _group(args: Any) -> Any:
    """Functional collectives name their group, the others hand it over."""
    for arg in reversed(args):
        if isinstance(arg, str) and arg not in ("sum", "max", "avg"):
            return dist.distributed_c10d._resolve_process_group(arg)  # type: ignore[arg-type]
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in arg._type().name():
            return dist.ProcessGroup.unbox(arg)
    return None


def _spans(numbers: list[int]) -> str:
    """
    >>> _spans([0, 1, 2, 5, 6, 9])
    '0–2, 5–6, 9'
    """
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))


def page(plan: Plan, told: Mapping[str, Any]) -> str:
    """The rehearsal for a person."""
    axes = " × ".join(f"{axis} {size}" for axis, size in told["axes"].items() if size > 1) or "one rank"
    lines = [f"plan {plan.id}: {plan.model.name} on {plan.ranks} × {plan.gpu.name} ({axes}); nothing was run", ""]
    for rank in told["rehearsed"]:
        stages = f"stages {_spans(rank['stages'])}, " if rank["stages"] else ""
        where = f"{stages}layers {_spans(rank['layers'])}"
        lines.append(f"rank {rank['rank']}: {where}")
        lines.append(f"  parameters held   {rank['parameters']:>16,}   state {show(rank['state'], 'B')}")
        lines.append(f"  peak memory       {show(rank['peak'], 'B'):>16}   of {show(plan.gpu.memory, 'B')}")
        lines += [
            f"  {c['kind']:<17} {c['calls']:>10,} calls over {c['ranks']:>4} ranks of {c['axis']:<12} {show(float(c['bytes']), 'B')} a step"
            for c in rank["collectives"]
        ]
    over = float(told["peak"] - plan.gpu.memory)
    lines += ["", "it fits" if told["fits"] else f"it does not fit: {show(over, 'B')} too much on the fullest rank; "
              "raise mesh.dp_shard, mesh.tp or mesh.pp, lower train.micro_batch, or set train.recompute=full"]  # fmt: skip
    step, memory = told["predicted"]["step_time"], told["predicted"]["peak_memory"]
    if step is None:
        return "\n".join([*lines, "predicted step      – (foretold sim with the same words predicts it)"])
    return "\n".join([*lines, f"predicted step      {show(step, 's')}", f"predicted memory    {show(memory, 'B')}"])
