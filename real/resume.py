"""Where a run goes on: its own newest checkpoint, else another run's, or a model of another program."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from conf.errors import Refused
from conf.plan import Plan
from conf.record import Record
from real import checkpoint, huggingface, tiers
from real.buddy import Buddy
from real.cluster import rank
from real.trainer import Trainer

STAGE = "pretrain"


class Copy(NamedTuple):
    """A state that a run can go on from."""

    name: str
    step: int
    passed_over: list[str]  # newer ones that cannot be trusted, each with its reason
    path: Path  # of a checkpoint, or of what the servers keep for each other
    buddy: Buddy | None = None  # who keeps that
    givers: tuple[int, ...] = ()  # and who gives each rank its shards


def newest(plan: Plan, folder: Path, buddies: Sequence[Buddy] = (), most: float = math.inf, source: Path | None = None) -> Copy | None:
    """The newest sound copy of any tier, of at most so many steps; else what another run, or another program, has left."""
    found = led(lambda: tiers.newest(plan, folder, most) or _elsewhere(plan, source))
    best = Copy(found[0].name, found[1], found[2], found[0]) if found else None
    for buddy in reversed(buddies):  # of equal steps the quickest tier's
        near = buddy.newest(most)
        if near and (best is None or near[0] >= best.step):
            best = Copy(f"{buddy.name}, step {near[0]}", near[0], [], buddy.folder, buddy, tuple(near[1]))
    return best


def fill(copy: Copy, plan: Plan, trainer: Trainer) -> None:
    """Model and optimizer from a copy."""
    buddy = copy.buddy
    with trainer.timeline.during("load"):
        if buddy is not None:
            checkpoint.restore(trainer.parts, trainer.optimizer, copy.step, lambda into: buddy.load(into, copy.step, copy.givers))
        elif copy.path.name.startswith("step-"):
            checkpoint.load(copy.path, trainer.parts, trainer.optimizer, copy.step)
        else:
            huggingface.load(copy.path, plan.model, trainer.parts)


def resume(plan: Plan, trainer: Trainer, folder: Path, source: Path | None, record: Record, buddies: Sequence[Buddy] = ()) -> int:
    """Load the newest copy of this plan, else what the run is to start from; returns the steps that it holds."""
    copy = newest(plan, folder, buddies, source=source)
    if copy is None:
        return 0
    fill(copy, plan, trainer)
    record.event(STAGE, "restart", copy.step, checkpoint=copy.name, passed_over=copy.passed_over)
    if rank() == 0:
        for reason in copy.passed_over:
            print(f"passed over: {reason}", flush=True)
        elsewhere = source and copy.buddy is None and copy.path.parent.parent != folder
        print(f"started from {copy.path}" if elsewhere else f"resumed from {copy.name}", flush=True)
    return copy.step


def _elsewhere(plan: Plan, source: Path | None) -> tuple[Path, int, list[str]] | None:
    """What another run, or another program, has left."""
    if source is None:
        return None
    if (source / "config.json").is_file():
        huggingface.refuse_other(source, plan.model)
        return source, 0, []
    path, manifest = checkpoint.find(source)
    step = plan.step_of(manifest["samples"])
    if step is None:
        have = f"{path} has seen {manifest['samples']} sequences"
        raise Refused(f"{have}, inside a step of train.global_batch={plan.train.global_batch}; set a batch that divides them")
    return path, step, []


def led(work: Callable[[], Any]) -> Any:
    """What the first rank finds, on every rank; what it refuses, all refuse."""
    told: list[Any] = [None]
    if rank() == 0:
        try:
            told = [work()]
        except Refused as refused:
            told = [refused]
    if dist.is_initialized():
        dist.broadcast_object_list(told, 0)
    if isinstance(told[0], Refused):
        raise told[0]
    return told[0]
