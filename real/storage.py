"""Checkpoints of several sizes, saved and read back as a run does it: raw rows for `foretold analysis calibrate`.

All ranks save together, so the times hold what they say to each other: a save costs something by itself, something a tensor
(planning, a header each) and something a byte.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from conf.errors import Refused
from conf.plan import Plan
from real import checkpoint
from real.cluster import device
from real.kernels import Row, row
from real.resume import led

SHAPES = ((2, 64), (30, 128), (120, 128), (30, 640))  # tensors and their width
REPEATS = 4  # the first warms up


def rows(plan: Plan, folder: Path, shapes: Sequence[tuple[int, int]] = SHAPES) -> Iterator[Row]:
    """A save and a load of each shape; `m` is the number of tensors, `bytes` their sum over all ranks."""
    where, plan = device(plan), plan.but(**{"checkpoint.asynchronous": False})
    mesh = init_device_mesh(where.type, (plan.ranks,)) if dist.is_initialized() else None
    for count, width in shapes:
        lines = -(-width // plan.ranks)
        tensors = {f"tensor.{i}": _shard(torch.randn(lines, width, device=where), mesh) for i in range(count)}
        writer = checkpoint.Writer(folder / f"timed-{count}-{width}", plan)
        saves = [_seconds(writer.save, tensors, step) for step in range(REPEATS)]
        loads = [_seconds(_load, tensors, writer.folder, plan) for _ in range(REPEATS)]
        shape = {"m": count, "bytes": count * lines * width * 4 * plan.ranks}
        yield row(plan, "storage", "save", shape, statistics.median(saves[1:]))
        yield row(plan, "storage", "load", shape, statistics.median(loads[1:]))
        _together()
        shutil.rmtree(writer.folder, ignore_errors=True)


def _shard(part: Tensor, mesh: DeviceMesh | None) -> Tensor:
    return part if mesh is None else DTensor.from_local(part, mesh, [Shard(0)])


def _load(into: dict[str, Tensor], folder: Path, plan: Plan) -> None:
    """As a run resumes: the first rank verifies, all read."""

    def newest() -> Path:
        path = checkpoint.complete(folder)[-1]
        if reason := checkpoint.check(path, plan)[0]:
            raise Refused(f"{path}: {reason}; measure again")
        return path

    path = led(newest)
    checkpoint.shapes(path)
    checkpoint.read(into, path)


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    _together()
    began = time.perf_counter()
    work(*arguments)
    _together()
    return time.perf_counter() - began


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()
