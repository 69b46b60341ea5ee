"""Pre-training: steps until the end, with falls in between.

A hike with a known pace. The clock jumps from one event to the next (evaluation, checkpoint, fault), never step by step;
when a fault strikes on the way, the distance walked follows from the pace. `storm.py` brings what strikes, `recovery.py`
says which way leads up again, `checkpoint.py` where a fall ends, `elastic.py` how fast the job is as it stands; here they meet.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate

import simpy

from conf.errors import Refused
from conf.plan import Cause
from sim.checkpoint import Checkpoints, Saved, Tier, due, next_due
from sim.cluster import Course, Servers, World
from sim.elastic import Shape
from sim.failures import Fault, Luck
from sim.pace import Pace
from sim.recovery import Rung, Stop, detector, held, noticed, raised, spoilt
from sim.replica import Replicas
from sim.storm import Storm
from sim.timeline import WHOLLY

STAGE = "pretrain"
PATIENCE = 10_000  # faults in a row without a new checkpoint before the run is called hopeless
SPIKE = "spike"  # the name under which loss spikes are counted


class Pretraining:
    """The job: rises (start, or recovery), trains, falls, rises again."""

    def __init__(self, world: World, pace: Pace, faults: Iterator[Fault], spikes: Iterator[int] | None = None) -> None:
        self.world, self.plan, self.pace = world, world.plan, pace
        self.storm = Storm(self, faults)
        self.spikes: Iterator[int] = iter(()) if spikes is None else spikes
        self.checkpoints = Checkpoints(world.plan, world.rates, pace.stride)
        self.servers = Servers(world)
        self.shape = Shape(world.plan, pace)
        self.replicas = Replicas(world, self.servers, self.shape, self.changed)
        self.init = world.plan.failures.init.of_mean(world.rates.init)
        self.began = world.now
        self.deadline = self.began + (math.inf if self.plan.train.stop_after is None else self.plan.train.stop_after)
        self.last = math.inf if self.plan.train.steps is None else self.plan.train.steps
        self.place = 0.0  # steps walked; the part of a torn step counts until a fall
        self.furthest = 0.0  # steps walked at least once
        self.spike = next(self.spikes, math.inf)
        self.evaluated = -1
        self.finished = self.queueing = self.walking = False
        self.together = True  # on the way up as one job, not only standing still while a replica leaves
        self.leg = (0.0, 0.0, 1.0)  # where and when the walk on the way began, and its stride
        self.luck = Luck()
        self.ahead: list[Rung] = [("init", world.rates.init)]  # what must be done before steps
        self.unsafe: list[Saved] = []  # saves of which the record does not tell yet
        self.falls: Counter[str] = Counter()
        self.lost: dict[str, float] = defaultdict(float)  # seconds, by the cause of the last fall
        self.blame: str | None = None
        self.swapped: list[tuple[int, int]] = []  # servers that changed and of which nothing was told yet
        self.resized = False
        self.seen = ""  # who noticed the last fault
        self.in_a_row = self.passed_over = 0

    @property
    def step(self) -> int:
        return int(self.place)

    @property
    def here(self) -> int:
        """The step, also while walking."""
        start, first, stride = self.leg
        return int(first + (self.world.now - start) / stride) if self.walking else self.step

    def run(self) -> Course[None]:
        """From the start of the ranks to the last checkpoint."""
        self.world.event(STAGE, "start")
        self.process = self.world.env.process(self._live())
        self.world.env.process(self.storm.blow())
        yield self.process
        self.world.event(STAGE, "end", self.step)

    def _live(self) -> Course[None]:
        while not self.finished:
            try:
                yield from self._rise()
                yield from self._train()
            except simpy.Interrupt as stop:
                assert isinstance(stop.cause, Stop)
                self._fall(stop.cause)

    def stop(self, stop: Stop) -> None:
        """Out of whatever it is doing."""
        self.walking = False
        self.process.interrupt(stop)

    def changed(self) -> None:
        """The pace is another one from now on; a walk on the way goes on at it."""
        self.shape.settle()
        if self.walking:
            self.walking = False
            self.process.interrupt()

    # -- falling

    def _fall(self, stop: Stop) -> None:
        """Out of step, with the way up laid out."""
        fault, gone, failures = stop.fault, stop.gone, self.plan.failures
        cause = failures.causes[fault.cause]
        self.world.event(STAGE, "failure", self.step, cause=fault.cause, server=gone[0] if gone else None, planned=cause.planned)
        slots = [self.servers.fail(server, fault.cause, failures.repair.at(fault.luck.repair)) for server in gone]
        self.storm.leave(set(gone))
        self._count_fall(fault.cause)
        self.luck, self.place = fault.luck, float(self.step)
        self.seen, _ = detector(failures, cause)
        self._settle()
        down = noticed(failures, cause, stop)
        if not self.together and self.replicas.can_go_on(slots):
            self.replicas.leave(slots, fault.luck, sum(seconds for _, seconds in down))
            self.ahead, self.in_a_row = down, 0
            return
        self.replicas.fold()
        self.together = True
        saved = self._warned(cause)
        bad = spoilt(self.plan.checkpoint.spoilt, fault.luck)
        load = self.checkpoints.remote.load if saved else self._back(held(cause, self.plan.cluster.nodes), stop.before, bad=bad)
        self.ahead = [*saved, *down, *raised(failures, fault.luck, self.init, load, known=stop.found or cause.planned or cause.notice > 0)]

    def _count_fall(self, cause: str) -> None:
        self.falls[cause] += 1
        self.blame = cause
        self.in_a_row += 1
        if self.in_a_row > PATIENCE:
            raise Refused(f"checkpoint.every={self.plan.checkpoint.every}: {PATIENCE:,} failures struck in a row before a checkpoint "
                          "was saved; lower checkpoint.every, or the rates in failures.causes")  # fmt: skip

    def _warned(self, cause: Cause) -> list[Rung]:
        """Where there was warning enough, and something to lose, a checkpoint before all else."""
        remote = self.checkpoints.remote
        newest = max((saved.step for saved in self.checkpoints.kept if saved.safe <= self.world.now), default=0)
        seconds = remote.block + remote.later
        return [("checkpoint", seconds)] if self.step > newest and (cause.notice >= seconds > 0 or cause.how == "slow") else []

    def _back(self, tiers: set[str], before: float = math.inf, step: float = math.inf, bad: int = 0) -> float | None:
        """Back to a checkpoint; returns the time to load it, None where there is none and the run starts over."""
        chosen, passed = self.checkpoints.fall(self.world.now, tiers, before, step, bad)
        self.unsafe.clear()
        self.place = 0.0 if chosen is None else float(chosen.step)
        self.evaluated = self.evaluated if self.evaluated <= self.step else -1
        self.storm.heal(-math.inf if chosen is None else chosen.begun)
        self.passed_over = passed
        return None if chosen is None else chosen.tier.load * (1 + passed)

    def _rollback(self) -> None:
        """The loss spiked: back to well before it, from where other data are taken."""
        self.world.event(STAGE, "spike", self.step)
        self._count_fall(SPIKE)
        while self.spike <= self.step:
            self.spike = next(self.spikes, math.inf)
        self._settle()
        load = self._back(held(None, self.plan.cluster.nodes), step=self.step - self.plan.failures.spikes.rewind)
        self.world.event(STAGE, "rollback", self.step)
        self.ahead = [("init", self.init.mean)] + ([] if load is None else [("load", load)])

    # -- rising

    def _rise(self) -> Course[None]:
        """What is ahead, in order; a fault on the way up is a new fall."""
        swap = next((i for i, (state, _) in enumerate(self.ahead) if state == "reallocate"), None)
        if swap is not None:
            below, above = self.ahead[:swap], self.ahead[swap:]
            yield from self._climb(below)
            above = (yield from self._manned(above[0])) + above[1:]
            if self.finished:
                return
            yield from self._climb(above)
        else:
            yield from self._climb(self.ahead)
        self.together = False
        if self.falls:
            self.world.event(STAGE, "restart", self.step, **({"passed_over": self.passed_over} if self.passed_over else {}))
            self.passed_over = 0

    def _climb(self, rungs: list[Rung]) -> Course[None]:
        """Rungs in one go; where a fault ends the climb, those below it are done."""
        at = self.world.now
        ends = list(accumulate((seconds for _, seconds in rungs), initial=at))[1:]
        whole = False
        try:
            if ends and ends[-1] > at:
                yield self.world.env.timeout(ends[-1] - at)
            whole = True
        finally:
            now = self.world.now
            ends = [*(min(end, now) for end in ends[:-1]), now] if whole else ends
            for (state, _), end in zip(rungs, ends, strict=False):
                self._book(state, at, min(end, now))
                at = min(end, now)
                if end > now:
                    break
                self._tell(state, at)

    def _tell(self, state: str, at: float) -> None:
        """What is done at the end of a rung."""
        if state == "detect":
            self.world.timeline.event(at, STAGE, "detection", self.step, by=self.seen)
        if state == "checkpoint":
            self._saved(self.checkpoints.add(self.step, at, at, self.checkpoints.remote))
        if state == "reallocate":
            for old, new in self.swapped:
                self.world.timeline.event(at, STAGE, "replacement", self.step, server=old, spare=new)
            if self.resized:
                self.world.timeline.event(at, STAGE, "resize", self.step, servers=self.shape.servers)
            self.swapped, self.resized = [], False

    def _manned(self, swap: Rung) -> Course[list[Rung]]:
        """A server for every empty slot: a spare, a cold one, a repaired one; or a smaller mesh. Returns what that takes."""
        if not self.servers.empty:
            return []
        state, seconds = swap
        if self.servers.take():
            seconds += self.plan.failures.boot.at(self.luck.boot)
        fitting = nodes = self.plan.cluster.nodes
        if self.servers.short and self.plan.failures.without_spare == "shrink":
            fitting = self.shape.smaller.fitting(nodes - self.servers.short) or nodes
        if self.servers.short and fitting == nodes:
            yield from self._queue()
            if self.finished:
                return []
        self.swapped += self.servers.fill()
        if self.shape.servers != fitting:
            self.shape.servers, self.resized = fitting, True
            self.shape.settle()
        return [(state, seconds)]

    def _queue(self) -> Course[None]:
        """Wait for a repaired server when no spare is left; the end of the allocation ends the wait."""
        start, self.queueing = self.world.now, True
        yield from self.servers.wait(max(0.0, self.deadline - start))
        self.queueing = False
        self._book("queue", start, self.world.now)
        self.finished = self.servers.short > 0

    def _may_grow(self) -> bool:
        """Whether a job that shrank has servers for a larger mesh, and has just saved."""
        if self.shape.servers == self.plan.cluster.nodes or not due(self.step, self.checkpoints.remote.every):
            return False
        there = self.plan.cluster.nodes - self.servers.short + len(self.servers.yard.items)
        return self.shape.smaller.fitting(min(there, self.plan.cluster.nodes)) > self.shape.servers

    # -- training

    def _train(self) -> Course[None]:
        while not self.finished:
            goal = self._goal()
            if goal > self.place:
                yield from self._walk(goal)
                if self.place < goal:
                    continue  # the pace changed on the way
            over = self._over()
            if self.step == self.spike and not over:
                self._rollback()
                return
            if self.pace.evaluate and self.evaluated != self.step and (over or due(self.step, self.plan.train.evaluate_every)):
                yield from self._evaluate()
            for tier in self.checkpoints.due(self.step, over):
                yield from self._save(tier)
            if over:
                yield from self._spend("checkpoint", self.checkpoints.busy(self.checkpoints.remote, self.world.now))
                self._settle()
            elif self._may_grow():
                self.ahead = raised(self.plan.failures, self.luck, self.init, self.checkpoints.remote.load, known=True)
                return
            self.finished = over

    def _over(self) -> bool:
        """Whether the last step is done; the clock is looked at between steps, so it is whole."""
        return self.place >= self.last or self.deadline - self.world.now <= 1e-9 * self.shape.stride

    def _goal(self) -> float:
        """The step at which something is due; not ahead when the run is over."""
        left = self.deadline - self.world.now
        reached = math.ceil(self.place + left / self.shape.stride - 1e-9) if left < math.inf else math.inf
        spike = self.spike if self.spike > self.place else math.inf
        known = int(self.furthest) if self.pace.again != 1 and self.place < int(self.furthest) else math.inf
        evaluation, save = next_due(self.step, self.plan.train.evaluate_every), self.checkpoints.next_due(self.step)
        return min(self.last, reached, spike, known, evaluation, save)

    def _walk(self, goal: float) -> Course[None]:
        """As far as the goal, or until the pace changes or a fault strikes."""
        start, first, shape = self.world.now, self.place, self.shape
        stride, mix, again = shape.stride * (self.pace.again if first < int(self.furthest) else 1.0), shape.mix, shape.again
        self.walking, self.leg = True, (start, first, stride)
        try:
            yield self.world.env.timeout((goal - first) * stride)
            self.place = goal
        except simpy.Interrupt as stop:
            self.place = min(goal, first + (self.world.now - start) / stride)
            if stop.cause is not None:
                raise
        finally:
            self.walking = False
            self._count(start, first, stride, mix, again)

    def _count(self, start: float, first: float, stride: float, mix: Mapping[str, float], again: Mapping[str, float]) -> None:
        """Ground walked before is replay, ground beyond is new."""
        now, border, step = self.world.now, self.world.now, self.step
        if self.place > self.furthest:
            border = min(now, start + max(0.0, self.furthest - first) * stride)
            self.furthest = self.place
        if border > start:
            self.world.timeline.spend(STAGE, again, start, border, step)
            self._blame(border - start)
        if now > border:
            self.world.timeline.spend(STAGE, mix, border, now, step)

    def _evaluate(self) -> Course[None]:
        yield from self._spend("evaluate", self.pace.evaluate)
        self.evaluated = self.step
        self.world.event(STAGE, "evaluate", self.step)

    def _save(self, tier: Tier) -> Course[None]:
        """Training waits for the save before, and for its part of this one."""
        if tier.later and (busy := self.checkpoints.busy(tier, self.world.now)) > 0:
            yield from self._spend("checkpoint", busy)
        begun = self.world.now
        yield from self._spend("checkpoint", tier.block)
        self._saved(self.checkpoints.add(self.step, begun, self.world.now + tier.later, tier))
        self.in_a_row = 0

    def _saved(self, saved: Saved) -> None:
        self.unsafe.append(saved)
        self._settle()

    def _settle(self) -> None:
        """Tell of the saves that have become safe; a fall forgets the others."""
        if not self.unsafe:
            return
        now = self.world.now
        for saved in self.unsafe:
            if saved.safe <= now:
                tier = {} if saved.tier is self.checkpoints.remote else {"tier": saved.tier.name}
                self.world.timeline.event(saved.safe, STAGE, "checkpoint", saved.step, bytes=self.checkpoints.bytes, **tier)
        self.unsafe = [saved for saved in self.unsafe if saved.safe > now]

    # -- the tape

    def _spend(self, state: str, seconds: float) -> Course[None]:
        if seconds <= 0:
            return
        start = self.world.now
        try:
            yield self.world.env.timeout(seconds)
        finally:
            self._book(state, start, self.world.now)

    def _book(self, state: str, start: float, stop: float) -> None:
        if stop == start:
            return
        self.world.timeline.spend(STAGE, WHOLLY[state], start, stop)
        if state not in ("evaluate", "checkpoint"):
            self._blame(stop - start)

    def _blame(self, seconds: float) -> None:
        if self.blame is not None:
            self.lost[self.blame] += seconds
