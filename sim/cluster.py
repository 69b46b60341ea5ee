"""The machines under one clock: workers for the data stages, servers for the job, spares and repair.

A garage: cars on the road, spare cars in the yard, broken ones in the workshop. What leaves the workshop joins the yard.
"""

import math
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, TypeVar
from zlib import crc32

import numpy as np
import simpy
from numpy.typing import NDArray

from conf.plan import Plan
from sim.kernels import Rates
from sim.timeline import Bar, Timeline

MANY = 5_000  # tasks that are simulated one by one
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


def pool(world: World, stage: str, seconds: Sequence[float] | NDArray[np.float64], moved: float, first: float = 0.0) -> Course[None]:
    """Workers that each take the next task until none is left; the first one of each takes `first` seconds more.

    `moved` bytes come from the storage, which all share: where it is slower than the workers it sets their pace. A task that fails is done
    again by whoever is free next. Beyond MANY tasks, workers go in gangs with a gang's share of tasks each: the sum is the same.
    """
    if not len(seconds):
        return
    plan, dice = world.plan, np.random.default_rng([world.plan.seed, crc32(stage.encode())])
    workers = min(len(seconds), crew(plan))
    times = np.asarray(seconds) * dice.lognormal(-(plan.data.spread**2) / 2, plan.data.spread, len(seconds))  # of mean 1
    if plan.data.runner == "ray":
        times *= max(1.0, moved / plan.cluster.storage_read / (float(times.sum()) / workers))
    failed = times[dice.random(len(times)) < plan.data.failing]
    times = np.concatenate([times, failed * dice.random(len(failed))])  # what was done before they failed, somewhere between
    gang = -(-len(times) // MANY)
    pairs = [(float(part.sum()) / gang, int(part.size)) for part in np.array_split(times, -(-len(times) // gang))]
    tasks = iter(enumerate(pairs))

    def work(number: int) -> Course[None]:
        more = first
        for task, (duration, count) in tasks:
            start = world.now
            yield world.env.timeout(duration + more)
            more = 0.0
            name = f"task {task}" if count == 1 else f"{count} tasks"
            world.timeline.bars.append(Bar(name, start, world.now, stage, f"worker {number}"))

    yield world.env.all_of([world.env.process(work(number)) for number in range(max(1, workers // gang))])


def crew(plan: Plan) -> int:
    """Workers of the data stages: a core each, of one server, or with a cluster engine of all."""
    cluster = plan.cluster
    if plan.data.runner == "ray":
        return cluster.nodes * cluster.cores_per_node
    return min(cluster.gpus_per_node, cluster.cores_per_node)


def per_second(count: float, seconds: float) -> float:
    """A rate, also of a stage that had nothing to do."""
    return count / seconds if seconds else math.nan


class Servers:
    """The job's slots, the servers that fill them, the spares in the yard, cold ones that must boot, and the workshop.

    A slot's first server has the slot's own number, so only what changed is written down: a million servers cost nothing.
    """

    def __init__(self, world: World) -> None:
        cluster = world.plan.cluster
        self.world, self.nodes = world, cluster.nodes
        self.away: set[int] = set()  # first servers that are not in their slot
        self.guests: dict[int, int] = {}  # slot of each server that came later
        self.empty: dict[int, int] = {}  # slots without a server, and who left each
        self.yard = simpy.Store(world.env)
        self.yard.items = list(range(cluster.nodes, cluster.nodes + cluster.spares))
        self.cold = cluster.cold_spares
        self.hand: list[int] = []  # fetched from the yard, not yet in a slot

    @property
    def short(self) -> int:
        """Servers that the job lacks and nobody has fetched yet."""
        return len(self.empty) - len(self.hand)

    def slot(self, server: int) -> int | None:
        """The slot that a server fills, None when it is not in the job."""
        if server < self.nodes and server not in self.away:
            return server
        return self.guests.get(server)

    def fail(self, server: int, cause: str, repair: float) -> int:
        """Empty a server's slot and send it to the workshop; returns the slot."""
        slot = self.slot(server)
        assert slot is not None, f"server {server} is not in the job"
        self.guests.pop(server, None)
        if server < self.nodes:
            self.away.add(server)
        self.empty[slot] = server
        now = self.world.now
        self.world.timeline.bars.append(Bar(cause, now, now + repair, "repair", f"server {server} in repair"))
        done = self.world.env.timeout(repair, server)
        assert done.callbacks is not None
        done.callbacks.append(self._mended)
        return slot

    def _mended(self, done: simpy.Event) -> None:
        self.world.event("cluster", "repaired", server=done.value)
        self.yard.put(done.value)

    def take(self) -> bool:
        """Take at once what the yard has, then cold spares; returns whether one of these must boot first."""
        while self.short and self.yard.items:
            self.hand.append(self.yard.items.pop(0))
        booting = min(self.cold, self.short)
        first = self.world.plan.cluster.servers - self.cold
        self.hand += range(first, first + booting)
        self.cold -= booting
        return booting > 0

    def one(self, boot: float) -> Course[int]:
        """A single server: a spare, else a cold one that boots, else the next that is repaired."""
        if self.yard.items or not self.cold:
            got = yield self.yard.get()
            return int(got)
        self.cold -= 1
        yield self.world.env.timeout(boot)
        return self.world.plan.cluster.servers - self.cold - 1

    def wait(self, patience: float) -> Course[None]:
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
        """Put the servers at hand into empty slots, the longest empty first; returns pairs of the old and the new server."""
        pairs = list(zip(self.empty, self.hand, strict=False))
        self.hand = []
        return [(self.put(slot, server), server) for slot, server in pairs]

    def put(self, slot: int, server: int) -> int:
        """A server into an empty slot; returns the one that was there before."""
        old = self.empty.pop(slot)
        if server == slot:
            self.away.discard(server)
        else:
            self.guests[server] = slot
        return old
