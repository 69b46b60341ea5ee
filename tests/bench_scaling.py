"""Is a law fitted fast? `python -m tests.bench scaling`: the bootstrap beside a loop of scipy's BFGS, in one process.

The loop, with gradients, is what Epoch's notebook does: each sample of the 240 points fitted from the fit of all of them. Both minimise the
same sum; a sample counts for the loop only where it ends within 1e-6 of this project's optimum.
"""

import time
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from analysis.chinchilla import DELTA, Points, solve, starts
from analysis.ladder import Ladder
from analysis.law import resampled

SAMPLES, LOOPED = 4000, 200
POINTS = Path(__file__).parents[2] / "shared/data/scaling/epoch_chinchilla_fig4.csv"


def scaling() -> None:
    """Seconds of CPU of each, and their ratio."""
    ladder = Ladder.read(str(POINTS)).without_worst(5)
    points = Points.of(ladder.params, ladder.tokens, ladder.loss)
    begin = time.process_time()
    first = starts(points)
    thetas, objectives = solve(points, np.tile(ladder.weight, (len(first), 1)), first)
    single, best = time.process_time() - begin, thetas[objectives.argmin()]
    weights = resampled(ladder, SAMPLES, "run", 0)
    begin = time.process_time()
    _, ours = solve(points, weights, np.tile(best, (SAMPLES, 1)))
    batched = (time.process_time() - begin) / SAMPLES
    begin = time.process_time()
    theirs = np.array([minimize(value, best, (points, one), "BFGS", jac=gradient, options={"gtol": 1e-8}).fun for one in weights[:LOOPED]])
    looped = (time.process_time() - begin) / LOOPED
    reached = float((theirs * DELTA <= ours[:LOOPED] * (1 + 1e-6)).mean())
    print(f"one fit {single:.2f} s; 4,000 samples {batched * SAMPLES:.1f} s, by the loop {looped * SAMPLES:.0f} s:")
    print(f"{looped / batched:.1f} times as fast (asked: at least 10); {reached:.0%} of the loop's samples at the optimum")


def value(theta: np.ndarray, points: Points, weights: np.ndarray) -> float:
    miss = _parts(theta, points)[0]
    return float((weights * np.where(abs(miss) <= DELTA, miss**2 / 2, DELTA * (abs(miss) - DELTA / 2))).sum() / DELTA)


def gradient(theta: np.ndarray, points: Points, weights: np.ndarray) -> np.ndarray:
    miss, (one, two, three) = _parts(theta, points)
    slope = weights * np.clip(miss, -DELTA, DELTA) / DELTA
    return np.array([(slope * by).sum() for by in (one, two, three, -one * points.x, -two * points.y)])


def _parts(theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
    a, b, e, alpha, beta = theta
    logs = np.stack([a - alpha * points.x, b - beta * points.y, np.full(len(points.x), e)])
    total = np.logaddexp.reduce(logs, 0)
    return total - points.loss, np.exp(logs - total)


if __name__ == "__main__":
    scaling()
