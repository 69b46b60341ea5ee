"""L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 10), fitted to the logarithm of losses by damped Newton steps.

    minimise over (a, b, e, alpha, beta)   Σ w ρ_δ(ln L̂ − ln L),   ln L̂ = ln(exp(a − alpha x) + exp(b − beta y) + exp(e))

with x = ln N and y = ln D less their means, and ρ_δ Huber's function. Centred, A and alpha no longer trade against each other, and all
usual starts end at one optimum; the sum is divided by δ, so that it is of order one: minimisers whose tolerances are
absolute stop early at a mean of a thousandth of that, and say that they have converged. Many samples of the same points are fitted
together, each by its weights, which is what a bootstrap needs.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NAMES = ("E", "A", "B", "alpha", "beta")
DELTA = 1e-3  # of the logarithm of a loss (Hoffmann et al. 2022, section 3.3)
SMALLEST = 1e-3  # a smaller delta is approached from here
GENTLE, STEPS, CHUNK = 6, 200, 64  # reweighted steps before Newton's; the most of all; samples that share the processor's cache
SHARES, EXPONENTS = (0.3, 0.5, 0.7), (0.15, 0.3, 0.5, 0.8)
DONE = 1e-9  # length of a step


class Points(NamedTuple):
    """Runs: logarithms of parameters and tokens, centred, and of losses; each (n,), or losses (s, n) that differ between samples."""

    x: Array
    y: Array
    loss: Array
    means: tuple[float, float]

    @classmethod
    def of(cls, params: Array, tokens: Array, loss: Array) -> "Points":
        x, y = np.log(params), np.log(tokens)
        return cls(x - x.mean(), y - y.mean(), np.log(loss), (float(x.mean()), float(y.mean())))

    def only(self, samples: Any) -> "Points":
        """For some of the samples."""
        return self if self.loss.ndim == 1 else self._replace(loss=self.loss[samples])


def starts(points: Points) -> Array:
    """(144, 5): the typical loss divided among the three terms, and exponents."""
    middle = float(np.exp(np.median(points.loss)))
    levels = [
        (np.log(middle * (1 - s) * t), np.log(middle * (1 - s) * (1 - t)), np.log(middle * s)) for s in (0.5, 0.7, 0.9) for t in SHARES
    ]
    return np.array([(*level, alpha, beta) for level in levels for alpha in EXPONENTS for beta in EXPONENTS])


def solve(points: Points, weights: Array, theta: Array, delta: float = DELTA) -> tuple[Array, Array]:
    """Optima (s, 5) and objectives Σ w ρ_δ (s,) of samples with weights (s, n), from theta (s, 5)."""
    for near in np.geomspace(SMALLEST, delta, 9)[:-1] if delta < SMALLEST else ():
        theta, _ = _chunks(points, weights, theta, float(near))
    return _chunks(points, weights, theta, delta)


def _chunks(points: Points, weights: Array, theta: Array, delta: float) -> tuple[Array, Array]:
    chunks = [slice(at, at + CHUNK) for at in range(0, len(theta), CHUNK)]
    parts = [_newton(points.only(chunk), weights[chunk], theta[chunk], delta) for chunk in chunks]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def parameters(theta: Array, points: Points) -> Array:
    """(…, 5) of E, A, B, alpha, beta as they are printed, of thetas (…, 5)."""
    a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
    x, y = points.means
    return np.stack([np.exp(e), np.exp(a + alpha * x), np.exp(b + beta * y), alpha, beta], -1)


def curvature(points: Points, weights: Array, theta: Array, delta: float = DELTA) -> Array:
    """The Hessian (5, 5) of the objective at one theta."""
    state = _State(points, weights[None], theta[None], delta)
    return np.asarray(state.hessian(False)[0] * delta)


class _State:
    """Predictions at thetas (s, 5): the share of each term, residuals, and their derivatives."""

    def __init__(self, points: Points, weights: Array, theta: Array, delta: float) -> None:
        self.points, self.weights, self.delta = points, weights, delta
        logs = np.stack([theta[:, :1] - theta[:, 3:4] * points.x, theta[:, 1:2] - theta[:, 4:] * points.y,
                         np.broadcast_to(theta[:, 2:3], (len(theta), len(points.x)))])  # fmt: skip
        most = logs.max(0)
        terms = np.exp(logs - most)
        total = terms.sum(0)
        self.shares = terms / total  # (3, s, n) of N's term, D's term, E
        self.miss = most + np.log(total) - points.loss
        small = np.abs(self.miss)
        self.inside = small <= delta
        huber = np.where(self.inside, self.miss**2 / 2, delta * (small - delta / 2))
        self.objective = (weights * huber).sum(1) / delta
        self.slope = weights * np.clip(self.miss, -delta, delta) / delta  # of the objective by the prediction
        one, two, three = self.shares
        self.by = np.stack([one, two, three, -one * points.x, -two * points.y], -1)  # (s, n, 5) of the prediction by theta

    @property
    def gradient(self) -> Array:
        return np.asarray((self.slope[:, None, :] @ self.by)[:, 0])

    def hessian(self, gentle: bool) -> Array:
        """The whole one, or for the first steps the positive one of least squares with weights that fall with a point's distance."""
        if gentle:
            return self._outer(self.weights / np.maximum(np.abs(self.miss), self.delta))
        inner = self._outer(self.weights * self.inside / self.delta - self.slope)
        one, two, three = (self.slope * share for share in self.shares)
        x, y = self.points.x, self.points.y
        more = np.zeros((len(self.slope), 5, 5))
        for i, j, values in (
            (0, 0, one),
            (1, 1, two),
            (2, 2, three),
            (3, 3, one * x * x),
            (4, 4, two * y * y),
            (0, 3, -one * x),
            (1, 4, -two * y),
        ):
            more[:, i, j] = more[:, j, i] = values.sum(1)
        return inner + more

    def _outer(self, weights: Array) -> Array:
        return np.asarray((self.by * weights[..., None]).transpose(0, 2, 1) @ self.by)


def _newton(points: Points, weights: Array, theta: Array, delta: float) -> tuple[Array, Array]:
    theta, best = theta.copy(), np.full(len(theta), np.inf)
    damping, going = np.full(len(theta), 1e-3), np.arange(len(theta))
    state: Any = None
    for step in range(STEPS):
        now = points.only(going)
        state = _State(now, weights[going], theta[going], delta)
        best[going] = state.objective
        move = _step(state, damping[going], step < GENTLE)
        tried = _State(now, weights[going], theta[going] + move, delta).objective
        better = tried <= state.objective
        theta[going[better]] += move[better]
        best[going[better]] = tried[better]
        damping[going] = np.where(better, damping[going] / 5, damping[going] * 4)
        small = np.abs(move).max(1) < DONE
        going = going[~(small & (better | (damping[going] > 1e12)))] if step >= GENTLE else going
        if not len(going):
            break
    return theta, best * delta


def _step(state: _State, damping: Array, gentle: bool) -> Array:
    """Newton's step with the curvature's sign made positive, damped, and not longer than two."""
    values, vectors = np.linalg.eigh(state.hessian(gentle))
    values = np.abs(values) + damping[:, None] * np.maximum(1e-12, np.abs(values).max(1, keepdims=True))
    move = -np.einsum("sij,sj->si", vectors, np.einsum("sji,sj->si", vectors, state.gradient) / values)
    return np.asarray(move * np.minimum(1, 2 / np.maximum(1e-300, np.abs(move).max(1, keepdims=True))))
