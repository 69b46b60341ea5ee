"""The collectives of a training step, timed: raw rows for `foretold analysis calibrate`.

Bus bandwidth as in nccl-tests: bytes that cross the busiest link over the time, with bytes the full tensor's size.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from conf.plan import Plan
from real.cluster import device
from real.parallel import gather, scatter, watch
from real.timeline import Timeline

Row = dict[str, Any]
UNITS = 8
SIZES = (4096, 65536, 524288, 2 << 20, 8 << 20, 32 << 20)


def rows(plan: Plan) -> Iterator[Row]:
    """One row a collective and size; none for a rank alone."""
    ranks, cuda = plan.ranks, plan.gpu.kind == "cuda"
    if ranks == 1:
        return
    where = device(plan)
    for size in SIZES:
        whole = torch.zeros(size // 4 // ranks * ranks, device=where)
        part, other = torch.zeros(whole.numel() // ranks, device=where), torch.empty_like(whole)
        works: dict[str, Callable[[], Any]] = {
            "all_gather": lambda w=whole, p=part: gather(w, p),
            "reduce_scatter": lambda w=whole, p=part: scatter(p, w),
            "all_reduce": lambda w=whole: dist.all_reduce(w),
            "all_to_all": lambda w=whole, o=other: dist.all_to_all_single(o, w),
        }
        for op, work in works.items():
            seconds = _together(work, cuda)
            crossed = size * (ranks - 1) / ranks * (2 if op == "all_reduce" else 1)
            yield {"op": op, "gpu": plan.gpu.name, "ranks": ranks, "nodes": plan.cluster.nodes, "bytes": size,
                   "time_us": seconds * 1e6, "busbw_GBps": crossed / seconds / 1e9}  # fmt: skip
    for width in (64, 512, 1024):
        yield _unit(plan, width, where, cuda)


def _together(work: Callable[[], Any], cuda: bool) -> float:
    """Seconds of a call when the ranks come to it from some milliseconds of work, as in training: they arrive apart, and
    the one that waits must be woken."""
    busy = torch.randn(512, 512, device="cuda" if cuda else "cpu")
    for _ in range(3):
        work()
    dist.barrier()
    times = []
    for _ in range(15):
        for _ in range(3):
            busy @ busy
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.fmean(times)


def _unit(plan: Plan, width: int, where: torch.device, cuda: bool) -> Row:
    """What sharding adds to a unit's forward and backward besides its collectives: hooks, and copies in and out of flat buffers."""
    timeline = Timeline(cuda)

    def cost(sharded: bool) -> float:
        layers = nn.Sequential(*(nn.Linear(width, width, bias=False, device=where) for _ in range(UNITS)))
        if sharded:
            for layer in (*layers, layers):
                fully_shard(layer)
            watch(layers, plan, timeline)
        x = torch.zeros(1, width, device=where)
        times = []
        for _ in range(12):
            timeline.close()
            layers(x).sum().backward()
            seconds, states = timeline.close()
            times.append(seconds - states.get("communication", 0.0))
        return statistics.median(times[2:]) / UNITS

    return {"op": "shard_unit", "gpu": plan.gpu.name, "ranks": plan.ranks, "nodes": plan.cluster.nodes, "bytes": 4 * width * width,
            "time_us": max(1e-6, cost(True) - cost(False)) * 1e6, "busbw_GBps": None}  # fmt: skip
