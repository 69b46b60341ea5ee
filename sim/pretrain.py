"""Pre-training: steps until the end, with falls in between.

A hike with a known pace. The clock jumps from one event to the next (evaluation, checkpoint, fault), never step by step;
when a fault strikes on the way, the distance walked follows from the pace.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import simpy

from conf.errors import Refused
from conf.plan import Plan
from sim.checkpoint import Checkpoints, due, next_due
from sim.cluster import Course, Servers, World
from sim.failures import Fault
from sim.parallel import steps

STAGE = "pretrain"
PATIENCE = 10_000  # faults in a row without a new checkpoint before the run is called hopeless


@dataclass(frozen=True)
class Pace:
    """One optimizer step: how long, of what, in which memory."""

    step_time: float  # [s]
    mix: dict[str, float]  # share of each state in a step
    evaluate: float  # one evaluation [s]
    memory: float  # peak on a rank [B]
    mfu: float
    tokens_per_s: float
    fullness: float = 1.0  # mean batch over the full one: less than 1 where the batch warms up
    arithmetic: float = 1.0  # share of compute in matrix products and attention
    stalled: float = 0.0  # share of compute in waiting for the host; the rest moves tensors

    @property
    def stride(self) -> float:
        """Mean time of a step over the run [s]."""
        return self.step_time * self.fullness

    def slowed(self, factor: float) -> "Pace":
        """The same step, so many times as long."""
        mfu, rate = self.mfu / factor, self.tokens_per_s / factor
        return replace(self, step_time=self.step_time * factor, evaluate=self.evaluate * factor, mfu=mfu, tokens_per_s=rate)


def paces(plans: Sequence[Plan]) -> list[Pace]:
    """The step model's answer for each plan."""
    s = steps(plans)
    names = ("compute", "communication", "bubble", "optimizer")
    seconds = np.stack([getattr(s, name) for name in names])
    found = []
    for i, (parts, total) in enumerate(zip(seconds.T, seconds.sum(axis=0), strict=True)):
        mix = {name: float(part / total) for name, part in zip(names, parts, strict=True) if part > 0}
        evaluate, memory, mfu, rate = (float(column[i]) for column in (s.evaluate, s.memory, s.mfu, s.tokens_per_s))
        busy = (float(part[i] / s.compute[i]) for part in (s.arithmetic, s.stalled))
        found.append(Pace(float(s.step_time[i]), mix, evaluate, memory, mfu, rate, _fullness(plans[i]), *busy))
    return found


def _fullness(plan: Plan) -> float:
    """Mean batch of the run's steps over the full one."""
    steps = plan.train.steps
    return plan.samples(steps) / (steps * plan.train.global_batch) if steps else 1.0


def pace(plan: Plan) -> Pace:
    """The step model's answer for one plan."""
    return paces([plan])[0]


def uncertain(plan: Plan, lives: int) -> list[float]:
    """How many times as long as predicted the steps of some lives may be: spread evenly over the step model's error, in an
    order that has nothing to do with the lives' faults."""
    even = [NormalDist(0.0, 1.0).inv_cdf((i + 0.5) / lives) for i in range(lives)]
    return [math.exp(plan.gpu.error * deviation) for deviation in np.random.default_rng(plan.seed).permutation(even)]


class Pretraining:
    """The job: rises (start, or recovery), trains, falls, rises again."""

    def __init__(self, world: World, pace: Pace, faults: Iterator[Fault]) -> None:
        self.world, self.plan, self.pace, self.faults = world, world.plan, pace, faults
        self.checkpoints = Checkpoints(world.plan, world.rates)
        self.servers = Servers(world)
        self.began = world.now
        self.deadline = self.began + (math.inf if self.plan.train.stop_after is None else self.plan.train.stop_after)
        self.step = 0
        self.furthest = 0.0  # steps walked at least once; the part of a torn step counts
        self.evaluated = -1
        self.finished = False
        self.queueing = False
        self.ahead = [("init", world.rates.init)]  # what must be done before steps
        self.falls = {"planned": 0, "unexpected": 0}
        self.in_a_row = 0

    def run(self) -> Course[None]:
        """From the start of the ranks to the last checkpoint."""
        self.world.event(STAGE, "start")
        job = self.world.env.process(self._live())
        self.world.env.process(self._strike(job))
        yield job
        self.world.event(STAGE, "end", self.step)

    def _live(self) -> Course[None]:
        while not self.finished:
            try:
                yield from self._rise()
                yield from self._train()
            except simpy.Interrupt as stop:
                assert isinstance(stop.cause, Fault)
                self._fall(stop.cause)

    def _strike(self, job: simpy.Process) -> Course[None]:
        """Faults arrive by the wall clock. One that hits an empty slot, or a job that waits for a server, stops nothing."""
        for fault in self.faults:
            yield self.world.env.timeout(self.began + fault.at - self.world.now)
            job_level = self.plan.failures.causes[fault.cause].per == "job"
            if not job.is_alive:
                return
            if not self.queueing and (job_level or fault.slot not in self.servers.empty):
                job.interrupt(fault)

    # -- falling and rising

    def _fall(self, fault: Fault) -> None:
        """Back to the newest checkpoint, with the way up laid out."""
        cause, failures = self.plan.failures.causes[fault.cause], self.plan.failures
        server = None if cause.per == "job" else self.servers.fail(fault.slot, fault.cause, fault.repair)
        self.world.event(STAGE, "failure", self.step, cause=fault.cause, server=server, planned=cause.planned)
        self.falls["planned" if cause.planned else "unexpected"] += 1
        self.in_a_row += 1
        if self.in_a_row > PATIENCE:
            raise Refused(f"checkpoint.every={self.plan.checkpoint.every}: {PATIENCE:,} failures struck in a row before a checkpoint "
                          "was saved; lower checkpoint.every, or the rates in failures.causes")  # fmt: skip
        self.step = self.checkpoints.safe
        self.evaluated = self.evaluated if self.evaluated <= self.step else -1
        noticed = [] if cause.planned else [("detect", failures.detect), ("diagnose", failures.diagnose)]
        swapped = [("queue", 0.0), ("reallocate", failures.reallocate)] if self.servers.empty else []
        loaded = [("load", self.checkpoints.load_time)] if self.checkpoints.step is not None else []
        self.ahead = [*noticed, *swapped, ("init", self.world.rates.init), *loaded]

    def _rise(self) -> Course[None]:
        """What is ahead, in order; a fault on the way up is a new fall."""
        for state, seconds in self.ahead:
            if state == "queue":
                yield from self._queue()
                if self.finished:
                    return
            else:
                yield from self._spend(state, seconds)
            self._tell(state)
        if self.falls["planned"] or self.falls["unexpected"]:
            self.world.event(STAGE, "restart", self.step)

    def _tell(self, state: str) -> None:
        if state == "detect":
            self.world.event(STAGE, "detection", self.step)
        if state == "reallocate":
            for old, new in self.servers.fill():
                self.world.event(STAGE, "replacement", self.step, server=old, spare=new)

    def _queue(self) -> Course[None]:
        """Wait for a repaired server when no spare is left; the end of the allocation ends the wait."""
        start, self.queueing = self.world.now, True
        yield from self.servers.fetch(max(0.0, self.deadline - start))
        self.queueing = False
        self._book({"queue": 1.0}, start)
        self.finished = self.servers.short

    # -- training

    def _train(self) -> Course[None]:
        every = self.plan.train.evaluate_every
        while not self.finished:
            if (count := self._leg()) > 0:
                yield from self._walk(count)
            over = self._leg() <= 0
            if self.pace.evaluate and self.evaluated != self.step and (over or due(self.step, every)):
                yield from self._evaluate()
            if over or due(self.step, self.checkpoints.every):
                yield from self._save()
            self.finished = over

    def _leg(self) -> int:
        """Steps until something is due; 0 when the run is over. The clock is looked at between steps, so the last one is whole."""
        left = math.ceil((self.deadline - self.world.now) / self.pace.stride - 1e-9) if self.deadline < math.inf else math.inf
        last = math.inf if self.plan.train.steps is None else self.plan.train.steps
        stops = (last, next_due(self.step, self.plan.train.evaluate_every), next_due(self.step, self.checkpoints.every))
        return int(max(0, min(left, min(stops) - self.step)))

    def _walk(self, count: int) -> Course[None]:
        start, first, whole = self.world.now, self.step, False
        try:
            yield self.world.env.timeout(count * self.pace.stride)
            whole = True
        finally:
            walked = count if whole else min(count, (self.world.now - start) / self.pace.stride)
            self.step = first + int(walked)
            self._count(start, first, first + walked)

    def _count(self, start: float, first: int, reached: float) -> None:
        """Ground walked before is replay, ground beyond is new."""
        now, border = self.world.now, self.world.now
        if reached > self.furthest:
            border = min(now, start + (self.furthest - first) * self.pace.stride)
        self.world.timeline.spend(STAGE, {"replay": 1.0}, start, border, self.step)
        self.world.timeline.spend(STAGE, self.pace.mix, border, now, self.step)
        self.furthest = max(self.furthest, reached)

    def _evaluate(self) -> Course[None]:
        yield from self._spend("evaluate", self.pace.evaluate)
        self.evaluated = self.step
        self.world.event(STAGE, "evaluate", self.step)

    def _save(self) -> Course[None]:
        if self.checkpoints.step == self.step:
            return
        yield from self._spend("checkpoint", self.checkpoints.save_time)
        self.checkpoints.step, self.in_a_row = self.step, 0
        self.world.event(STAGE, "checkpoint", self.step, bytes=self.checkpoints.bytes)

    def _spend(self, state: str, seconds: float) -> Course[None]:
        start = self.world.now
        try:
            yield self.world.env.timeout(seconds)
        finally:
            self._book({state: 1.0}, start)

    def _book(self, mix: dict[str, float], start: float) -> None:
        self.world.timeline.spend(STAGE, mix, start, self.world.now)
