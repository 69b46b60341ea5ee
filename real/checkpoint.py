"""Checkpoints: whole or absent, verified before they are trusted.

A checkpoint is written into a hidden folder, flushed, sealed with a manifest that holds the digest of every file, and
renamed. A folder without its manifest is a torn checkpoint and is never read. Torch's own metadata is a pickle: it is
read only after its digest agrees with a manifest that names this plan.
"""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from conf.errors import Refused
from conf.files import refusal, write
from conf.plan import Plan
from real.initial import canonical
from real.model import Decoder
from real.optim import Optimizer
from real.stage import sha256

# How a full disk shows: plainly, or as a file that torch's writer finds shorter than what it wrote.
SHORT = ("No space left", "File too large", "Disk quota", "unexpected pos")


def save(folder: Path, plan: Plan, parts: Sequence[Decoder], optimizer: Optimizer, step: int) -> int:
    """Save after `step` optimizer steps; all ranks call it. Returns the bytes on disk.

    Raises Refused when the disk is full; the previous checkpoint is untouched.
    """
    final, aside = folder / f"step-{step:08}", folder / f".step-{step:08}"
    first = rank() == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=True)
    barrier()
    try:
        dcp.save(state(parts, optimizer), checkpoint_id=aside, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # torch wraps what each rank met
        if not any(sign in str(error) for sign in SHORT):
            raise
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise refusal(OSError(errno.ENOSPC, ""), aside) from error
    barrier()
    if first:
        _seal(aside, final, plan, step)
        _forget(folder, plan.checkpoint.keep)
    barrier()
    return sum(f.stat().st_size for f in final.iterdir())


def _seal(aside: Path, final: Path, plan: Plan, step: int) -> None:
    files = sorted(p for p in aside.iterdir() if p.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    digests = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    samples = step * plan.train.global_batch
    write(aside / "manifest.json", json.dumps({"plan": plan.id, "step": step, "samples": samples, "files": digests}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)


def _forget(folder: Path, keep: int) -> None:
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """Sealed checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob("step-*/manifest.json"))


def newest(folder: Path, plan: Plan) -> tuple[Path, int, list[str]] | None:
    """The newest checkpoint that is whole and belongs to this plan, its step, and why newer ones were passed over.

    None when there is none at all.

    Raises Refused when checkpoints exist and none can be trusted: it names each with its reason.
    """
    reasons = []
    for path in reversed(complete(folder)):
        reason, manifest = check(path, plan)
        if reason is None:
            return path, int(manifest["step"]), reasons
        reasons.append(f"{path}: {reason}")
    if reasons:
        raise Refused(*(f"{reason}; delete it to start without it" for reason in reasons))
    return None


def check(path: Path, plan: Plan) -> tuple[str | None, dict[str, Any]]:
    """Why a checkpoint cannot be used, or None; and its manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files, owner = manifest["files"], manifest["plan"]
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest is corrupt ({error})", {}
    if owner != plan.id:
        return f"it belongs to plan {owner}, this is plan {plan.id}; a checkpoint goes on only under its own plan", manifest
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", manifest
        if file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
            return f"{name} is corrupt: its digest differs from the manifest's", manifest
    return None, manifest


def load(path: Path, parts: Sequence[Decoder], optimizer: Optimizer, step: int) -> None:
    """Fill model and optimizer, bit for bit, on this mesh, whichever mesh wrote them."""
    optimizer.begin()
    dcp.load(state(parts, optimizer), checkpoint_id=path, no_dist=not dist.is_initialized())
    for _, _, moments in optimizer.state():
        for key, value in moments.items():
            if key == "step":
                moments[key] = torch.full_like(value, float(step)) if isinstance(value, Tensor) else step


def state(parts: Sequence[Decoder], optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor that a run goes on from, by name; shards of a parameter are DTensors, so that any mesh can read them."""
    found = {f"model.{canonical(part, name)}": p.detach() for part in parts for name, p in part.named_parameters()}
    found |= {f"model.{name}": b for part in parts for name, b in part.named_buffers() if name.endswith("correction_bias")}
    for name, parameter, moments in optimizer.state():
        found |= {f"optimizer.{name}.{key}": _like(value, parameter) for key, value in moments.items() if key != "step"}
    return found


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment, laid out over the ranks as its parameter is."""
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
