"""The machines under one clock: workers for the data stages, servers for the job, spares and repair.

A garage: cars on the road, spare cars in the yard, broken ones in the workshop. What leaves the workshop joins the yard.
"""

import math
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, TypeVar

import simpy

from conf.plan import Plan
from sim.kernels import Rates
from sim.timeline import Bar, Timeline

T = TypeVar("T")
Course: TypeAlias = Generator[simpy.Event, Any, T]  # what takes simulated time and then returns a T


class World:
    """A plan's machines, the clock, and the tape on which all is written."""

    def __init__(self, plan: Plan, rates: Rates) -> None:
        self.plan, self.rates = plan, rates
        self.env = simpy.Environment()
        self.timeline = Timeline(plan.ranks)

    @property
    def now(self) -> float:
        return float(self.env.now)

    def event(self, stage: str, event: str, step: int | None = None, **detail: Any) -> None:
        self.timeline.event(self.now, stage, event, step, **detail)


def pool(world: World, stage: str, seconds: Sequence[float]) -> Course[None]:
    """Workers that each take the next task until none is left."""
    cluster = world.plan.cluster
    count = min(len(seconds), cluster.nodes * min(cluster.gpus_per_node, cluster.cores_per_node))
    tasks = iter(enumerate(seconds))

    def work(number: int) -> Course[None]:
        for task, duration in tasks:
            start = world.now
            yield world.env.timeout(duration)
            world.timeline.bars.append(Bar(f"task {task}", start, world.now, stage, f"worker {number}"))

    yield world.env.all_of([world.env.process(work(number)) for number in range(count)])


def per_second(count: float, seconds: float) -> float:
    """A rate, also of a stage that had nothing to do."""
    return count / seconds if seconds else math.nan


class Servers:
    """The job's slots, the servers that fill them, the spares in the yard, and the workshop."""

    def __init__(self, world: World) -> None:
        cluster = world.plan.cluster
        self.world = world
        self.slots = list(range(cluster.nodes))
        self.empty: list[int] = []
        self.yard = simpy.Store(world.env)
        self.yard.items = list(range(cluster.nodes, cluster.nodes + cluster.spares))
        self.hand: list[int] = []  # fetched from the yard, not yet in a slot

    @property
    def short(self) -> bool:
        """Whether the job lacks servers that nobody has fetched yet."""
        return len(self.hand) < len(self.empty)

    def fail(self, slot: int, cause: str, repair: float) -> int:
        """Empty a slot and send its server to the workshop; returns the server's number."""
        self.empty.append(slot)
        self.world.env.process(self._mend(self.slots[slot], cause, repair))
        return self.slots[slot]

    def _mend(self, server: int, cause: str, repair: float) -> Course[None]:
        now = self.world.now
        self.world.timeline.bars.append(Bar(cause, now, now + repair, "repair", f"server {server} in repair"))
        yield self.world.env.timeout(repair)
        self.world.event("cluster", "repaired", server=server)
        yield self.yard.put(server)

    def fetch(self, patience: float) -> Course[None]:
        """Wait until every empty slot has a server at hand, or for `patience` seconds."""
        late = self.world.env.timeout(min(patience, 1e18))
        while self.short:
            got = self.yard.get()
            yield got | late
            if not got.triggered:
                got.cancel()
                return
            assert isinstance(got.value, int)
            self.hand.append(got.value)

    def fill(self) -> list[tuple[int, int]]:
        """Put the servers at hand into the empty slots; returns pairs of the old and the new server."""
        swapped = []
        for slot, server in zip(self.empty, self.hand, strict=True):
            swapped.append((self.slots[slot], server))
            self.slots[slot] = server
        self.empty, self.hand = [], []
        return swapped
