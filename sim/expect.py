"""A run in closed form: what its many possible lives come to on average, in microseconds, for sweeps of thousands of plans.

Failures strike steps at a constant rate; each costs the work since the last checkpoint and a fixed time down. The mean
share of useful time is exact for that (renewal reward; Daly 2006 with failures only while running):

    eta = rate tau / ((1 + rate down) (exp(rate (tau + save)) − 1)),   tau the work between checkpoints

A save that is only safe `later` after training went on costs a factor exp(−rate later): the fall is longer by that much.

What only a simulated life knows is left out: waiting for spares, failures while coming up, stragglers, silent corruption, spikes,
lemons, replicas that restart alone, smaller meshes, the hour of the day, limits and pauses of the feed, what the
provider does not bill, the data stages.
"""

import math
from collections.abc import Mapping

from conf.arithmetic import flops_per_token
from conf.plan import Plan
from conf.record import Value
from sim.checkpoint import tiers
from sim.failures import population, rate
from sim.kernels import rates
from sim.money import bill
from sim.pace import Pace
from sim.power import Meter
from sim.recovery import detector
from sim.summary import loss

HOUR = 3600.0
EIGHTY = 1.2816  # standard deviations on either side of the mean that hold 80% of a normal distribution


def expected(plan: Plan, pace: Pace) -> dict[str, float]:
    """Quantities of the run by name, means over lives."""
    speed, falls = rates(plan), rate(plan)
    remote = tiers(plan, speed, pace.stride)[0]
    down = _down(plan, speed.init + remote.load)
    budget = math.inf if plan.train.stop_after is None else plan.train.stop_after
    whole = math.inf if plan.train.steps is None else plan.train.steps * pace.stride
    work = min(plan.checkpoint.every * pace.stride if plan.checkpoint.every else math.inf, whole, budget)
    pause = remote.block + (work / (plan.train.evaluate_every * pace.stride) * pace.evaluate if plan.train.evaluate_every else 0.0)
    eta = useful(falls, work, pause, down) * math.exp(-falls * remote.later)
    wall = min(speed.init + (whole / eta if eta else math.inf), budget)
    done = min(whole, max(0.0, wall - speed.init) * eta)
    tokens = done / pace.step_time * plan.tokens_per_step
    up = 1 / (1 + falls * down)
    told = {"pretrain.step_time": pace.step_time, "pretrain.tokens_per_s": pace.tokens_per_s, "pretrain.mfu": pace.mfu,
            "pretrain.peak_memory": pace.memory, "run.wall_clock": wall, "run.tokens": tokens, "run.ettr": done / wall,
            "run.interruptions": falls * wall * up,
            "run.flops": tokens * float(flops_per_token(plan.model, plan.train.seq_len))}  # fmt: skip
    if plan.law.name != "none" and tokens:
        told["pretrain.final_loss"] = loss(plan, tokens)
    return told | _drawn(plan, pace, wall, steps=up * work / (work + pause))


def banded(plan: Plan, pace: Pace, told: Mapping[str, Value]) -> dict[str, Value]:
    """Quantities of one life with the 10th and 90th percentile that the step model's error leaves them.

    The life is not lived again: what a slower or faster step does to a quantity is what it does to its mean.
    """
    fast, slow = (math.exp(side * EIGHTY * pace.error) for side in (-1, 1))
    usual, *sides = (expected(plan, pace.slowed(factor)) for factor in (1.0, fast, slow))
    shares = {name: sorted(side.get(name, 0.0) / mean for side in sides) for name, mean in usual.items() if mean}
    bands = {name: share for name, share in shares.items() if share[0] < share[1]}
    return {name: value.between(*bands[name]) if name in bands else value for name, value in told.items()}


def useful(falls: float, work: float, pause: float, down: float) -> float:
    """Mean share of the time in work that counts.

    >>> round(useful(falls=1 / 11136, work=900, pause=6, down=300), 3)  # Llama 3's failures
    0.929
    """
    exponent = falls * (work + pause)
    if exponent > 700:
        return 0.0
    growth = math.expm1(exponent) / exponent if exponent else 1.0
    return work / ((1 + falls * down) * (work + pause) * growth)


def _down(plan: Plan, back: float) -> float:
    """Mean time from a failure to the next step: over causes, by their rates."""
    total, failures, spent = rate(plan), plan.failures, 0.0
    for cause in failures.causes.values():
        if cause.how == "slow":
            continue
        _, seen = detector(failures, cause)
        noticed = seen.mean if seen and cause.how in ("stop", "hang") else 0.0
        found = 0.0 if cause.planned else failures.diagnose.mean
        swapped = 0.0 if cause.per == "job" else failures.reallocate.mean
        spent += cause.rate * population(plan, cause) * (noticed + failures.abort.mean + found + swapped + back)
    return spent / total if total else 0.0


def _drawn(plan: Plan, pace: Pace, wall: float, steps: float) -> dict[str, float]:
    """Energy, carbon, hours and money of ranks that spend the share `steps` of the time in steps and the rest in other states."""
    meter = Meter(plan, pace.mix, pace.arithmetic, pace.stalled)
    energy = wall * (steps * meter.watts(pace.mix) + (1 - steps) * meter.watts({"init": 1.0}))
    hours = (plan.ranks + plan.cluster.spares * plan.cluster.gpus_per_node) * wall / HOUR
    return {"run.gpu_hours": hours, "run.cost": bill(plan, hours, wall, energy).total[0], "run.energy": energy,
            "run.carbon_location": energy * plan.grid.intensity}  # fmt: skip
