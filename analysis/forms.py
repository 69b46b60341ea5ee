"""Other forms of L(N, D) than Chinchilla's, all fitted alike: Huber's loss of ln L, from several starts; and the one that foretells best.

    chinchilla  E + A / N^alpha + B / D^beta                                  Hoffmann et al. 2022, equation 10
    kaplan      E + (A / N^alpha + B / D)^gamma                               Kaplan et al. 2020, equation 1.5, with an irreducible E
    coupled     E + (A / N^alpha + B / D^beta)^gamma
    farseer     exp(a N^k + b) + exp(c N^l + d) / D^exp(e N^m + f)            Li et al. 2025 (arXiv 2506.10972)

Which one holds is not seen in how well it fits: it is chosen by how well it foretells the larger runs of the ladder from the smaller.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

from analysis.chinchilla import DELTA, Array
from analysis.ladder import Ladder
from analysis.law import PER_TOKEN
from analysis.law import fit as chinchilla_fit
from conf.errors import Refused

CUTS = (0.6, 0.75, 0.9)  # shares of the runs, in the order of compute, from which the others are foretold
RUNS = 2  # runs a parameter that a form must have to be tried
CLOSE, NORMAL = 1.5, 1.96
BENDS = (-0.3, -0.1, 0.05)  # of Farseer's exponents, to start from
GAMMAS = (0.5, 1.0, 2.0)


class Form(NamedTuple):
    """ln L of thetas at (ln N − its mean, ln D − its mean, mean of ln D), and where a search starts."""

    names: tuple[str, ...]
    log: Callable[[Array, Array, Array, float], Array]
    starts: Callable[[Ladder], Iterable[Array]]


class Fitted(NamedTuple):
    """A form with its theta, centred at the means of its own runs; objective as in analysis/chinchilla.py."""

    form: str
    theta: Array
    means: tuple[float, float]
    objective: float

    def loss(self, params: Array, tokens: Array) -> Array:
        """L of N and D, arrays of one shape; infinite where a form that bends too much leaves the numbers."""
        x, y = np.log(params) - self.means[0], np.log(tokens) - self.means[1]
        with np.errstate(over="ignore", invalid="ignore"):
            return np.nan_to_num(np.exp(FORMS[self.form].log(self.theta, x, y, self.means[1])), nan=np.inf)

    def optimum(self, flop: float) -> tuple[float, float] | None:
        """The best params for a budget [FLOP] and their loss, by search; None where the least loss is at an end of six decades."""
        middle = np.sqrt(flop / PER_TOKEN / 20)  # twenty tokens a parameter
        sizes = middle * np.geomspace(1e-3, 1e3, 601)
        losses = self.loss(sizes, flop / PER_TOKEN / sizes)
        at = int(losses.argmin())
        if at in (0, len(sizes) - 1):
            return None

        def of(log: float) -> float:
            size = np.exp(np.array([log]))
            return float(self.loss(size, flop / PER_TOKEN / size)[0])

        best = minimize_scalar(of, bounds=(np.log(sizes[at - 1]), np.log(sizes[at + 1])), method="bounded", options={"xatol": 1e-10})
        return float(np.exp(best.x)), float(best.fun)


def _first(ladder: Ladder) -> Array:
    """Chinchilla's theta (a, b, e, alpha, beta) at the means of the runs."""
    E, A, B, alpha, beta = chinchilla_fit(ladder, bootstrap=0).parameters
    x, y = np.log(ladder.params).mean(), np.log(ladder.tokens).mean()
    return np.array([np.log(A) - alpha * x, np.log(B) - beta * y, np.log(E), alpha, beta])


def _chinchilla(theta: Array, x: Array, y: Array, _: float) -> Array:
    a, b, e, alpha, beta = theta
    return np.asarray(np.logaddexp(np.logaddexp(a - alpha * x, b - beta * y), e))


def _coupled(theta: Array, x: Array, y: Array, _: float) -> Array:
    a, b, e, alpha, beta, gamma = theta
    return np.asarray(np.logaddexp(gamma * np.logaddexp(a - alpha * x, b - beta * y), e))


def _kaplan(theta: Array, x: Array, y: Array, mean: float) -> Array:
    a, b, e, alpha, gamma = theta
    return _coupled(np.array([a, b, e, alpha, 1.0, gamma]), x, y, mean)


def _farseer(theta: Array, x: Array, y: Array, mean: float) -> Array:
    a, b, k, c, d, m, e, f, n = theta
    power = np.exp(e * np.exp(n * x) + f)
    return np.asarray(np.logaddexp(a * np.exp(k * x) + b, c * np.exp(m * x) + d - power * (y + mean)))


def _coupled_starts(ladder: Ladder) -> Iterable[Array]:
    a, b, e, alpha, beta = _first(ladder)
    for gamma in GAMMAS:
        yield np.array([a / gamma, b / gamma, e, alpha / gamma, beta / gamma, gamma])


def _kaplan_starts(ladder: Ladder) -> Iterable[Array]:
    a, b, e, alpha, beta = _first(ladder)
    yield from (np.array([a / gamma, b / gamma, e, alpha / gamma, gamma]) for gamma in (beta, 2 * beta))


def _farseer_starts(ladder: Ladder) -> Iterable[Array]:
    """Chinchilla's law in Farseer's terms: what does not depend on D as one curve of N, the rest as constants."""
    a, b, e, alpha, beta = _first(ladder)
    x, mean = np.log(ladder.params) - np.log(ladder.params).mean(), np.log(ladder.tokens).mean()
    rest = np.logaddexp(a - alpha * x, e)
    for k in BENDS:
        slope, level = np.polyfit(np.exp(k * x), rest, 1)
        for m in BENDS:
            yield np.array([slope, level, k, 0.0, b + beta * mean, m, 0.0, np.log(beta), m])


FORMS = {
    "chinchilla": Form(("a", "b", "e", "alpha", "beta"), _chinchilla, lambda ladder: [_first(ladder)]),
    "kaplan": Form(("a", "b", "e", "alpha", "gamma"), _kaplan, _kaplan_starts),
    "coupled": Form(("a", "b", "e", "alpha", "beta", "gamma"), _coupled, _coupled_starts),
    "farseer": Form(("a", "b", "k", "c", "d", "l", "e", "f", "m"), _farseer, _farseer_starts),
}


def fit_form(ladder: Ladder, name: str, delta: float = DELTA) -> Fitted:
    """The best of a form over its starts.

    Raises Refused where there are not more runs than parameters.
    """
    form = FORMS[name]
    if len(ladder) <= len(form.names):
        raise Refused(f"form={name} has {len(form.names)} parameters; {len(ladder)} runs are too few, {len(form.names) + 1} the least")
    means = float(np.log(ladder.params).mean()), float(np.log(ladder.tokens).mean())
    x, y, target, heavy = np.log(ladder.params) - means[0], np.log(ladder.tokens) - means[1], np.log(ladder.loss), np.sqrt(ladder.weight)

    def misses(theta: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.nan_to_num(heavy * (form.log(theta, x, y, means[1]) - target), nan=1e3, posinf=1e3, neginf=-1e3)

    found = [
        least_squares(misses, start, loss="huber", f_scale=delta, x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=400)
        for start in form.starts(ladder)
    ]
    best = min(found, key=lambda one: one.cost)
    return Fitted(name, best.x, means, float(best.cost))


def backtest(ladder: Ladder, name: str, delta: float = DELTA, cuts: Sequence[float] = CUTS) -> float:
    """Mean absolute error, as a share of the loss, of larger runs foretold from smaller ones."""
    order = np.argsort(ladder.flop, kind="stable")
    errors = []
    for cut in cuts:
        small, large = (ladder.where(part) for part in np.split(order, [int(len(order) * cut)]))
        errors.append(np.abs(fit_form(small, name, delta).loss(large.params, large.tokens) / large.loss - 1).mean())
    return float(np.mean(errors))


def choose(ladder: Ladder, delta: float = DELTA) -> tuple[Fitted, dict[str, float]]:
    """The form that foretells the ladder's own larger runs best, fitted to all of it; and the error of each form."""
    least = int(len(ladder) * CUTS[0])
    errors = {name: backtest(ladder, name, delta) for name, form in FORMS.items() if least >= RUNS * len(form.names)}
    if not errors:
        need = -(-RUNS * len(FORMS["chinchilla"].names) * 10 // int(CUTS[0] * 10))
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
    scatter = float(np.sqrt(np.mean((found.loss(ladder.params, ladder.tokens) / ladder.loss - 1) ** 2)))
    half = NORMAL * np.hypot(scatter, np.sqrt(np.pi / 2) * error) * center
    losses = [other.loss(params, tokens) for other in others]
    sane = [loss for loss in losses if (loss < 2 * center).all()]  # a form that bends too much leaves the numbers
    low, high = np.minimum.reduce([center, *sane]), np.maximum.reduce([center, *sane])
    return low - half, high + half
