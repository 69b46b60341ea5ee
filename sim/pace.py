"""The pace of a run: what the step model says of one optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from conf.plan import Plan
from sim.parallel import steps


@dataclass(frozen=True)
class Pace:
    """One optimizer step: how long, of what, in which memory."""

    step_time: float  # [s]
    mix: dict[str, float]  # share of each state in a step
    evaluate: float  # one evaluation [s]
    memory: float  # peak on a rank [B]
    mfu: float
    tokens_per_s: float
    error: float = 0.0  # standard deviation of the logarithm of step_time: how far off predictions of such steps have been
    fullness: float = 1.0  # mean batch over the full one: less than 1 where the batch warms up
    arithmetic: float = 1.0  # share of compute in matrix products and attention
    stalled: float = 0.0  # share of compute in waiting for the host; the rest moves tensors
    again: float = 1.0  # time of a step that is done again over that of a new one

    @property
    def stride(self) -> float:
        """Mean time of a step over the run [s]."""
        return self.step_time * self.fullness

    def slowed(self, factor: float) -> "Pace":
        """The same step, so many times as long."""
        mfu, rate = self.mfu / factor, self.tokens_per_s / factor
        return replace(self, step_time=self.step_time * factor, evaluate=self.evaluate * factor, mfu=mfu, tokens_per_s=rate)


def paces(plans: Sequence[Plan], adapters: bool = False) -> list[Pace]:
    """The step model's answer for each plan; with `adapters` for one whose model is frozen but for them."""
    s = steps(plans, adapters)
    names = ("compute", "communication", "bubble", "optimizer")
    seconds = np.stack([getattr(s, name) for name in names])
    found = []
    for i, (parts, total) in enumerate(zip(seconds.T, seconds.sum(axis=0), strict=True)):
        mix = {name: float(part / total) for name, part in zip(names, parts, strict=True) if part > 0}
        evaluate, memory, mfu, rate, error = (float(column[i]) for column in (s.evaluate, s.memory, s.mfu, s.tokens_per_s, s.error))
        busy = (float(part[i] / s.compute[i]) for part in (s.arithmetic, s.stalled))
        found.append(Pace(float(s.step_time[i]), mix, evaluate, memory, mfu, rate, error, _fullness(plans[i]), *busy))
    return found


def _fullness(plan: Plan) -> float:
    """Mean batch of the run's steps over the full one."""
    steps = plan.train.steps
    return plan.samples(steps) / (steps * plan.train.global_batch) if steps else 1.0


def pace(plan: Plan, adapters: bool = False) -> Pace:
    """The step model's answer for one plan."""
    return paces([plan], adapters)[0]


def uncertain(plan: Plan, lives: int, error: float) -> list[float]:
    """How many times as long as predicted the steps of some lives may be: spread evenly over the step model's error, in an
    order that has nothing to do with the lives' faults."""
    even = [NormalDist(0.0, 1.0).inv_cdf((i + 0.5) / lives) for i in range(lives)]
    return [math.exp(error * deviation) for deviation in np.random.default_rng(plan.seed).permutation(even)]
