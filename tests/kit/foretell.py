"""What sim says of a configuration, on paper before the configuration runs, and never rewritten."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conf.arithmetic import parameters
from conf.plan import Plan
from sim.align import align, parts
from sim.finetune import finetune
from sim.pace import Pace, pace
from sim.power import Meter
from tests.kit.plans import Row, plan_of

FORETOLD, MEASURED = "foretold.jsonl", "measured.jsonl"
AGAIN = 75  # status of a process that is to be started again for what is left
UNDONE = ("began", "stopped")  # of a row that is to be executed, or executed again
ALIGNING = {"generate_time": "generate", "score_time": "score", "logprob_time": "logprob", "sync_time": "sync"}  # idle and queue: idle


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; a torn last line is none."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Write a row, on disk when this returns; a torn line before it is cut off."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def ended(folder: Path) -> set[tuple[str, str]]:
    """Name and plan of what has a result, whatever it is."""
    return {(row["name"], row["plan"]) for row in read(folder / MEASURED) if row["status"] not in UNDONE}


def foretell(found: Sequence[Row], folder: Path, profile: str = "") -> dict[str, dict[str, Any]]:
    """A prediction of every row, by its name: those on file stay as they are, the others are added."""
    path = folder / FORETOLD
    held = {(row["name"], row["plan"]): row for row in read(path)}
    told = {}
    for row, plan in _plans(found, profile):
        key = row.name, plan.id
        if key not in held:
            held[key] = {"at": now(), "name": row.name, "plan": plan.id, "profile": profile, **predicted(plan)}
            append(path, held[key])
        told[row.name] = held[key]
    return told


def _plans(found: Sequence[Row], profile: str) -> Iterator[tuple[Row, Plan]]:
    return ((row, plan_of(row, profile)) for row in found)


def predicted(plan: Plan) -> dict[str, float]:
    """Step time [s], peak memory [B], energy of the device in a step [J] and MFU of what the plan is run for here."""
    size = float(parameters(plan.model))
    if plan.align.method != "none":
        told, step = align(plan), parts(plan).step
        meter = Meter(plan, step.mix, step.arithmetic, step.stalled)
        busy = sum(told.get(name, 0.0) * meter.device(state) for name, state in ALIGNING.items())
        busy += (told.get("idle_time", 0.0) + told.get("queue_time", 0.0)) * meter.device("idle")
        energy = busy + told["train_time"] * _watts(meter, step)
        return {"step_time": told["step_time"], "memory": told["peak_memory"], "energy": energy, "parameters": size}
    tuned = plan.finetune.method != "none"
    twin = plan.tuned if tuned else plan
    step = pace(twin, tuned and plan.finetune.adapters)
    mfu = finetune(plan)["mfu"] if tuned else step.mfu
    energy = step.step_time * _watts(Meter(twin, step.mix, step.arithmetic, step.stalled), step)
    return {"step_time": step.step_time, "memory": step.memory, "energy": energy, "mfu": mfu, "parameters": size}


def _watts(meter: Meter, step: Pace) -> float:
    """Mean power of a device in a training step."""
    return sum(part * meter.device(state) for state, part in step.mix.items())
