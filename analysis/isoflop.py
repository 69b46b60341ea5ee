"""Chinchilla's second approach: the size of least loss among the runs of each budget, and how that size grows with the budget.

Hoffmann et al. 2022, section 3.2, with a parabola in ln N; Porian et al. 2024 (arXiv 2406.19146) interpolate after Akima instead, which
leaves the other side of a curve that is no parabola out of it.
"""

from typing import NamedTuple

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from analysis.chinchilla import Array
from analysis.ladder import Ladder
from conf.errors import Refused

LEAST = 5  # runs of a budget
NEAR = 5  # runs around the least that a parabola is laid through
FINE = 4001


class IsoFlop(NamedTuple):
    """Budgets [FLOP] with the best params and loss of each, and N* = coefficient C^exponent through them."""

    flop: Array
    params: Array
    loss: Array
    exponent: float
    coefficient: float


def isoflop(ladder: Ladder, method: str = "akima") -> IsoFlop:
    """The best size of each budget, and their power law by least squares of logarithms.

    Budgets whose least loss is at an end of their sizes say nothing and are left out. Raises Refused where fewer than three are left.
    """
    rows = []
    for flop in np.unique(ladder.flop):
        curve = ladder.where(ladder.flop == flop)
        best = minimum(np.log(curve.params), curve.loss, method) if len(np.unique(curve.params)) >= LEAST else None
        if best is not None:
            rows.append((flop, np.exp(best[0]), best[1]))
    if len(rows) < 3:
        told = f"{len(rows)} budgets have {LEAST} sizes with their least loss between them; 3 are needed"
        raise Refused(f"{told}: give equal flop to the runs of a budget, and smaller and larger sizes")
    flops, params, loss = (np.array(column) for column in zip(*rows, strict=True))
    exponent, level = np.polyfit(np.log(flops), np.log(params), 1)
    return IsoFlop(flops, params, loss, float(exponent), float(np.exp(level)))


def minimum(x: Array, loss: Array, method: str) -> tuple[float, float] | None:
    """Where a curve is least, between its points, and its value; None where that is at an end."""
    order = np.argsort(x)
    x, loss = x[order], loss[order]
    at = int(loss.argmin())
    if method == "parabola":
        if at in (0, len(x) - 1):
            return None
        near = slice(max(0, at - NEAR // 2), at + NEAR // 2 + 1)
        bend, slope, level = np.polyfit(x[near] - x[at], loss[near], 2)
        lowest = -slope / (2 * bend)
        return (float(x[at] + lowest), float(level - slope**2 / (4 * bend))) if bend > 0 and x[0] < x[at] + lowest < x[-1] else None
    grid = np.linspace(x[max(0, at - 1)], x[min(len(x) - 1, at + 1)], FINE)
    values = Akima1DInterpolator(x, loss)(grid)
    lowest = float(grid[values.argmin()])
    return (lowest, float(values.min())) if x[0] < lowest < x[-1] else None  # the curve may turn before the last run
