"""A pair: what was foretold and what was seen of one plan, read back from its two records.

Either half may be missing, and the measured half may have stopped in the middle; what is there is read as far as it got.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from conf.errors import Refused, nearest
from conf.plan import Plan
from conf.program import from_yaml
from conf.record import QUANTITIES, Value, read_all, read_summary, state_totals

RUN = "foretold sim && foretold real"
_NEEDED = {"ledger": ("at", "stage", "quantity"), "events": ("at", "stage", "event")}


@dataclass(frozen=True)
class Side:
    """One record: its summary, and the ledger and events behind it."""

    folder: Path
    quantities: Mapping[str, Value]
    ledger: list[dict[str, Any]]
    events: list[dict[str, Any]]
    finished: bool
    written: float  # seconds since the epoch

    @property
    def states(self) -> dict[str, float]:
        """Rank-seconds by state."""
        return state_totals(self.ledger)

    @property
    def last_step(self) -> int:
        """The last step of pre-training that was observed, 0 before the first."""
        return int(max((step for step, _ in self.series("pretrain", "step_time")), default=0))

    def value(self, name: str) -> float | None:
        found = self.quantities.get(name)
        return found.value if found else None

    def series(self, stage: str, quantity: str) -> list[tuple[float, float]]:
        """(step, value) as the first rank saw it; a step that was done twice counts as done last."""
        rows = [r for r in self.ledger if r["stage"] == stage and r["quantity"] == quantity and r.get("step") is not None]
        first = min((row.get("rank") or 0 for row in rows), default=0)
        mine = sorted((r for r in rows if (r.get("rank") or 0) == first), key=lambda row: float(row["at"]))
        return sorted({float(row["step"]): float(row["value"]) for row in mine}.items())

    @property
    def wall_clock(self) -> float | None:
        """When the run ended by its own clock, which its states must add up to."""
        ends = [float(e["at"]) for e in self.events if e["stage"] == "run" and e["event"] == "end"]
        return max(ends, default=self.value("run.wall_clock"))


@dataclass(frozen=True)
class Pair:
    id: str
    folder: Path
    plan: Plan
    sim: Side | None
    real: Side | None

    @property
    def sides(self) -> list[Side]:
        return [side for side in (self.sim, self.real) if side]


def open_pair(runs: str, plan: str) -> Pair:
    """The records of a plan under the folder `runs`; no plan named means the newest.

    Raises Refused when there is nothing to read, or when what is there is corrupt.
    """
    folder = _named(Path(runs), plan) if plan else _newest(Path(runs))
    (sim_id, sim), (real_id, real) = _side(folder / "sim"), _side(folder / "real")
    if sim is None and real is None:
        raise Refused(f"{folder} holds neither a prediction nor a measurement; run: {RUN}")
    if sim_id and real_id and sim_id != real_id:
        raise Refused(f"{folder / 'sim'} is of plan {sim_id}, but {folder / 'real'} is of plan {real_id}; delete one and run it again")
    return Pair(sim_id or real_id or folder.name, folder, _plan(folder), sim, real)


def _named(runs: Path, plan: str) -> Path:
    folder = runs / plan
    if not folder.is_dir():
        known = [found.name for found in _plans(runs)]
        cure = nearest(plan, known) if known else f"there is none; run: {RUN}"
        raise Refused(f"plan={plan} has no record under {runs}; {cure}")
    return folder


def _newest(runs: Path) -> Path:
    """The plan that was measured last or, when none was measured to its end, written last."""
    finished = {path.parent.parent: path.stat().st_mtime for path in runs.glob("*/real/summary.json")}
    ages = finished or {folder: max(p.stat().st_mtime for p in folder.glob("*/*")) for folder in _plans(runs)}
    if not ages:
        raise Refused(f"runs={runs} holds no record; run: {RUN}, or name the folder with runs=DIR")
    return max(ages, key=lambda folder: (ages[folder], folder.name))


def _plans(runs: Path) -> list[Path]:
    return sorted({path.parent.parent for side in ("sim", "real") for path in runs.glob(f"*/{side}/*")})


def _side(folder: Path) -> tuple[str | None, Side | None]:
    """The plan's id and the record in a folder; (None, None) when nothing was recorded."""
    summary = read_summary(folder)
    ledger, events = _rows(folder, "ledger"), _rows(folder, "events")
    if summary is None and not ledger and not events:
        return None, None
    files = [folder / "summary.json"] if summary else [*folder.glob("ledger*"), *folder.glob("events*")]
    side = Side(folder, {}, ledger, events, summary is not None, max(path.stat().st_mtime for path in files))
    quantities = _quantities(folder / "summary.json", summary) if summary else _so_far(side)
    return (str(summary["plan"]) if summary else None), replace(side, quantities=quantities)


def _rows(folder: Path, file: str) -> list[dict[str, Any]]:
    """The rows of a ledger or of the events, without values that were not finite, which a record keeps as null."""
    try:
        rows = read_all(folder, file)
    except ValueError as error:
        raise Refused(f"{folder}: a line of its {file} is corrupt ({error}); delete the folder and run again") from error
    for row in rows:
        if not isinstance(row, dict) or any(row.get(name) is None for name in _NEEDED[file]):
            raise Refused(f"{folder}: a row of its {file} is not one of foretold ({_short(row)}); delete the folder and run again")
    return [row for row in rows if row.get("value", 0.0) is not None]


def _short(row: Any) -> str:
    return json.dumps(row, default=str)[:80]


def _quantities(path: Path, summary: Mapping[str, Any]) -> dict[str, Value]:
    found = {}
    try:
        for name, told in summary["quantities"].items():
            value = Value(float(told["value"]), _finite(told.get("low")), _finite(told.get("high")))
            if math.isfinite(value.value) and unit_of(name) is not None:
                found[name] = value
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{path} is no summary of a run ({type(error).__name__}: {error}); delete it and run again") from error
    return found


def _finite(number: Any) -> float | None:
    return float(number) if number is not None and math.isfinite(float(number)) else None


def unit_of(name: str) -> str | None:
    """The unit of a quantity named <stage>.<quantity>, or None for a name that the record does not know."""
    return QUANTITIES.get(name.partition(".")[2], (None,))[0]


def _so_far(side: Side) -> dict[str, Value]:
    """What the ledger of a run that has no summary says: the median step until it stopped."""
    times = [seconds for _, seconds in side.series("pretrain", "step_time")]
    return {"pretrain.step_time": Value(median(times))} if times else {}


def _plan(folder: Path) -> Plan:
    paths = [path for path in (folder / "sim" / "plan.yaml", folder / "real" / "plan.yaml") if path.is_file()]
    if not paths:
        raise Refused(f"{folder} has no plan.yaml, neither in sim nor in real; delete the folder and run: {RUN}")
    try:
        return from_yaml(paths[0])
    except (Refused, yaml.YAMLError) as error:
        why = " ".join(str(error).replace(f"{paths[0]}: ", "").split())
        raise Refused(f"{paths[0]} is no plan of this version of foretold ({why}); delete {paths[0].parent} and run it again") from error
