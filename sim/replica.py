"""Replicas of the model that fall and come up by themselves, while the others go on with their share of the batch.

Throughput of K replicas that each fail at rate / K, are out for R, and make all stand still for d: 1 / (1 + rate R / K) × 1 / (1 + rate d)
(fault-tolerant HSDP, arXiv 2602.00277; F8 of the tests).
"""

from collections.abc import Callable, Sequence

from conf.arithmetic import state_bytes
from sim.cluster import Course, Servers, World
from sim.elastic import Shape
from sim.failures import Luck


class Replicas:
    """Which replica each slot belongs to, and those that are being mended."""

    def __init__(self, world: World, servers: Servers, shape: Shape, changed: Callable[[], None]) -> None:
        plan = world.plan
        self.world, self.servers, self.shape, self.changed = world, servers, shape, changed
        self.count = plan.mesh.dp_replicate
        self.alone = plan.failures.restart == "replica" and self.count > 1
        self.inner = plan.dp_shard * plan.mesh.cp * plan.mesh.tp  # neighbouring ranks of one replica
        self.load = float(state_bytes(plan.model)) * self.count / plan.ranks / (plan.cluster.nic_bandwidth / 8)  # from its peers
        self.mending: dict[int, list[int]] = {}  # empty slots of each replica

    def of(self, slot: int) -> int:
        """The replica of a slot: outside it lie the pipeline's stages, inside it shards, context and tensor ranks."""
        return slot * self.world.plan.cluster.gpus_per_node // self.inner % self.count

    def can_go_on(self, slots: Sequence[int]) -> bool:
        """Whether the others go on without the replicas of these slots."""
        hit = {self.of(slot) for slot in slots} | self.mending.keys()
        return self.alone and bool(slots) and len(hit) < self.count and self.shape.servers == self.world.plan.cluster.nodes

    def leave(self, slots: Sequence[int], luck: Luck, stall: float) -> None:
        """Their replicas leave the job; all stand still first, until it is known and the processes have ended."""
        for group in sorted({self.of(slot) for slot in slots}):
            mine = [slot for slot in slots if self.of(slot) == group]
            self.mending[group] = mine
            self.world.env.process(self._mend(group, mine, luck, stall))

    def fold(self) -> None:
        """All fall together: who was being mended is a part of the job again, its empty slots too."""
        self.mending.clear()
        if self.shape.down:
            self.shape.down.clear()
            self.shape.settle()

    def _mend(self, group: int, slots: list[int], luck: Luck, stall: float) -> Course[None]:
        """diagnose → queue → reallocate → init → load from the other replicas → in step again."""
        f = self.world.plan.failures
        yield self.world.env.timeout(stall)
        rungs = [("diagnose", f.diagnose.at(luck.diagnose)), ("queue", 0.0), ("reallocate", f.reallocate.at(luck.reallocate)),
                 ("init", f.init.of_mean(self.world.rates.init).at(luck.init)), ("load", self.load)]  # fmt: skip
        for state, seconds in rungs:
            if self.mending.get(group) is not slots:
                return
            if state == "queue":
                for slot in slots:
                    self._enter(group, "reallocate" if self.servers.cold and not self.servers.yard.items else "queue")
                    server = yield from self.servers.one(f.boot.at(luck.boot))
                    if self.mending.get(group) is not slots:
                        yield self.servers.yard.put(server)
                        return
                    old = self.servers.put(slot, server)
                    self.world.event("pretrain", "replacement", server=old, spare=server)
            else:
                self._enter(group, state)
                yield self.world.env.timeout(seconds)
        if self.mending.get(group) is slots:
            del self.mending[group], self.shape.down[group]
            self.changed()
            self.world.event("pretrain", "rejoin", replica=group)

    def _enter(self, group: int, state: str) -> None:
        self.shape.down[group] = state
        self.changed()
