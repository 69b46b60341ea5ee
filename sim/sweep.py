"""Many plans at once: points of a sweep predicted one by one, or thousands in closed form, into one table."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from conf.errors import Refused
from conf.files import commit, write
from conf.plan import Plan
from conf.program import load, vary
from conf.record import QUANTITIES
from conf.schema import keys
from conf.sweep import bare, deal, varied
from conf.units import show
from sim.align import align
from sim.expect import expected
from sim.finetune import finetune
from sim.pace import paces

Row: TypeAlias = dict[str, Any]  # point, the varied overrides, plan, then quantities; or problem
SHOWN = ("pretrain.step_time", "pretrain.mfu", "pretrain.peak_memory", "run.wall_clock", "run.tokens", "run.ettr", "run.cost",
         "run.carbon_location")  # fmt: skip
OF_STAGE = {"align": ("align.step_time", "align.tokens_per_s_per_gpu", "align.generator_utilisation", "align.trainer_utilisation",
                      "align.tail", "align.staleness_mean", "align.trainer_memory", "align.generator_memory", "align.cost_per_thousand",
                      "align.goodput"),
            "finetune": ("finetune.step_time", "finetune.mfu", "finetune.peak_memory", "finetune.seconds", "finetune.cost")}  # fmt: skip
LINES = 40  # points that are printed; the table file holds all


@dataclass(frozen=True)
class Task:
    """One point where it runs: predicts it and leaves its row as a file. It never raises, so the others go on."""

    folder: Path
    base: str  # a plan file, or empty
    count: int
    predict: Callable[[Plan], Mapping[str, Any]]  # → summary

    def __call__(self, number: int, overrides: list[str]) -> None:
        try:
            told = self.predict(load(overrides, self.base))
            row = {"plan": told["plan"]} | {name: q["value"] for name, q in told["quantities"].items()}
        except Refused as refused:
            row = {"problem": "; ".join(refused.problems)}
        write(self.folder / f"{number}.json", json.dumps({"point": number} | row))
        done = len(list(self.folder.glob("*.json")))
        start, end = ("\r\033[K", "" if done < self.count else "\n") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{done} of {self.count} points", end=end, file=sys.stderr, flush=True)


def name_of(points: Sequence[Sequence[str]], base: str) -> str:
    """A name for these points: a digest that starts with a letter."""
    return "s" + hashlib.blake2b(json.dumps([list(map(list, points)), base]).encode(), digest_size=5).hexdigest()


def dealt(points: Sequence[list[str]], task: Task, settings: Sequence[str]) -> list[Row]:
    """Every point simulated, in order or by the launcher that `settings` name."""
    for old in task.folder.glob("*.json"):
        old.unlink()
    deal(points, task, settings, str(task.folder))
    rows = {int(row["point"]): row for path in task.folder.glob("*.json") for row in [json.loads(path.read_text())]}
    return [rows.get(i, {"point": i, "problem": "it ended without a result; see its worker's output"}) for i in range(len(points))]


def closed(points: Sequence[list[str]], base: str) -> list[Row]:
    """Every point in closed form, in this process."""
    moving = {name for name in varied(points) if name in keys()}
    compose: dict[tuple[str, ...], Plan | None] = {}
    plans: list[Plan] = []
    rows: list[Row] = []
    for number, point in enumerate(points):
        try:
            plans.append(_plan(point, moving, base, compose))
            rows.append({"point": number, "plan": ""})
        except Refused as refused:
            rows.append({"point": number, "problem": "; ".join(refused.problems)})
    good = iter(zip(plans, paces(plans), strict=True) if plans else ())
    for row in rows:
        if "problem" not in row:
            plan, pace = next(good)
            row |= {"plan": plan.id} | expected(plan, pace)
            row |= {f"{stage.__name__}.{name}": value for stage in (finetune, align) for name, value in stage(plan).items()}
    return rows


def _plan(point: Sequence[str], moving: set[str], base: str, compose: dict[tuple[str, ...], Plan | None]) -> Plan:
    """A point's plan: its groups composed once for all points that share them, its moving keys set on that."""
    split = [word.partition("=") for word in point]
    still = tuple(f"{name}={value}" for name, _, value in split if name not in moving)
    if still not in compose:
        try:
            compose[still] = load(still, base)
        except Refused:  # perhaps whole only with its moving keys
            compose[still] = None
    whole = compose[still]
    if whole is None:
        return load(point, base)
    return vary(whole, {name: bare(value) for name, _, value in split if name in moving})


def table(points: Sequence[Sequence[str]], rows: Sequence[Row]) -> pd.DataFrame:
    """One line a point: its number, the varied overrides (numbers as such), plan, quantities, problem."""
    names = varied(points)
    chosen = [{name: _number(value) for name, _, value in (word.partition("=") for word in point) if name in names} for point in points]
    frame = pd.DataFrame([{"point": row["point"]} | choice | row for choice, row in zip(chosen, rows, strict=True)])
    frame["problem"] = frame.get("problem")
    for name in names:  # a column of one type, which Parquet can hold
        if frame[name].map(type).nunique() > 1:
            frame[name] = frame[name].map(lambda value: None if value is None else str(value))
    return frame


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return bare(text)


def save(frame: pd.DataFrame, path: Path) -> None:
    commit(path, lambda temporary: frame.to_parquet(temporary, index=False))


def told(frame: pd.DataFrame, names: Sequence[str]) -> str:
    """The table for a person; points that were passed over at its end, once for each problem."""
    good = frame[frame["problem"].isna()]
    shown = [name for name in _shown(names) if name in good and good[name].notna().any()]
    columns = [*names, *shown]
    lines = [[name.split(".")[-1].replace("_", " ") if name in shown else name for name in columns]]
    lines += [
        [_cell(name, value) for name, value in zip(columns, row, strict=True)] for row in good[columns].head(LINES).itertuples(index=False)
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if len(good) > LINES:
        text.append(f"… and {len(good) - LINES:,} more in the file")
    bad = frame[frame["problem"].notna()]
    text += ["", f"{len(bad):,} of {len(frame):,} points were passed over:"] * (len(bad) > 0)
    for problem, same in bad.groupby("problem", sort=False):
        where = ", ".join(f"{name}={same.iloc[0][name]}" for name in names)
        text.append(f"  {where}{f' and {len(same) - 1:,} more' if len(same) > 1 else ''}: {problem}")
    return "\n".join(text)


def _shown(names: Sequence[str]) -> Sequence[str]:
    """Quantities of the stage whose keys alone are varied, or of the run."""
    varied_stages = {name.partition(".")[0] for name in names}
    return OF_STAGE.get(varied_stages.pop(), SHOWN) if len(varied_stages) == 1 else SHOWN


def _cell(name: str, value: Any) -> str:
    if name.partition(".")[2] not in QUANTITIES:
        return str(value)
    unit = QUANTITIES[name.split(".")[1]][0]
    return show(float(value), "1" if unit in ("count", "h") else unit)


def run(points: Sequence[list[str]], options: Mapping[str, str], predict: Callable[..., Any], settings: Sequence[str], fast: bool,
        lives: int) -> tuple[pd.DataFrame, Path]:  # fmt: skip
    """Predict all points and write `points.parquet`; returns the table and where it lies."""
    folder = Path(options["runs"]).resolve() / "sweeps" / name_of(points, options["plan"])
    if fast:
        rows = closed(points, options["plan"])
    else:
        one = partial(_predict, predict, Path(options["runs"]).resolve(), lives)
        rows = dealt(points, Task(folder / "points", options["plan"], len(points), one), settings)
    frame, path = table(points, rows), folder / "points.parquet"
    save(frame, path)
    return frame, path


def _predict(predict: Callable[..., Mapping[str, Any]], runs: Path, lives: int, plan: Plan) -> Mapping[str, Any]:
    return predict(plan, runs / plan.id / "sim", lives)
