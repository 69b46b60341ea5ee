"""`foretold real only=kernels,network`: this machine's operations and collectives, as tables."""

import csv
import io
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.distributed as dist

from conf.files import write
from conf.plan import Plan
from conf.record import Record
from real import gpu, kernels, network, optim, storage
from real.cluster import rank
from real.heartbeat import clock
from real.kernels import Row
from real.parallel import Axes
from real.pipeline import stages_of
from real.resume import led
from real.timeline import Timeline
from real.trainer import filled

ROUNDS = 2


def measure(plan: Plan, folder: Path, names: tuple[str, ...], epoch: float, launched: float) -> None:
    """Time on all ranks at once; the first rank writes the mean over the ranks."""
    record = Record(folder, rank(), began=clock(plan) - epoch)
    _built(plan)
    record.observe("measure", "init", record.now() - launched)
    record.flush()
    if "kernels" in names and plan.gpu.kind == "cuda":
        _alone(plan, folder)
    elif "kernels" in names:
        tables = [_typical([*_operations(plan)] for _ in range(ROUNDS)), _typical([*storage.rows(plan, folder)] for _ in range(ROUNDS))]
        _save(folder / "kernels.csv", [row for table in tables for row in table], "operations")
    if "network" in names:
        _save(folder / "network.csv", _typical([*network.rows(plan)] for _ in range(ROUNDS)), "collectives")


def _operations(plan: Plan) -> Iterator[Row]:
    """The operations on as many ranks at once as there are cores; others would only wait for a core, which sim counts by itself."""
    cores = plan.cluster.cores_per_node * plan.cluster.nodes if plan.gpu.kind == "cpu" else plan.ranks
    crew = dist.new_group(range(min(cores, plan.ranks))) if dist.is_initialized() else None
    if rank() < cores:
        yield from kernels.rows(plan, crew)


def _alone(plan: Plan, folder: Path) -> None:
    """One GPU is measured while the others wait, since they share nothing of what is timed; checkpoints are all ranks' together."""
    if not led(lambda: gpu.measure(plan, folder)):
        gpu.save(plan, folder, rank() == 0)


def _built(plan: Plan) -> None:
    """What the start of a training builds before its first step: model, initial weights, optimizer."""
    axes = Axes(plan) if dist.is_initialized() else None
    stages = stages_of(plan, axes.pp.rank) if axes and axes.pp else [None]
    optim.Optimizer(filled(plan, axes, Timeline(plan.gpu.kind == "cuda"), stages), plan.train)


def _typical(rounds: Iterable[list[Row]]) -> list[Row]:
    """The mean over rounds and over the ranks that have rows: a machine shared with others is faster in one second than in the next."""
    mine = [table for table in rounds if table]
    tables = [mine]
    if dist.is_initialized():
        tables = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(tables, mine)
    return [_mean(same) for same in zip(*(table for tables_of_one in tables for table in tables_of_one), strict=True)]


def _save(path: Path, rows: list[Row], what: str) -> None:
    if rank() == 0:
        write(path, to_csv(rows))
        print(f"timed {len(rows)} {what}: {path}", flush=True)


def _mean(same: tuple[Row, ...]) -> Row:
    numbers = {name: [row[name] for row in same] for name in ("time_us", "cv", "busbw_GBps") if isinstance(same[0].get(name), float)}
    return same[0] | {name: statistics.fmean(values) for name, values in numbers.items()}


def to_csv(rows: Iterable[Row]) -> str:
    rows = list(rows)
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else ["op"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
