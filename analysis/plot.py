"""Figures: each function turns numbers into an SVG that a page can hold, the same bytes for the same numbers.

Ink and grid take the colour of the surrounding text, so that a figure is readable on paper, by day and by night.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import BytesIO
from math import ceil
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from conf.units import show, size_of

Points = Sequence[tuple[float, float]]
Spans = Mapping[str, Mapping[str, tuple[float, float]]]
Marks = Mapping[str, Mapping[str, Sequence[float]]]

PREDICTED, MEASURED, OTHER, BAD = "#8b93a1", "#2f7fd1", "#d9822b", "#d64545"
STATE_COLOURS = {
    "compute": "#2f7fd1", "optimizer": "#6aaae4", "communication": "#d9822b", "bubble": "#eab308", "data": "#3f9e6e",
    "evaluate": "#7fc29b", "checkpoint": "#8e6bbf", "init": "#8b93a1", "detect": "#d64545", "abort": "#e57373", "diagnose": "#b83280",
    "reallocate": "#d97aa6", "load": "#b08968", "replay": "#9c4221", "paused": "#a3a3a3", "generate": "#0e9aa7", "score": "#5cc5cf",
    "logprob": "#2c7a7b", "sync": "#c2a83e", "queue": "#737373", "idle": "#b8bec8", "spares": "#5b6472",
}  # fmt: skip
INK = "#010203"  # stands for the page's text colour until `svg` replaces it
_WIDTH = 4.7  # inches of 72 units: shown at half a page, 9 units of text are as large as the page's small print
_STROKES = 54  # marks that fit side by side
_ROUND = (1, 2, 2.5, 5, 10)
_MOST = 400  # points that a line holds: more than its pixels
_STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.12, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5,
}  # fmt: skip


def loss(measured: Points, predicted: Points, held_out: Points, levels: Mapping[str, float]) -> str:
    """Training loss over steps, held-out evaluations as dots, and levels to compare with, such as the bigram's."""
    top = 1.1 * max(value for _, value in (*measured, *predicted, *held_out))

    def draw(axes: Axes) -> None:
        if predicted:
            axes.plot(*_xy(_thin(predicted)), color=PREDICTED, linewidth=1.4, label="predicted")
        if measured:
            axes.plot(*_xy(_thin(measured)), color=MEASURED, linewidth=1, label="training, measured")
        if held_out:
            axes.plot(*_xy(held_out), "o", color=OTHER, markersize=4.5, label="held out, measured")
        for (name, value), style in zip(levels.items(), ("--", ":"), strict=False):
            said = f"{name} {value:.3g}" + (", above" if value > top else "")
            axes.axhline(min(value, top), color=INK, alpha=0.7, linewidth=1, linestyle=style, label=said)
        axes.set_ylim(top=top)
        axes.set_ylabel("nat/token")
        _steps(axes)
        legend(axes)

    return svg("loss", draw, 3.0)


def step_time(measured: Points, predicted: float | None, band: tuple[float, float] | None) -> str:
    """Seconds of each step beside the predicted step; a step far above the rest is a mark on the upper edge."""
    top = _roof([value for _, value in measured], [predicted or 0.0, *(band or ())])
    beyond = [step for step, value in measured if value > top]

    def draw(axes: Axes) -> None:
        if band:
            axes.axhspan(*band, color=PREDICTED, alpha=0.25, linewidth=0, label="predicted 10–90%")
        if predicted is not None:
            axes.axhline(predicted, color=PREDICTED, linewidth=1.4, linestyle="--", label="predicted")
        axes.plot(*_xy(_thin([point for point in measured if point[1] <= top])), color=MEASURED, linewidth=1, label="measured")
        if beyond:
            said = f"{len(beyond):,} longer, to {show(max(value for _, value in measured), 's')}"
            axes.plot(beyond, [top] * len(beyond), "^", color=BAD, markersize=5, clip_on=False, label=said)
        axes.set_ylim(0, top)
        _amounts(axes.yaxis, top, "s")
        _steps(axes)
        legend(axes)

    return svg("step-time", draw, 3.0)


def shares(rows: Mapping[str, Mapping[str, float]], name: str, unit: str) -> str:
    """Stacked horizontal bars, one a row, of what each state takes; large parts carry their share."""
    states = [state for state in STATE_COLOURS if any(row.get(state) for row in rows.values())]
    most = max(sum(row.values()) for row in rows.values())

    def draw(axes: Axes) -> None:
        for place, row in enumerate(rows.values()):
            left, whole = 0.0, sum(row.values())
            for state in states:
                width = row.get(state, 0.0)
                axes.barh(place, width, left=left, color=STATE_COLOURS[state], height=0.62, label=None if place else state)
                if width > 0.08 * most:
                    axes.text(left + width / 2, place, f"{width / whole:.0%}", ha="center", va="center", color=_on(STATE_COLOURS[state]))
                left += width
        _lanes(axes, list(rows))
        _amounts(axes.xaxis, most, unit)
        legend(axes, columns=4, handlelength=0.9)

    return svg(name, draw, 0.55 + 0.38 * len(rows) + 0.18 * ceil(len(states) / 4))


def bars(rows: Mapping[str, tuple[float, str]], name: str, unit: str) -> str:
    """Horizontal bars of a few amounts with their numbers; each row is (amount, colour)."""
    most = max(amount for amount, _ in rows.values()) or 1.0

    def draw(axes: Axes) -> None:
        for place, (amount, colour) in enumerate(rows.values()):
            axes.barh(place, amount, color=colour, height=0.62)
            axes.text(amount + 0.02 * most, place, show(amount, unit), va="center")
        _lanes(axes, list(rows))
        axes.set_xlim(0, 1.4 * most)
        _amounts(axes.xaxis, most, unit)

    return svg(name, draw, 0.55 + 0.38 * len(rows))


def ages(shares_: Mapping[str, Mapping[str, float]]) -> str:
    """Shares of samples by age, side by side; `shares_` maps "predicted" or "measured" → age → share."""
    order = list(dict.fromkeys(age for told in shares_.values() for age in told))

    def draw(axes: Axes) -> None:
        for side, colour, shift in (("predicted", PREDICTED, -0.2), ("measured", MEASURED, 0.2)):
            if told := shares_.get(side):
                axes.bar([place + shift for place in range(len(order))], [100 * told.get(age, 0.0) for age in order], width=0.38,
                         color=colour, label=side)  # fmt: skip
        axes.set_xticks(range(len(order)), order)
        axes.set_xlabel("updates")
        axes.set_ylabel("% of samples")
        legend(axes)

    return svg("ages", draw, 2.4)


def timeline(spans: Spans, marks: Marks) -> str:
    """A lane for each stage and each kind of event; in a lane, what was predicted above what was measured.

    `spans` maps lane → side → (start, end), `marks` maps lane → side → times; a side is "predicted" or "measured".
    """
    lanes = [*spans, *marks]
    ends = [stop for lane in spans.values() for _, stop in lane.values()]
    end = max([*ends, *(at for lane in marks.values() for times in lane.values() for at in times)]) or 1.0
    sides = {side for lane in (*spans.values(), *marks.values()) for side in lane}

    def draw(axes: Axes) -> None:
        for side, colour, shift in (("predicted", PREDICTED, -0.2), ("measured", MEASURED, 0.2)):
            if side in sides:
                axes.plot([], [], color=colour, linewidth=5, label=side)
            for place, lane in enumerate(lanes):
                if side in spans.get(lane, {}):
                    start, stop = spans[lane][side]
                    axes.barh(place + shift, max(stop - start, end / 300), left=start, height=0.34, color=colour)
                _marks(axes, marks.get(lane, {}).get(side, ()), place + shift, end, colour)
        _lanes(axes, lanes)
        axes.set_xlim(0, end * 1.01)
        _amounts(axes.xaxis, end, "s")
        legend(axes)

    return svg("timeline", draw, 0.8 + 0.27 * len(lanes))


def _marks(axes: Axes, times: Sequence[float], place: float, end: float, colour: str) -> None:
    """A stroke for each time or, where they would merge, a strip that is darker where more happens."""
    if len(times) <= _STROKES:
        axes.vlines(list(times), place - 0.17, place + 0.17, color=colour, linewidth=1.6)
        return
    counts = Counter(min(int(time / end * _STROKES), _STROKES - 1) for time in times)
    for cell, count in sorted(counts.items()):
        shade = 0.15 + 0.85 * count / max(counts.values())
        axes.barh(place, end / _STROKES, left=cell * end / _STROKES, height=0.34, color=colour, alpha=shade, linewidth=0)


def power(predicted: Points, measured: Points) -> str:
    """Power over the time of the run."""
    points = [*predicted, *measured]

    def draw(axes: Axes) -> None:
        for line, colour, name in ((predicted, PREDICTED, "predicted"), (measured, MEASURED, "measured")):
            if line:
                axes.plot(*_xy(_thin(line)), color=colour, linewidth=1.2, label=name, drawstyle="steps-post")
        axes.set_ylim(0, 1.2 * max(value for _, value in points))
        _amounts(axes.yaxis, 1.2 * max(value for _, value in points), "W")
        _amounts(axes.xaxis, max(at for at, _ in points), "s")
        legend(axes)

    return svg("power", draw, 2.6)


def intensity(points: Points, mean: float) -> str:
    """The grid's hours over the time of the run, and their mean by the energy drawn in them [gCO2e/kWh]."""

    def draw(axes: Axes) -> None:
        axes.plot(*_xy(_thin(points)), color=OTHER, linewidth=1.2, label="grid", drawstyle="steps-post")
        axes.axhline(mean, color=INK, alpha=0.7, linewidth=1, linestyle="--", label="mean of the run's energy")
        axes.set_ylim(0, 1.2 * max(grams for _, grams in points))
        axes.set_ylabel("gCO2e/kWh")
        _amounts(axes.xaxis, max(at for at, _ in points), "s")
        legend(axes)

    return svg("intensity", draw, 2.6)


def _on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else "#ffffff"


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_ROUND, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend(axes: Axes, columns: int = 2, handlelength: float = 2.0) -> None:
    """Below the axes, where it hides nothing."""
    axes.figure.legend(loc="outside lower left", ncols=columns, handlelength=handlelength, columnspacing=1.2)


def _lanes(axes: Axes, names: Sequence[str]) -> None:
    """Names down the side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _amounts(axis: Axis, most: float, unit: str) -> None:
    """Round numbers from zero in the unit that fits the largest."""
    name = "1" if unit == "1" else show(most, unit).split(" ")[-1]
    factor = size_of("year" if name == "years" else name)[0] / size_of(unit)[0]
    if most / factor >= 1e6:
        name, factor = f"million {name}", factor * 1e6
    ticks = [tick for tick in MaxNLocator(5, steps=_ROUND).tick_values(0, most / factor) if 0 <= tick * factor <= most * 1.001]
    axis.set_ticks([tick * factor for tick in ticks], [f"{tick:,g}" for tick in ticks])
    axis.set_label_text("" if name == "1" else name)


def _roof(values: Sequence[float], levels: Sequence[float]) -> float:
    """Upper end of an axis that shows nearly all values well: a third above the 98th percentile."""
    usual = sorted(values)[int(0.98 * (len(values) - 1))]
    return 1.3 * max(usual, *levels)


def _thin(points: Points) -> Points:
    """Medians of equally many neighbours where there are more points than pixels."""
    size = ceil(len(points) / _MOST)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    return [(median(x for x, _ in group), median(y for _, y in group)) for group in groups] or points


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def svg(name: str, draw: Callable[[Axes], None], height: float) -> str:
    """The drawing as an inline SVG as wide as its place, with ids of its own and the page's ink and font."""
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), dpi=72, layout="constrained")
        draw(figure.subplots())
        out = BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue().decode()
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{escape(name)}"', text, count=1)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor").strip()
