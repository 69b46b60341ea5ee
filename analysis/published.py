"""Published measurements predicted row by row with the calibration that ships in conf, and the errors told by group.

Tables are recognised by their columns: training steps (with peak memory where it was measured), efficiencies of kernels,
times of collectives (of which all-reduces alone are validated), power of servers, energy and carbon of trainings, fine-tunings. A row that
cannot be predicted is told with its reason.
"""

import json
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import alone, claims, nodes, replay, tunings
from analysis.compare import columns as aligned
from analysis.rows import Replayed
from conf.errors import Refused
from conf.files import commit, write
from conf.program import flag
from sim.network import VALIDATED

OPTIONS = {
    "table": ("step_time", "CSV file of measured rows, or the name of one that ships: step_time, node_power, energy"),
    "out": ("", "CSV file to write: id, published, predicted, error"),
    "figure": ("", "PNG file to write: predicted against published"),
    "json": ("false", "print one JSON object instead of a table"),
}
FIGURES = ("mean_abs_pct", "median_abs_pct", "p95_abs_pct", "bias_pct", "coverage_80", "baseline_mean_abs_pct", "baseline_median_abs_pct")
FACTS = Path(__file__).parent / "facts"
BAND = 1.2816  # standard deviations within which 80% of a normal distribution lie


class Kind(NamedTuple):
    """A kind of table: the columns that tell it, the measured one, and who predicts it."""

    columns: tuple[str, ...]
    measured: str
    predict: Callable[[pd.DataFrame], Replayed]
    lines: Callable[[pd.DataFrame], pd.DataFrame] | None = None  # where a row holds several measured quantities


KINDS = {
    "step_time": Kind(replay.STEPS, "step_time_s", replay.steps_of),
    "kernel_efficiency": Kind(alone.KERNELS, "efficiency", alone.kernels_of),
    "collectives": Kind(alone.COLLECTIVES, "time_us", alone.collectives_of),
    "node_power": Kind(nodes.NODES, nodes.MEASURED, nodes.nodes_of),
    "energy": Kind(claims.ENERGY, "printed", claims.claims_of, claims.long),
    "alignment": Kind(tunings.TUNINGS, "value", tunings.tunings_of, tunings.scored),
}


def published(options: Mapping[str, str]) -> int:
    """Predict a table, print the errors and write the rows when asked to.

    Raises Refused for a file that is no table, or one of no known kind.
    """
    frame = read(place(options["table"]))
    name = recognise(frame, options["table"])
    kind = KINDS[name]
    lines = kind.lines(frame) if kind.lines else frame
    rows, failed, memory = replayed(lines, kind)
    told = {"table": name, "rows": lines["row"].nunique() if kind.lines else len(frame), **scores(rows)}
    if kind.lines:
        told["predicted"] = lines["row"][rows.index].nunique()
    told["groups"] = {str(group): scores(part) for group, part in rows.groupby("group", sort=True)}
    told["by_kind"] = {str(kind): scores(part) for kind, part in rows.groupby("kind", sort=True)}
    if memory is not None:
        told["memory"] = memory
    if "outside" in rows:
        out = rows[rows["outside"] != ""]
        told["outside_calibration"] = [{"id": str(row["id"]), "what": row["outside"]} for _, row in out.iterrows()]
    if name == "collectives":
        told["validated"] = list(VALIDATED)
    told["failed"] = failed
    if options["out"]:
        write(Path(options["out"]), rows[["id", "published", "predicted", "error"]].to_csv(index=False))
    if options["figure"]:
        draw(rows, kind.measured, Path(options["figure"]))
    print(json.dumps(told) if flag(options, "json") else page(told))
    return 0


def place(table: str) -> Path:
    """A file as named, or a table that ships.

    Raises Refused for neither.
    """
    shipped = FACTS / f"{table}.csv"
    if Path(table).is_file() or not shipped.is_file():
        return Path(table)
    return shipped


def read(path: Path) -> pd.DataFrame:
    """A table with an id and a group for every row.

    Raises Refused when the file is no CSV table.
    """
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise Refused(f"table={path} is no CSV table: {' '.join(str(error).split())[:120]}") from error
    if frame.empty:
        raise Refused(f"table={path} has no rows")
    numbers = pd.Series([str(number) for number in range(1, len(frame) + 1)], index=frame.index)
    frame["id"] = frame["id"].astype("string").fillna(numbers) if "id" in frame else numbers
    if "group" not in frame:
        frame["group"] = frame.get("gpu", frame.get("submitter", "all"))
    frame["group"] = frame["group"].astype("string").fillna("unnamed")
    return frame


def recognise(frame: pd.DataFrame, path: str) -> str:
    """The kind of table whose columns are all there.

    Raises Refused with what the nearest kind misses.
    """
    missing = {name: [column for column in kind.columns if column not in frame] for name, kind in KINDS.items()}
    name = min(missing, key=lambda kind: len(missing[kind]) / len(KINDS[kind].columns))
    if missing[name]:
        raise Refused(f"table={path} is nearest to a table of {name}, but has no column {', '.join(missing[name])}; add what is missing")
    return name


def replayed(frame: pd.DataFrame, kind: Kind) -> tuple[pd.DataFrame, list[dict[str, str]], dict[str, float] | None]:
    """The predicted rows with their errors, the others with their reasons, and the errors of measured memory."""
    numbers = pd.to_numeric(frame[kind.measured], errors="coerce")
    unmeasured = frame[~(numbers > 0)]
    failed = [
        {"id": str(row["id"]), "reason": f"{kind.measured}={row[kind.measured]} is no number above 0"} for _, row in unmeasured.iterrows()
    ]
    found = kind.predict(frame[numbers > 0])
    failed += [{"id": str(frame["id"][index]), "reason": reason} for index, reason in found.failed.items()]
    rows = found.rows.assign(id=frame["id"], group=frame["group"], published=numbers)
    rows["error"] = rows["predicted"] / rows["published"] - 1
    rows["held"] = np.abs(np.log(rows["predicted"] / rows["published"])) <= BAND * rows["spread"]
    return rows, failed, _memory(frame, rows)


def _memory(frame: pd.DataFrame, rows: pd.DataFrame) -> dict[str, float] | None:
    if "peak_memory_gib" not in frame or "memory" not in rows:
        return None
    measured = pd.to_numeric(frame["peak_memory_gib"], errors="coerce").reindex(rows.index) * 2**30
    error = 100 * (rows["memory"] / measured - 1)[measured > 0].abs()
    return {"rows": len(error), "mean_abs_pct": error.mean(), "max_abs_pct": error.max()} if len(error) else None


def scores(rows: pd.DataFrame) -> dict[str, Any]:
    """Errors of some rows, in percent of what was published; null where there are none."""
    error = 100 * rows["error"]
    one = 100 * (baseline(rows) / rows["published"] - 1).abs()
    if error.empty:
        names = (
            "mean_abs_pct",
            "median_abs_pct",
            "p95_abs_pct",
            "bias_pct",
            "coverage_80",
            "baseline_mean_abs_pct",
            "baseline_median_abs_pct",
        )
        return {"predicted": 0, **dict.fromkeys(names)}
    return {
        "predicted": len(rows), "mean_abs_pct": error.abs().mean(), "median_abs_pct": error.abs().median(),
        "p95_abs_pct": error.abs().quantile(0.95), "bias_pct": error.mean(), "coverage_80": 100 * rows["held"].mean(),
        "baseline_mean_abs_pct": one.mean(), "baseline_median_abs_pct": one.median(),
    }  # fmt: skip


def baseline(rows: pd.DataFrame) -> pd.Series:
    """What one constant would say: published = constant × ideal, the median constant of each class of these very rows."""
    constant = (rows["published"] / rows["ideal"]).groupby(rows["class"]).transform("median")
    return constant * rows["ideal"]


def draw(rows: pd.DataFrame, measured: str, out: Path) -> None:
    """Every row as a point, coloured by group, around the diagonal and the bands of 10 and 25%.

    Raises Refused when there is nothing to draw.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if rows.empty:
        raise Refused("no row of this table could be predicted; there is nothing to draw")
    figure = Figure(figsize=(7.2, 5.2), layout="constrained", dpi=150)
    axes: Any = figure.subplots()
    ends = np.array([rows[["published", "predicted"]].min().min() / 1.3, rows[["published", "predicted"]].max().max() * 1.3])
    for share, shade in ((0.25, 0.08), (0.10, 0.14)):
        axes.fill_between(
            ends, ends * (1 - share), ends * (1 + share), color="black", alpha=shade, linewidth=0, label=f"within {share:.0%}"
        )
    colours = colormaps["tab10" if rows["group"].nunique() <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for (group, part), colour in zip(rows.groupby("group", sort=True), cycle(colours), strict=False):
        axes.scatter(part["published"], part["predicted"], s=12, color=colour, alpha=0.75, linewidth=0, label=f"{group} ({len(part)})")
    axes.set(
        xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"published {measured}", ylabel=f"predicted {measured}", aspect="equal"
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    commit(out, lambda temporary: figure.savefig(temporary, format="png", bbox_inches="tight"))


def page(told: Mapping[str, Any]) -> str:
    """The same for a person."""
    head = ("", "rows", "mean", "median", "95th pct", "bias", "80% band", "one constant")
    lines = [head, _line("all", told), *(_line(kind, part) for kind, part in told["by_kind"].items() if len(told["by_kind"]) > 1)]
    lines += [_line(group, part) for group, part in told["groups"].items()]
    text = [f"{told['predicted']} of {told['rows']} rows of a table of {told['table']} predicted; absolute errors in percent", ""]
    text += aligned(lines)
    if told.get("memory"):
        text.append("\npeak memory: {rows} rows, mean {mean_abs_pct:.1f}%, largest {max_abs_pct:.1f}%".format(**told["memory"]))
    if told.get("outside_calibration"):
        first = told["outside_calibration"][0]
        text.append(f"\noutside the calibrated range: {len(told['outside_calibration'])} rows, row {first['id']} with {first['what']}")
    if "validated" in told:
        text.append(f"\nvalidated: {', '.join(told['validated'])}; other collectives are formulas that no measurement was held against")
    reasons = pd.Series([entry["reason"] for entry in told["failed"]], dtype=str).value_counts()
    return "\n".join([*text, *(f"not predicted: {count} × {reason}" for reason, count in reasons.items())])


def _line(name: str, part: Mapping[str, Any]) -> tuple[str, ...]:
    if not part["predicted"]:
        return (name, "0", *["–"] * 6)
    errors = [f"{part[key]:.1f}" for key in ("mean_abs_pct", "median_abs_pct", "p95_abs_pct")]
    held = (f"{part['bias_pct']:+.1f}", f"{part['coverage_80']:.0f}%")
    return (name, str(part["predicted"]), *errors, *held, f"{part['baseline_mean_abs_pct']:.1f}")
