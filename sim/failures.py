"""Faults: when, of what cause, on which server, and the luck of what follows.

The weather of a run. It is drawn from the seed, the machines and the causes, never from what the job does, so two
policies under the same seed sail through the same storms. Every cause has streams of its own: one cause more or less
leaves the others as they were. Clocks without memory are one clock of the summed rate, so that a million servers cost no
more than the faults they have.
"""

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from conf.plan import Cause, Plan

BLOCK = 128  # draws at a time
OPEN = (1e-12, 1 - 1e-12)  # quantiles are neither 0 nor 1


class Luck(NamedTuple):
    """Quantiles of what takes its time after a fault, the same under every policy."""

    detect: float = 0.5
    abort: float = 0.5
    diagnose: float = 0.5
    reallocate: float = 0.5
    boot: float = 0.5
    init: float = 0.5
    repair: float = 0.5
    lasts: float = 0.5
    spoilt: float = 1.0


class Fault(NamedTuple):
    at: float  # seconds since pre-training began
    cause: str
    server: int  # the first that it hits; a fault of the whole job hits none and names 0
    luck: Luck = Luck()


def population(plan: Plan, cause: Cause, servers: int | None = None) -> float:
    """How many things strike at the cause's rate in so many servers (those of the job): servers that fall together are one."""
    count = plan.cluster.nodes if servers is None else servers
    if cause.per == "job":
        return 1.0
    if cause.per == "switch":
        return float(math.ceil(count / cause.blast))
    return count * (plan.cluster.gpus_per_node if cause.per == "gpu" else 1) / cause.blast


def rate(plan: Plan) -> float:
    """Interruptions of the whole job a second, when its machines are of mature age.

    Table 5 of the Llama 3 paper: 466 in 54 days.

    >>> from conf.program import load
    >>> round(rate(load(["experiment=llama3_405b"])) * 54 * 86400)
    466
    """
    return sum(cause.rate * population(plan, cause) for cause in plan.failures.causes.values() if cause.how != "slow")


def faults(plan: Plan, seed: int) -> Iterator[Fault]:
    """The latent history without end, of all servers, in the job or not: whoever follows it leaves out the idle ones."""
    weights = _weights(plan, seed)
    return heapq.merge(*(_of(plan, name, seed, weights) for name in sorted(plan.failures.causes)))


def spikes(plan: Plan, seed: int) -> Iterator[int]:
    """Steps at which the loss would spike, in order."""
    every, step = plan.failures.spikes.every, 0.0
    while every:
        for gap in default_rng([seed, 3, int(step)]).exponential(every, BLOCK).tolist():
            step += gap
            yield math.ceil(step)


def _of(plan: Plan, name: str, seed: int, weights: NDArray[np.float64] | None) -> Iterator[Fault]:
    cause = plan.failures.causes[name]
    when, early, where, luck = (default_rng([seed, crc32(name.encode()), part]) for part in range(4))
    blocks = math.ceil(plan.cluster.servers / cause.blast)
    total = cause.rate * population(plan, cause, plan.cluster.servers)
    if cause.per == "job":
        strikes: Iterator[tuple[float, int]] = ((at, 0) for at in _times(total, when))
    elif cause.shape == 1.0:
        young, span = plan.failures.infant - 1, plan.failures.infant_span
        times = heapq.merge(_times(total, when), _early(total * young, span, early)) if young > 0 else _times(total, when)
        strikes = zip(times, _places(blocks, where, weights, cause.blast), strict=False)
    else:
        strikes = _renewals(total / blocks, cause.shape, _shares(weights, blocks, cause.blast), when)
    for (at, block), quantiles in zip(strikes, _rows(luck), strict=False):
        yield Fault(at, name, block * cause.blast, Luck(*quantiles))


def _rows(luck: Generator) -> Iterator[list[float]]:
    while True:
        yield from luck.uniform(*OPEN, (BLOCK, len(Luck._fields))).tolist()


def _times(rate: float, when: Generator) -> Iterator[float]:
    """A Poisson process."""
    at = 0.0
    while True:
        for gap in when.exponential(1 / rate, BLOCK).tolist():
            at += gap
            yield at


def _early(rate: float, span: float, when: Generator) -> Iterator[float]:
    """What new machines have beyond that: a Poisson process whose rate dies away as exp(−t / span), by the inverse of its mean."""
    for mass in _times(1.0, when):
        if mass >= rate * span:
            return
        yield -span * math.log1p(-mass / (rate * span))


def _places(blocks: int, where: Generator, weights: NDArray[np.float64] | None, blast: int) -> Iterator[int]:
    """The block of servers that each strike hits: any, or by their frailty."""
    edges = None if weights is None else np.cumsum(_shares(weights, blocks, blast)) / blocks
    while True:
        if edges is None:
            yield from where.integers(blocks, size=BLOCK).tolist()
        else:
            yield from np.minimum(np.searchsorted(edges, where.random(BLOCK), side="right"), blocks - 1).tolist()


def _weights(plan: Plan, seed: int) -> NDArray[np.float64] | None:
    """Failure rate of each server over their mean, None where all are alike; the sum over servers stays what it was."""
    f, count, draw = plan.failures, plan.cluster.servers, default_rng([seed, 2])
    weights = None
    if f.frailty:
        weights = draw.gamma(1 / f.frailty, f.frailty, count)
    if f.lemons and f.lemon_factor != 1:
        worse = np.where(draw.permutation(count) < round(f.lemons * count), f.lemon_factor, 1.0)
        weights = worse if weights is None else weights * worse
    return None if weights is None else weights / weights.mean()


def _shares(weights: NDArray[np.float64] | None, blocks: int, blast: int) -> NDArray[np.float64]:
    """Mean weight of each block's servers."""
    if weights is None:
        return np.ones(blocks)
    starts = np.arange(blocks) * blast
    sums = np.add.reduceat(weights, starts)
    return np.asarray(sums / sums.mean())


def _renewals(rate: float, shape: float, shares: NDArray[np.float64], when: Generator) -> Iterator[tuple[float, int]]:
    """Blocks that each fail anew a Weibull time after their last failure; all are new at the start.

    The mean time is 1 / rate, so the scale is that over Γ(1 + 1 / shape).
    """
    scales = 1 / (rate * shares * math.gamma(1 + 1 / shape))
    ahead = list(zip((scales * when.weibull(shape, len(shares))).tolist(), range(len(shares)), strict=True))
    heapq.heapify(ahead)
    while True:
        at, block = ahead[0]
        yield at, block
        heapq.heapreplace(ahead, (at + float(scales[block] * when.weibull(shape)), block))
