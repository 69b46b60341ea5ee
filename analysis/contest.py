"""The form of a law is chosen by how well it foretells a ladder's larger runs from the smaller, not by how well it fits."""

from collections.abc import Sequence

import numpy as np

from analysis.chinchilla import DELTA, Array
from analysis.forms import FORMS, Fitted, fit_form, fits
from analysis.ladder import Ladder
from conf.errors import Refused

CUTS = (0.6, 0.75, 0.9)  # shares of the runs, in the order of compute, from which the others are foretold
RUNS = 2  # runs a parameter that a form must have to be tried
CLOSE, NORMAL = 1.5, 1.96


def backtest(ladder: Ladder, name: str, delta: float = DELTA, cuts: Sequence[float] = CUTS) -> float:
    """Mean absolute error, as a share of the loss, of larger runs foretold from smaller ones."""
    order = np.argsort(ladder.flop, kind="stable")
    errors = []
    for cut in cuts:
        small, large = (ladder.where(part) for part in np.split(order, [int(len(order) * cut)]))
        errors.append(np.abs(fit_form(small, name, delta).of(large) / large.loss - 1).mean())
    return float(np.mean(errors))


def choose(ladder: Ladder, delta: float = DELTA) -> tuple[Fitted, dict[str, float]]:
    """The form that foretells the ladder's own larger runs best, fitted to all of it; and the error of each form."""
    small = ladder.where(np.argsort(ladder.flop, kind="stable")[: int(len(ladder) * CUTS[0])])
    tried = [name for name, form in FORMS.items() if len(small) >= RUNS * len(form.names) and fits(small, name)]
    errors = {name: backtest(ladder, name, delta) for name in tried}
    if not errors:
        need = -(-RUNS * min(len(form.names) for form in FORMS.values()) * 10 // int(CUTS[0] * 10))
        raise Refused(f"form=auto foretells larger runs from smaller ones and needs at least {need} runs; these are {len(ladder)}")
    best = min(errors, key=lambda name: errors[name])
    return fit_form(ladder, best, delta), errors


def rivals(ladder: Ladder, found: Fitted, errors: dict[str, float]) -> list[Fitted]:
    """The forms that foretold at most CLOSE times as badly, fitted to all runs."""
    return [fit_form(ladder, name) for name, error in errors.items() if name != found.form and error <= CLOSE * errors[found.form]]


def band(ladder: Ladder, found: Fitted, error: float, others: Sequence[Fitted], params: Array, tokens: Array) -> tuple[Array, Array]:
    """Low and high ends of a 95% band of a new run's loss.

    It holds the scatter of the runs around the law, the law's error on larger runs of the ladder (as a normal spread: 1.25 times the mean
    absolute error), and beside these how far its rivals go.
    """
    center = found.loss(params, tokens)
    scatter = float(np.sqrt(np.mean((found.of(ladder) / ladder.loss - 1) ** 2)))
    half = NORMAL * np.hypot(scatter, np.sqrt(np.pi / 2) * error) * center
    losses = [other.loss(params, tokens) for other in others]
    sane = [loss for loss in losses if (loss < 2 * center).all()]  # a form that bends too much leaves the numbers
    low, high = np.minimum.reduce([center, *sane]), np.maximum.reduce([center, *sane])
    return low - half, high + half
