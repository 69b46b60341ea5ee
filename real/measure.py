"""`foretold real only=kernels,network`: this machine's operations and collectives, as tables."""

import csv
import io
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.files import write
from conf.plan import Plan
from conf.record import Record
from real import kernels, network
from real.cluster import rank


def measure(plan: Plan, folder: Path, names: tuple[str, ...], epoch: float, launched: float) -> None:
    """Time on all ranks at once; the first rank writes the mean over the ranks."""
    record = Record(folder, rank(), began=time.time() - epoch)
    record.observe("measure", "init", record.now() - launched)
    record.flush()
    if "kernels" in names:
        _save(folder / "kernels.csv", list(kernels.rows(plan, folder)), "operations")
    if "network" in names:
        _save(folder / "network.csv", list(network.rows(plan)), "collectives")


def _save(path: Path, mine: list[dict[str, Any]], what: str) -> None:
    tables = [mine]
    if dist.is_initialized():
        tables = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(tables, mine)
    if rank():
        return
    rows = [
        row | {"time_us": statistics.fmean(other["time_us"] for other in same)}
        for row, same in zip(mine, zip(*tables, strict=True), strict=True)
    ]
    write(path, to_csv(rows))
    print(f"timed {len(rows)} {what}: {path}", flush=True)


def to_csv(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else ["op"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
