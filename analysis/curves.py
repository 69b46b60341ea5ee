"""Figures of a scaling law: what it was fitted to and says beyond, the sizes that limits allow, and what a lower loss costs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.chinchilla import Array
from analysis.known import Known
from analysis.law import optimum
from analysis.plot import INK, MEASURED, OTHER, PREDICTED, legend, svg
from conf.units import show

HEIGHT = 3.1
WORDS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """
    >>> short(8.03e9), short(512), short(246_000)
    ('8.03 B', '512', '246 k')
    """
    for size, name in WORDS:
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g}"


def reach(known: Known, flop: float, loss: float) -> str:
    """The runs of a law, the least loss that it foretells for each compute with a band, and the run that is chosen."""
    runs = known.ladder
    first = float(runs.flop.min()) if runs else flop / 1e3
    span = np.geomspace(first, max(flop, first) * 2, 60)
    best = [optimum(known.law, at) for at in span]
    bands = known.loss(np.array([one.params for one in best]), np.array([one.tokens for one in best]))

    def draw(axes: Axes) -> None:
        if bands:
            axes.fill_between(span, *bands, color=PREDICTED, alpha=0.25, linewidth=0, label="95% of a run's loss")
        axes.plot(span, [float(one.loss) for one in best], color=PREDICTED, linewidth=1.4, label="least loss by the law")
        if runs:
            axes.plot(runs.flop, runs.loss, "o", color=MEASURED, markersize=3, alpha=0.6, markeredgewidth=0, label="its runs")
        axes.plot([flop], [loss], "*", color=OTHER, markersize=11, label="the plan")
        axes.set_xscale("log")
        axes.set_xlabel("FLOP of training")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(LogLocator(numticks=7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e")))
        axes.xaxis.set_minor_formatter(NullFormatter())
        legend(axes)

    return svg("law", draw, HEIGHT)


def sizes(params: Array, losses: Array, bands: tuple[Array, Array] | None, chosen: int, alike: tuple[float, float]) -> str:
    """The loss of each size, trained as long as the limits allow."""
    low = float(losses.min())

    def draw(axes: Axes) -> None:
        axes.axvspan(*alike, color=OTHER, alpha=0.15, linewidth=0, label="within 0.1% of the least loss")
        if bands:
            axes.fill_between(params, *bands, color=PREDICTED, alpha=0.25, linewidth=0, label="95%")
        axes.plot(params, losses, color=MEASURED, linewidth=1.2, marker="o", markersize=2.5, label="each on its best mesh")
        axes.plot(params[chosen], losses[chosen], "*", color=OTHER, markersize=11, label="the plan")
        axes.set_xscale("log")
        axes.set_ylim(low - 0.02 * low - (low - float(bands[0].min()) if bands else 0.0), low * 1.25)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if params.max() / params.min() < 500 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("parameters")
        axes.set_ylabel("loss")
        legend(axes)

    return svg("sizes", draw, HEIGHT)


def frontier(name: str, amounts: Sequence[float], losses: Sequence[float], chosen: tuple[float, float], unit: str) -> str:
    """The least loss for an amount of money, time, energy or carbon."""

    def draw(axes: Axes) -> None:
        axes.plot(amounts, losses, color=MEASURED, linewidth=1.4, marker="o", markersize=3)
        axes.plot(*([value] for value in chosen), "*", color=OTHER, markersize=11)
        axes.axhline(chosen[1], color=INK, alpha=0.25, linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(amounts)[::2], [show(value, unit) for value in list(amounts)[::2]])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("loss")

    return svg(f"frontier-{name}", draw, 2.2)
