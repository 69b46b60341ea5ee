"""Chinchilla's first approach: of the training curves of several sizes, the size of least loss for each compute, and its power law.

Hoffmann et al. 2022, section 3.1. The weakest of the three: between the curves of two sizes it knows neither, and on the Gemstones' curves
its exponent moves between 0.47 and 0.57 with the range of compute. A check on the others.
"""

import numpy as np

from analysis.chinchilla import Array
from analysis.isoflop import IsoFlop
from analysis.ladder import Ladder
from conf.errors import Refused

BUDGETS = 1500  # as many as theirs
POINTS = 3  # of a curve


def envelope(ladder: Ladder, budgets: int = BUDGETS) -> IsoFlop:
    """The size of least loss at each of so many budgets, by curves that are linear in ln C between their points.

    A curve is the runs of one group; without groups, those of the same params. Raises Refused for fewer than three curves, or where their
    ranges of compute do not overlap.
    """
    curves = [ladder.where(np.flatnonzero(ladder.group == group)) for group in np.unique(ladder.group)]
    curves = [curve for curve in curves if len(np.unique(curve.flop)) >= POINTS]
    if len(curves) < POINTS:
        need = f"approach=1 reads training curves: {POINTS} or more of {POINTS} or more points each, a row for each evaluation"
        raise Refused(f"{need}; these runs make {len(curves)}; runs of equal params need a column group")
    flops = np.geomspace(ladder.flop.min(), ladder.flop.max(), budgets)
    losses = np.array([_at(curve, flops) for curve in curves])
    several = np.isfinite(losses).sum(0) >= 2
    best = losses[:, several].argmin(0) if several.any() else np.array([], int)
    sizes = np.array([curve.params[0] for curve in curves])
    if (found := len(np.unique(sizes[best]))) < POINTS:
        raise Refused(f"approach=1: {found} sizes are best at some compute, {POINTS} are needed: add curves of other sizes")
    kept, least = flops[several], losses[:, several].min(0)
    exponent, level = np.polyfit(np.log(kept), np.log(sizes[best]), 1)
    return IsoFlop(kept, sizes[best], least, float(exponent), float(np.exp(level)))


def _at(curve: Ladder, flops: Array) -> Array:
    order = np.argsort(curve.flop)
    return np.asarray(np.interp(np.log(flops), np.log(curve.flop[order]), curve.loss[order], left=np.inf, right=np.inf))
