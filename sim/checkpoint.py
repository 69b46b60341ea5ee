"""Checkpoints: what a save costs, when it is safe, and where a fall ends.

A climber hammers in a piton every so often: each piton takes time, each fall costs the rope since the last one. A piton
half in does not hold, and some that looked firm come out.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from conf.arithmetic import state_bytes, state_tensors
from conf.errors import Refused
from conf.plan import Plan
from conf.units import show
from sim.kernels import Rates

TOKEN = 4.0  # bytes that the data loader reads a token, as the trainer writes them


class Tier(NamedTuple):
    """A place that checkpoints go to."""

    name: str  # remote, local or memory
    every: int  # steps
    block: float  # seconds that training waits
    later: float  # seconds after that until it is safe
    load: float  # seconds


class Saved(NamedTuple):
    step: int
    begun: float  # when the state was taken
    safe: float  # when it can be relied on
    tier: Tier


def tiers(plan: Plan, rates: Rates, stride: float) -> list[Tier]:
    """Where the plan saves, the slowest and safest first.

    A save beside the training shares the storage with the data loader, whose reads take `tokens × 4 B / read bandwidth` of its time.
    """
    size, ranks, c = float(state_bytes(plan.model)), plan.ranks, plan.checkpoint
    copy = size / ranks / rates.snapshot  # every rank copies its share
    reading = min(0.99, plan.tokens_per_step * TOKEN / stride / rates.storage_read)
    write, fixed, back = save(plan, rates), _fixed(plan, rates.save_start, rates.save_tensor), load(plan, rates)
    block, later = (copy, write / (1 - reading)) if c.asynchronous else (write, 0.0)
    found = [Tier("remote", c.every, block, later, back)]
    begin = back - size / rates.storage_read  # of any load
    if c.local_every and plan.cluster.local_bandwidth:
        move = size / plan.cluster.nodes / plan.cluster.local_bandwidth
        found.append(Tier("local", c.local_every, *((copy, fixed + move) if c.asynchronous else (fixed + move, 0.0)), begin + move))
    if c.memory_every:
        send = size / ranks / (plan.cluster.nic_bandwidth / 8) if plan.cluster.nodes > 1 else copy
        block, later = (copy, fixed + send) if c.asynchronous else (copy + fixed, send)
        found.append(Tier("memory", c.memory_every, block, later, begin + send))
    return found


def save(plan: Plan, rates: Rates) -> float:
    """Seconds that the storage takes to write a checkpoint: a constant, something for each tensor, and its bytes."""
    return _fixed(plan, rates.save_start, rates.save_tensor) + float(state_bytes(plan.model)) / rates.storage_write


def load(plan: Plan, rates: Rates) -> float:
    """Seconds that all ranks together take to verify and read one."""
    return _fixed(plan, rates.load_start, rates.load_tensor) + float(state_bytes(plan.model)) / rates.storage_read


def _fixed(plan: Plan, start: float, tensor: float) -> float:
    return start + tensor * float(state_tensors(plan.model))


class Checkpoints:
    """What was saved where, and what of it a fall can rely on."""

    def __init__(self, plan: Plan, rates: Rates, stride: float) -> None:
        self.plan, self.tiers = plan, tiers(plan, rates, stride)
        self.remote = self.tiers[0]
        self.bytes = float(state_bytes(plan.model))
        self.kept: list[Saved] = []  # in the order of time
        budget = plan.train.stop_after
        if plan.failures.causes and budget is not None and self.remote.every * stride > budget:
            every = f"checkpoint.every={self.remote.every} steps are {show(self.remote.every * stride, 's')}"
            raise Refused(f"{every}, longer than train.stop_after={show(budget, 's')}; lower it, or set 0 to save only at the end")

    def next_due(self, step: int) -> float:
        return min(next_due(step, tier.every) for tier in self.tiers)

    def due(self, step: int, over: bool) -> Iterator[Tier]:
        """Tiers to which this step goes; the last step goes to the safest."""
        for tier in self.tiers:
            if (due(step, tier.every) or (over and tier is self.remote)) and not any(s.step == step and s.tier is tier for s in self.kept):
                yield tier

    def busy(self, tier: Tier, now: float) -> float:
        """Seconds until the tier has written what it was given."""
        return max((s.safe - now for s in self.kept if s.tier is tier), default=0.0)

    def add(self, step: int, begun: float, safe: float, tier: Tier) -> Saved:
        """A state taken at `begun`; older ones that nobody keeps are dropped."""
        saved = Saved(step, begun, safe, tier)
        same = [s for s in self.kept if s.tier is tier]
        most = self.plan.checkpoint.keep if tier is self.remote else 1
        forever = self.plan.checkpoint.keep_every if tier is self.remote else 0
        extra = int(tier.later > 0)  # beside what is still being written
        for old in same[: max(0, len(same) + 1 - most - extra)]:
            if not due(old.step, forever):
                self.kept.remove(old)
        self.kept.append(saved)
        return saved

    def fall(self, now: float, held: set[str], before: float = math.inf, step: float = math.inf, bad: int = 0) -> tuple[Saved | None, int]:
        """The checkpoint that the run goes back to, and how many were passed over as unreadable.

        Of those safe now: in a tier that held, taken before `before`, of `step` at most, and not among the newest `bad`. What is
        newer than the one chosen is dropped, with what was half written.
        """
        good = [s for s in self.kept if s.safe <= now and s.tier.name in held and s.begun < before and s.step <= step]
        good.sort(key=lambda s: (s.step, -s.tier.load))
        passed = min(bad, len(good))
        chosen = good[-1 - passed] if passed < len(good) else None
        self.kept = [s for s in good if chosen is not None and s.step <= chosen.step]
        return chosen, passed


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def next_due(step: int, every: int) -> float:
    """The first step after `step` at which something periodic is due.

    >>> next_due(160, 160), next_due(7, 0)
    (320, inf)
    """
    return (step // every + 1) * every if every else float("inf")


def best_interval(save: float, mtbf: float) -> float:
    """Work between saves that wastes least time, exact for failures without memory [s].

    tau* = M (1 + W0(−exp(−C / M − 1))), where the derivative of Daly's (2006) equation 20 vanishes; what a restart costs does not
    matter, nor how long after the save it is safe.

    >>> round(best_interval(save=60, mtbf=3 * 3600), 1)
    1098.8
    """
    from scipy.special import lambertw

    return float(mtbf * (1 + lambertw(-math.exp(-save / mtbf - 1)).real))
