"""The operations of a GPU, timed one after another into a table that grows: raw rows for `foretold analysis calibrate`.

All kinds of operations take turns, each with its sizes mixed, so that any first part of the table is a calibration. A row is written
when it is measured; a command that was cut, or that ran out of time, goes on where the table ends. Nothing is fitted here.
"""

import csv
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from conf.plan import Plan
from real import nvml, passes, products, storage, watts
from real.cluster import device
from real.kernels import COLUMNS, Row, row
from real.products import Task
from real.stopwatch import Stopwatch

FIELDS = ("gpu", "precision", "ranks", "op", "stage", "how", *COLUMNS, "watts", "time_us")
TABLE = "gpu.csv"
LIMIT = 420.0  # s of one command
CHECKPOINTS = ((2, 64), (120, 512), (8, 4096))  # tensors and their width; the last is 0.5 GB


def measure(plan: Plan, folder: Path, watch: Stopwatch | None = None, limit: float = LIMIT) -> int:
    """Measure what the table in the folder does not have yet, as far as time allows; returns how much is left."""
    path, began = folder / TABLE, time.monotonic()
    where = device(plan)
    watch = watch or Stopwatch(where)
    known, asked = done(path), tasks(plan, where, folder)
    left = [task for task in asked if task.key not in known]
    count = len(left)
    if nvml.joules(where) is None:
        print(watts.NONE, flush=True)
    if left:
        watch.warm()
    while left and time.monotonic() - began < limit:
        task = left.pop(0)
        append(path, line(plan, task, _run(task, watch)))
    print(f"timed {count - len(left)} operations, {len(asked) - len(left)} of {len(asked)} are known: {path}", flush=True)
    if left:
        print(f"{len(left)} are left: the same command goes on", flush=True)
    return len(left)


def save(plan: Plan, folder: Path, first: bool) -> None:
    """Checkpoints, which all ranks save together, where the table has none; the first rank writes the rows."""
    path = folder / TABLE
    if all(key[0] != "storage" for key in done(path)):
        shapes = CHECKPOINTS if plan.gpu.kind == "cuda" else CHECKPOINTS[:1]
        found = list(storage.rows(plan, folder, shapes))
        for each in found if first else ():
            append(path, each | {"how": ""})


def tasks(plan: Plan, where: torch.device, folder: Path) -> list[Task]:
    """All kinds, each evenly over the whole; launches come first, because all else rests on them."""
    kinds = (products.products, products.mixtures, passes.attentions, passes.moving, passes.copies)
    rest = [list(kind(where)) for kind in kinds]
    for kind_of_plan in (passes.updates, passes.blocks, passes.decodes):
        rest.append(list(kind_of_plan(plan, where)))
    rest.append(list(watts.phases(plan, where, folder)))
    return [*passes.launches(plan, where), *_in_turns(rest)]


def _in_turns(kinds: Sequence[Sequence[Task]]) -> list[Task]:
    placed = [((place + 0.5) / len(kind), number, task) for number, kind in enumerate(kinds) for place, task in enumerate(kind)]
    return [task for *_, task in sorted(placed, key=lambda at: at[:2])]


def _run(task: Task, watch: Stopwatch) -> dict[str, float]:
    """What was measured; nothing where the device has no such kernel or not enough memory, which is not tried again."""
    for again in (True, False):
        try:
            watch.lead()
            return task.run(watch)
        except RuntimeError as error:
            if watch.cuda:
                torch.cuda.empty_cache()
            if again and isinstance(error, torch.OutOfMemoryError):
                continue  # in the way was what earlier tasks left behind
            print(f"{' '.join(filter(None, task.key))}: {str(error).splitlines()[0]}", flush=True)
            break
    return {}


def line(plan: Plan, task: Task, found: dict[str, float]) -> Row:
    base = row(plan, task.op, task.stage, task.shape, 0.0)
    return base | {"precision": task.precision, "how": task.how, "watts": None, "time_us": None} | found


def append(path: Path, found: Row) -> Row:
    """Add a row to a table, which gets its head with the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not file.tell():
            table.writeheader()
        table.writerow(found)
    return found


def done(path: Path) -> set[tuple[str, ...]]:
    """Keys of the rows that a table has; a last line that was cut is taken away."""
    if not path.is_file():
        return set()
    text = path.read_text()
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    with path.open(newline="") as file:
        return {_key(found) for found in csv.DictReader(file)}


def _key(found: dict[str, Any]) -> tuple[str, ...]:
    sizes: Iterable[str] = (f"{name}={found[name]}" for name in sorted(COLUMNS) if name != "cv" and found[name])
    return (found["op"], found["stage"], found["precision"], found["how"], *sizes)
