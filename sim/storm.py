"""How the weather meets the job: what each fault does to it, at once or unseen for a while.

The faults come by the wall clock, whatever the job does; one that hits a server outside the job, or a job that waits for
a server, does nothing.
"""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import simpy

from conf.plan import Cause
from sim.cluster import Course
from sim.failures import Fault
from sim.recovery import Stop, detector

if TYPE_CHECKING:
    from sim.pretrain import Pretraining


class Storm:
    """Faults on their way to one job."""

    def __init__(self, job: "Pretraining", faults: Iterator[Fault]) -> None:
        self.job, self.faults = job, faults
        self.world, self.failures = job.world, job.plan.failures
        self.taints: set[float] = set()  # moments at which the state was silently corrupted
        self.slow: dict[simpy.Event, set[int]] = {}  # servers of each straggler, and what happens when they have all left

    def blow(self) -> Course[None]:
        """Every fault in its time."""
        began = self.world.now
        for fault in self.faults:
            yield self.world.env.timeout(began + fault.at - self.world.now)
            if self.job.finished:
                return
            cause = self.failures.causes[fault.cause]
            gone = self.hit(fault, cause)
            if self.job.queueing or not (gone or cause.per == "job"):
                continue
            if cause.how == "slow":
                self.world.env.process(self._slow(fault, gone))
            elif cause.how == "corrupt":
                self.world.env.process(self._corrupt(fault))
            else:
                self.job.stop(Stop(fault, gone))

    def hit(self, fault: Fault, cause: Cause) -> list[int]:
        """Servers that a fault takes from the job: in a slot, in the mesh, in a replica that is up."""
        if cause.per == "job":
            return []
        job = self.job
        reach, mending = job.shape.servers + len(job.servers.empty), job.replicas.mending
        gone = []
        for server in range(fault.server, fault.server + cause.blast):
            slot = job.servers.slot(server)
            if slot is not None and slot < reach and not (mending and job.replicas.of(slot) in mending):
                gone.append(server)
        return gone

    def leave(self, servers: set[int]) -> None:
        """Servers leave the job, whatever for: a straggler that has left drags nobody."""
        for left, slow in self.slow.items():
            if slow & servers:
                slow -= servers
                if not slow:
                    left.succeed()

    def _slow(self, fault: Fault, servers: Iterable[int]) -> Course[None]:
        """A straggler drags all until it recovers or leaves, or until its score tells and it is replaced."""
        cause, shape = self.failures.causes[fault.cause], self.job.shape
        by, span = detector(self.failures, cause)
        lasts, found = cause.lasts.at(fault.luck.lasts), math.inf if span is None else span.at(fault.luck.detect)
        self.world.event("pretrain", "straggler", self.job.here, cause=fault.cause, factor=cause.factor)
        shape.slow.append(cause.factor)
        self.job.changed()
        left = self.world.env.event()
        self.slow[left] = set(servers)
        yield self.world.env.timeout(min(found, lasts)) | left
        del self.slow[left]
        shape.slow.remove(cause.factor)
        self.job.changed()
        gone = self.hit(fault, cause)
        if found < lasts and not left.triggered and (gone or cause.per == "job"):
            self._found(Stop(fault, gone, found=True), by)

    def _corrupt(self, fault: Fault) -> Course[None]:
        """Silent until it is found; then only what was saved before it can be trusted. A fall to such a save heals it unseen."""
        began = self.world.now
        self.taints.add(began)
        cause = self.failures.causes[fault.cause]
        by, span = detector(self.failures, cause)
        assert span is not None
        yield self.world.env.timeout(span.at(fault.luck.detect))
        if began in self.taints:
            self._found(Stop(fault, self.hit(fault, cause), found=True, before=began), by)

    def heal(self, until: float) -> None:
        """The state is again what it was at a moment: what struck it later is undone."""
        self.taints = {moment for moment in self.taints if moment <= until}

    def _found(self, stop: Stop, by: str) -> None:
        if not self.job.finished and not self.job.queueing:
            self.world.event("pretrain", "detection", self.job.here, by=by)
            self.job.stop(stop)
