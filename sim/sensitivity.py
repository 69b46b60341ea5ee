"""What costs most: the plan lived again with one thing changed at a time, under the same faults.

Each cause is taken away, each knob turned; every life is compared with the life of the same seed, so that what the weather
adds to both falls out of the difference.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from conf.duration import Duration
from conf.plan import Plan
from conf.rules import problems
from conf.units import show
from sim.checkpoint import best_interval, tiers
from sim.failures import rate
from sim.kernels import rates
from sim.life import live
from sim.lives import clocked, spread_out
from sim.pace import Pace, pace

LEAST = 4  # lives a variant
DETECTION = ("detect", "heartbeat", "timeout", "score", "checksum")


@dataclass(frozen=True)
class Gain:
    """What one change does to the effective training time ratio (ETTR), and what that is worth."""

    change: str
    ettr: float
    gain: float  # in ETTR
    error: float  # standard error of the gain
    worth: float  # [USD]: the run's cost times the relative gain


def variants(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes by name; those that break the plan's rules are passed over."""
    causes = plan.failures.causes
    for name in causes:
        yield f"no {name}", plan.but(**{"failures.causes": {n: c for n, c in causes.items() if n != name}})
    for name, changes in _knobs(plan):
        changed = plan.but(**changes)
        if not problems(changed):
            yield name, changed


def _knobs(plan: Plan) -> Iterator[tuple[str, dict[str, object]]]:
    f, every, spares = plan.failures, plan.checkpoint.every, plan.cluster.spares
    remote = tiers(plan, rates(plan), pace(plan).stride)[0]
    best = round(best_interval(remote.block, 1 / rate(plan)) / pace(plan).stride) if rate(plan) else 0
    for name, count in (("half the spares", spares // 2), ("twice the spares", 2 * spares)):
        yield f"{name} ({count})", {"cluster.spares": count}
    for steps in sorted({every // 2, 2 * every, best} - {0, every}):
        yield f"checkpoints every {steps:,} steps" + (", the best interval" if steps == best else ""), {"checkpoint.every": steps}
    yield "checkpoints beside training", {"checkpoint.asynchronous": not plan.checkpoint.asynchronous}
    yield "detection in half the time", {f"failures.{phase}": _half(getattr(f, phase)) for phase in DETECTION}
    yield "diagnosis and swap in half the time", {f"failures.{phase}": _half(getattr(f, phase)) for phase in ("diagnose", "reallocate")}
    yield "start of all ranks in half the time", {"failures.init": _half(f.init)}
    yield "repair in half the time", {"failures.repair": _half(f.repair)}
    yield "a smaller mesh where no spare is left", {"failures.without_spare": "shrink"}
    yield "replicas that restart alone", {"failures.restart": "replica"}


def _half(span: Duration | None) -> Duration | None:
    return None if span is None else replace(span, scale=span.scale / 2)


def _lived(step: Pace, task: tuple[Plan, int]) -> tuple[float, float]:
    """ETTR and cost of one life."""
    plan, seed = task
    life = live(plan, seed, step, rates(plan))
    return life.steps * step.stride / life.trained, life.footprint.cost[0]


def gains(plan: Plan, lives: int) -> list[Gain]:
    """Every change with what it gains, the largest first."""
    count, step = max(LEAST, lives), pace(plan)
    changed = [("", plan), *variants(plan)]
    work = partial(_lived, step)
    _, each = clocked(lambda: work((plan, plan.seed)))
    tasks = [(other, plan.seed + i) for _, other in changed for i in range(count)]
    told = np.array(spread_out(work, tasks, each)).reshape(len(changed), count, 2)
    usual, cost = told[0, :, 0], float(told[0, :, 1].mean())
    found = []
    for (name, _), lived in zip(changed[1:], told[1:, :, 0], strict=True):
        differences = lived - usual
        gain = float(differences.mean())
        error = float(differences.std(ddof=1)) / math.sqrt(count)
        found.append(Gain(name, float(usual.mean()), gain, error, cost * gain / float(usual.mean())))
    return sorted(found, key=lambda one: -one.gain)


def table(found: list[Gain]) -> str:
    """For a person: points of ETTR, with their standard error, and dollars."""
    usual = found[0].ettr if found else math.nan
    lines = [f"what costs most: one change at a time under the same faults (effective time {usual:.3f} now)"]
    for one in found:
        lines.append(f"  {one.change:46} {one.gain * 100:+6.2f} ± {one.error * 100:.2f} points   {show(one.worth, 'USD'):>16}")
    return "\n".join(lines)
