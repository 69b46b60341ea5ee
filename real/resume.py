"""Where a run goes on: its own newest checkpoint, else another run's, or a model of another program."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.errors import Refused
from conf.plan import Plan
from conf.record import Record
from real import checkpoint, huggingface, tiers
from real.cluster import rank
from real.trainer import Trainer

STAGE = "pretrain"


def resume(plan: Plan, trainer: Trainer, folder: Path, source: Path | None, record: Record) -> int:
    """Load the newest checkpoint of this plan, else what the run is to start from; returns the steps that it holds."""
    found = led(lambda: tiers.newest(plan, folder) or _elsewhere(plan, source))
    if found is None:
        return 0
    path, step, passed_over = found
    with trainer.timeline.during("load"):
        if path.name.startswith("step-"):
            checkpoint.load(path, trainer.parts, trainer.optimizer, step)
        else:
            huggingface.load(path, plan.model, trainer.parts)
    record.event(STAGE, "restart", step, checkpoint=path.name, passed_over=passed_over)
    if rank() == 0:
        for reason in passed_over:
            print(f"passed over: {reason}", flush=True)
        print(f"resumed from {path.name}" if source is None or path.parent.parent == folder else f"started from {path}", flush=True)
    return step


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
