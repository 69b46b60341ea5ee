"""A fitted law of the Chinchilla form with its bootstrap: what it says of a size, and the best size for a budget, with bands."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis import chinchilla
from analysis.chinchilla import DELTA, NAMES, Array, Points, parameters, solve, starts
from analysis.ladder import Ladder
from conf.errors import Refused

BEST = 1e-6  # relative excess of an objective that still counts as the optimum
PER_TOKEN = 6.0  # FLOP a parameter and token (Kaplan et al. 2020, section 2.1)


class Optimum(NamedTuple):
    """The best division of a budget among parameters and tokens; arrays over fits."""

    params: Array
    tokens: Array
    loss: Array


class Fit(NamedTuple):
    """Parameters E, A, B, alpha, beta; their bootstrap (samples, 5); how the search went."""

    ladder: Ladder
    delta: float
    parameters: Array
    objective: float
    samples: Array
    at_optimum: float  # share of starts
    condition: float  # of the curvature at the optimum

    def loss(self, params: Array, tokens: Array) -> Array:
        return predicted(self.parameters, params, tokens)

    def optimum(self, flop: float) -> tuple[Optimum, Optimum]:
        """The best size for a budget [FLOP], and that of each bootstrap sample."""
        return optimum(self.parameters, flop), optimum(self.samples, flop)


def fit(ladder: Ladder, delta: float = DELTA, bootstrap: int = 4000, by: str = "run", seed: int = 0) -> Fit:
    """The law of these runs; `by` says what the bootstrap draws: runs, groups of runs, or residuals.

    Raises Refused for too few of them, or without variation.
    """
    refuse_unfit(ladder)
    points = Points.of(ladder.params, ladder.tokens, ladder.loss)
    first = starts(points)
    thetas, objectives = solve(points, np.tile(ladder.weight, (len(first), 1)), first, delta)
    best = thetas[objectives.argmin()]
    bent = np.linalg.eigvalsh(chinchilla.curvature(points, ladder.weight, best, max(delta, chinchilla.SMALLEST)))
    miss = points.loss - np.log(predicted(parameters(best, points), ladder.params, ladder.tokens))
    drawn, among = resampled(ladder, bootstrap, by, seed), points
    if by == "residual":  # Efron's: the runs stay, their scatter is dealt anew
        among = points._replace(loss=points.loss - miss + np.random.default_rng(seed).choice(miss, (bootstrap, len(miss))))
    samples = solve(among, drawn, np.tile(best, (bootstrap, 1)), delta)[0] if bootstrap else thetas[:0]
    reached = float((objectives <= objectives.min() * (1 + BEST) + 1e-15).mean())
    return Fit(ladder, delta, parameters(best, points), float(objectives.min()), parameters(samples, points),
               reached, float(bent.max() / max(bent.min(), 1e-300)))  # fmt: skip


def refuse_unfit(ladder: Ladder) -> None:
    if len(ladder) <= len(NAMES):
        raise Refused(f"{len(ladder)} runs are too few: the form has {len(NAMES)} parameters and needs at least {len(NAMES) + 1} runs")
    for name, values in (("params", ladder.params), ("tokens", ladder.tokens)):
        if len(np.unique(values)) < 3:
            raise Refused(
                f"{name} takes {len(np.unique(values))} values in these runs; its exponent needs at least 3: add runs of other sizes"
            )


def resampled(ladder: Ladder, count: int, by: str, seed: int) -> NDArray[np.float64]:
    """Weights (count, n) of samples drawn with replacement, of runs or
    of whole groups (Cameron, Gelbach and Miller 2008); all alike by residuals."""
    if by == "residual":
        return np.tile(ladder.weight, (count, 1))
    dice = np.random.default_rng(seed)
    _, group = np.unique(ladder.group if by == "group" else np.arange(len(ladder)), return_inverse=True)
    groups = int(group.max()) + 1
    return dice.multinomial(groups, np.full(groups, 1 / groups), count)[:, group] * ladder.weight


def predicted(fitted: Array, params: Any, tokens: Any) -> Array:
    """
    >>> bool(abs(predicted(np.array([1.69, 406.4, 410.7, 0.34, 0.28]), 70e9, 1.4e12) - 1.9366) < 1e-3)
    True
    """
    E, A, B, alpha, beta = np.moveaxis(fitted, -1, 0)
    return np.asarray(E + A / params**alpha + B / tokens**beta)


def optimum(fitted: Array, flop: float, per_token: float = PER_TOKEN) -> Optimum:
    """N* = G (C/k)^(beta/(alpha+beta)), D* = C / k N*, k = 6 FLOP a parameter and token, G = (alpha A / beta B)^(1/(alpha+beta))
    (Hoffmann et al. 2022, equation 4).

    Not a number where an exponent is not positive: there more is always better.
    """
    _, A, B, alpha, beta = np.moveaxis(np.where((fitted > 0).all(-1, keepdims=True), fitted, np.nan), -1, 0)
    params = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flop / per_token) ** (beta / (alpha + beta))
    tokens = flop / per_token / params
    return Optimum(np.asarray(params), np.asarray(tokens), predicted(fitted, params, tokens))
