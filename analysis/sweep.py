"""A sweep as a figure: what matters, over the values that were varied."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from conf.errors import Refused
from conf.files import commit

matplotlib.use("Agg")
OPTIONS = {
    "table": ("", "points.parquet of a sweep; empty = the newest under runs"),
    "runs": ("runs", "folder of the records"),
    "out": ("", "picture to write; empty = sweep.png beside the table"),
}
PANELS = {"align.step_time": (1.0, "step of alignment [s]"), "align.tokens_per_s_per_gpu": (1.0, "tokens a second and device"),
          "align.generator_utilisation": (1.0, "use of generators"), "align.trainer_utilisation": (1.0, "use of trainers"),
          "align.cost_per_thousand": (1.0, "cost of a thousand steps [USD]"), "align.peak_memory": (1e9, "memory of alignment [GB]"),
          "pretrain.mfu": (1.0, "MFU"), "run.tokens": (1e12, "tokens [T]"), "run.wall_clock": (86400.0, "wall clock [d]"),
          "run.cost": (1e6, "cost [million USD]"), "run.carbon_location": (1e6, "carbon [tCO2e]"),
          "pretrain.peak_memory": (1e9, "memory a device [GB]")}  # fmt: skip
FLAT = 1e-3  # relative change below which a quantity is the same everywhere
MANY = 8  # lines in one panel, the rest is left to the table


def sweep(options: Mapping[str, str]) -> int:
    """Draw a sweep's points."""
    path = Path(options["table"]) if options["table"] else newest(Path(options["runs"]))
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise Refused(f"table={path} is no table of a sweep: {' '.join(str(error).split())[:120]}; foretold sim -m writes one") from error
    if "point" not in frame or "plan" not in frame:
        raise Refused(f"table={path} has no points with plans; foretold sim -m writes points.parquet")
    out = Path(options["out"]) if options["out"] else path.with_name("sweep.png")
    draw(frame, out)
    print(f"figure: {out}")
    return 0


def newest(runs: Path) -> Path:
    found = sorted((runs / "sweeps").glob("*/points.parquet"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Refused(f"runs={runs} holds no sweep; make one with foretold sim -m key=value,value")
    return found[-1]


def draw(frame: pd.DataFrame, out: Path) -> None:
    """A panel a quantity, over the numeric key with most values; one line for each choice of the others."""
    from matplotlib.figure import Figure

    good = frame[frame["problem"].isna()]
    if good.empty:
        raise Refused("every point of this sweep was passed over; there is nothing to draw")
    names = list(frame.columns[1 : list(frame.columns).index("plan")])
    across = axis(good, names)
    others = [name for name in names if name != across]
    panels = [name for name in PANELS if name in good and good[name].max() > good[name].min() * (1 + FLAT)] or ["pretrain.mfu"]
    width = min(3, len(panels))
    figure = Figure(figsize=(4.2 * width, 3.2 * -(-len(panels) // width)), layout="constrained", dpi=150)
    plots: Any = figure.subplots(-(-len(panels) // width), width, squeeze=False)
    for panel, plot in zip(panels, plots.flat, strict=False):
        size, title = PANELS[panel]
        for label, line in lines(good, others):
            points = line.sort_values(across) if across else line
            x = points[across] if across else [str(value) for value in points[names].agg(" ".join, axis=1)] if names else points["point"]
            plot.plot(x, points[panel] / size, marker="o", markersize=3, label=label)
        plot.set(title=title, xlabel=across or "")
        plot.set_ylim(0, 1.08 * good[panel].max() / size)
        plot.grid(alpha=0.3)
    for plot in plots.flat[len(panels) :]:
        plot.set_visible(False)
    if others:
        figure.legend(*plots.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, title=", ".join(others))
    commit(out, lambda temporary: figure.savefig(temporary, format="png"))


def axis(frame: pd.DataFrame, names: list[str]) -> str:
    """The varied number with most values, or nothing."""
    numeric = [name for name in names if pd.api.types.is_numeric_dtype(frame[name])]
    return max(numeric, key=lambda name: frame[name].nunique(), default="")


def lines(frame: pd.DataFrame, names: list[str]) -> list[tuple[str, pd.DataFrame]]:
    if not names:
        return [("", frame)]
    groups = frame.groupby(names, sort=True)
    return [(", ".join(map(str, key if isinstance(key, tuple) else (key,))), same) for key, same in groups][:MANY]
