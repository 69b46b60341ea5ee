"""Forms of L(N, D), all fitted alike: Huber's loss of ln L, from several starts.

    chinchilla  E + A / N^alpha + B / D^beta                                  Hoffmann et al. 2022, equation 10
    tied        E + (a M^alpha + b M^-alpha) C^-alpha, M = D / N: one exponent   Gadre et al. 2024 (arXiv 2403.08540), equation 4
    kaplan      E + (A / N^alpha + B / D)^gamma                               Kaplan et al. 2020, equation 1.5, with an irreducible E
    coupled     E + (A / N^alpha + B / D^beta)^gamma
    farseer     exp(a N^k + b) + exp(c N^l + d) / D^exp(e N^m + f)            Li et al. 2025 (arXiv 2506.10972)
    mixture     E + A / (N^alpha S^gamma) + B / D^beta, S = total / active    the dense law of N where gamma = 0, of all where it is alpha
    repeated    tied, with N and D worth less as U unique tokens come again   analysis/repeated.py

With C = 6 N D, a M^alpha C^-alpha is a 6^-alpha N^-2alpha: the law of over-training says that N and D have one exponent.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

from analysis.chinchilla import DELTA, Array
from analysis.ladder import Ladder
from analysis.law import PER_TOKEN
from analysis.law import fit as chinchilla_fit
from analysis.repeated import worth
from conf.errors import Refused

BENDS = (-0.3, -0.1, 0.05)  # of Farseer's exponents, to start from
GAMMAS = (0.5, 1.0, 2.0)
SHARES = (0.0, 0.5, 1.0)  # of alpha, that parameters not visited count
DECAYS = ((5.0, 15.0, 50.0), (2.0, 5.0, 20.0))  # R_D* and R_N*, to start from
RIDGE = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # of R_D*


class At(NamedTuple):
    """Where a loss is asked for: ln N and ln D from their means, the means, ln of total by active parameters, ln of unique tokens."""

    x: Array
    y: Array
    means: tuple[float, float]
    spare: Array
    unique: Array

    @classmethod
    def of(cls, params: Array, tokens: Array, total: Array, unique: Array, means: tuple[float, float]) -> "At":
        return cls(np.log(params) - means[0], np.log(tokens) - means[1], means, np.log(total) - np.log(params), np.log(unique))


class Form(NamedTuple):
    """ln L of thetas where it is asked for, and where a search starts."""

    names: tuple[str, ...]
    log: Callable[[Array, At], Array]
    starts: Callable[[Ladder], Iterable[Array]]


class Fitted(NamedTuple):
    """A form with its theta, centred at the means of its own runs; objective as in analysis/chinchilla.py."""

    form: str
    theta: Array
    means: tuple[float, float]
    objective: float

    def loss(self, params: Array, tokens: Array, total: Array | None = None, unique: Array | None = None) -> Array:
        """L of N and D, arrays of one shape, of dense models on fresh tokens where nothing else is said.

        Infinite where a form that bends too much leaves the numbers.
        """
        at = At.of(params, tokens, params if total is None else total, tokens if unique is None else unique, self.means)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.nan_to_num(np.exp(FORMS[self.form].log(self.theta, at)), nan=np.inf)

    def of(self, ladder: Ladder) -> Array:
        """L of each of the runs."""
        return self.loss(ladder.params, ladder.tokens, ladder.total, ladder.unique)

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


def _chinchilla(theta: Array, at: At) -> Array:
    a, b, e, alpha, beta = theta
    return np.asarray(np.logaddexp(np.logaddexp(a - alpha * at.x, b - beta * at.y), e))


def _tied(theta: Array, at: At) -> Array:
    a, b, e, alpha = theta
    return _chinchilla(np.array([a, b, e, alpha, alpha]), at)


def _coupled(theta: Array, at: At) -> Array:
    a, b, e, alpha, beta, gamma = theta
    return np.asarray(np.logaddexp(gamma * np.logaddexp(a - alpha * at.x, b - beta * at.y), e))


def _kaplan(theta: Array, at: At) -> Array:
    a, b, e, alpha, gamma = theta
    return _coupled(np.array([a, b, e, alpha, 1.0, gamma]), at)


def _farseer(theta: Array, at: At) -> Array:
    a, b, k, c, d, m, e, f, n = theta
    power = np.exp(e * np.exp(n * at.x) + f)
    return np.asarray(np.logaddexp(a * np.exp(k * at.x) + b, c * np.exp(m * at.x) + d - power * (at.y + at.means[1])))


def _mixture(theta: Array, at: At) -> Array:
    a, b, e, alpha, beta, gamma = theta
    return np.asarray(np.logaddexp(np.logaddexp(a - alpha * at.x - gamma * at.spare, b - beta * at.y), e))


def _repeated(theta: Array, at: At) -> Array:
    """Tied, of what parameters and tokens are worth: from those that are best for the unique tokens on, and from the second pass on."""
    a, b, _, alpha, tokens_decay, params_decay = theta
    best = at.unique + (a - b) / alpha + at.means[0] - at.means[1]
    worths = []
    for log, once, decay in ((at.x + at.means[0], best, params_decay), (at.y + at.means[1], at.unique, tokens_decay)):
        once = np.minimum(once, log)
        worths.append(once + np.log(worth(np.ones(1), np.expm1(log - once), np.exp(decay))))
    return _tied(theta[:4], at._replace(x=worths[0] - at.means[0], y=worths[1] - at.means[1]))


def _tied_start(ladder: Ladder) -> Array:
    a, b, e, alpha, beta = _first(ladder)
    return np.array([a, b, e, (alpha + beta) / 2])


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


def _mixture_starts(ladder: Ladder) -> Iterable[Array]:
    first = _first(ladder)
    yield from (np.append(first, share * first[3]) for share in SHARES)


def _repeated_starts(ladder: Ladder) -> Iterable[Array]:
    first = _tied_start(ladder)
    yield from (np.append(first, np.log(decays)) for decays in product(*DECAYS))


FORMS = {
    "chinchilla": Form(("a", "b", "e", "alpha", "beta"), _chinchilla, lambda ladder: [_first(ladder)]),
    "tied": Form(("a", "b", "e", "alpha"), _tied, lambda ladder: [_tied_start(ladder)]),
    "kaplan": Form(("a", "b", "e", "alpha", "gamma"), _kaplan, _kaplan_starts),
    "coupled": Form(("a", "b", "e", "alpha", "beta", "gamma"), _coupled, _coupled_starts),
    "farseer": Form(("a", "b", "k", "c", "d", "l", "e", "f", "m"), _farseer, _farseer_starts),
    "mixture": Form(("a", "b", "e", "alpha", "beta", "gamma"), _mixture, _mixture_starts),
    "repeated": Form(("a", "b", "e", "alpha", "ln_R_D", "ln_R_N"), _repeated, _repeated_starts),
}


def fit_form(ladder: Ladder, name: str, delta: float = DELTA, held: Mapping[str, float] | None = None,
             also: Iterable[Array] = ()) -> Fitted:  # fmt: skip
    """The best of a form over its starts and `also`, with the parameters named in `held` at their values.

    Raises Refused where there are not more runs than parameters, or the runs have not what the form is about.
    """
    form = FORMS[name]
    _refuse_unlike(ladder, name)
    means = float(np.log(ladder.params).mean()), float(np.log(ladder.tokens).mean())
    at = At.of(ladder.params, ladder.tokens, ladder.total, ladder.unique, means)
    target, heavy = np.log(ladder.loss), np.sqrt(ladder.weight)
    fixed = np.array([(held or {}).get(one, np.nan) for one in form.names])
    free = np.isnan(fixed)

    def whole(some: Array) -> Array:
        theta = fixed.copy()
        theta[free] = some
        return theta

    def misses(some: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.nan_to_num(heavy * (form.log(whole(some), at) - target), nan=1e3, posinf=1e3, neginf=-1e3).clip(-1e3, 1e3)

    found = [
        least_squares(misses, start[free], loss="huber", f_scale=delta, x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=400)
        for start in (*form.starts(ladder), *also)
    ]
    best = min(found, key=lambda one: one.cost)
    return Fitted(name, whole(best.x), means, float(best.cost))


def fits(ladder: Ladder, name: str) -> bool:
    """Whether the runs have what a form is about: mixtures and dense models, tokens that came again."""
    spare, again = ladder.total > ladder.params * 1.001, ladder.tokens > ladder.unique * 1.001
    differ = len(np.unique((ladder.total / ladder.params).round(3))) > 1
    return {"mixture": bool(spare.any()) and differ, "repeated": bool(again.any())}.get(name, True)


def _refuse_unlike(ladder: Ladder, name: str) -> None:
    parameters = len(FORMS[name].names)
    if len(ladder) <= parameters:
        raise Refused(f"form={name} has {parameters} parameters; {len(ladder)} runs are too few, {parameters + 1} the least")
    if not fits(ladder, name):
        raise Refused({"mixture": "form=mixture tells all parameters from the active; these runs need a column total_params that differs",
                       "repeated": "form=repeated tells tokens that come again; these runs need a column unique_tokens with fewer than "
                                   "tokens in some rows"}[name])  # fmt: skip


def ridge(ladder: Ladder, delta: float = DELTA, held: Mapping[str, float] | None = None) -> list[tuple[float, float, float]]:
    """(R_D*, the R_N* that goes best with it, objective): many pairs fit nearly alike. Each search also starts from the best of all."""
    best, rows = fit_form(ladder, "repeated", delta, held), []
    for decay in RIDGE:
        found = fit_form(ladder, "repeated", delta, {**(held or {}), "ln_R_D": float(np.log(decay))}, also=[best.theta])
        rows.append((decay, float(np.exp(found.theta[5])), found.objective))
    return rows
