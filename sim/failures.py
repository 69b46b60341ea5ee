"""Faults: when, of what cause, where, and how long the repair takes.

The weather of a run. It is drawn from the seed, the machines and the causes, never from what the job does, so two
policies under the same seed sail through the same storms.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from conf.plan import Cause, Plan


class Fault(NamedTuple):
    at: float  # seconds since pre-training began
    cause: str
    slot: int  # place in the job whose server it hits
    repair: float  # seconds until that server would be a spare again


def population(plan: Plan, cause: Cause) -> int:
    """How many things fail at the cause's rate."""
    return {"job": 1, "node": plan.cluster.nodes, "gpu": plan.cluster.ranks}[cause.per]


def rate(plan: Plan) -> float:
    """Interruptions of the whole job a second.

    Table 5 of the Llama 3 paper: 466 in 54 days.

    >>> from conf.program import load
    >>> round(rate(load(["experiment=llama3_405b"])) * 54 * 86400)
    466
    """
    return sum(cause.rate * population(plan, cause) for cause in plan.failures.causes.values())


def faults(plan: Plan, seed: int) -> Iterator[Fault]:
    """The latent history without end: a Poisson process of the total rate, each fault with its cause by weight.

    Competing exponential clocks are one clock of the summed rate whose winner is drawn by weight. Repair times come
    from a stream of their own, one a fault, used or not.
    """
    total, names = rate(plan), sorted(plan.failures.causes)
    if total == 0:
        return
    weights = [plan.failures.causes[name].rate * population(plan, plan.failures.causes[name]) for name in names]
    edges = np.array(list(accumulate(weights))) / sum(weights)
    when, repair = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    at = 0.0
    while True:
        at += when.exponential(1 / total)
        which = min(int(np.searchsorted(edges, when.random(), side="right")), len(names) - 1)
        slot = int(when.integers(plan.cluster.nodes))
        yield Fault(at, names[which], slot, float(repair.exponential(plan.failures.repair)))
