"""Alignment, foretold: a learner that waits for samples, engines that may run ahead of it, and a queue between them.

Two kitchens: one bakes what the other has mixed. Who may mix how far ahead is the question of `staleness`:

    colocated, split_ref, disaggregated    engines begin batch t when the weights have been updated t times
    async, paced                           engines begin batch t when t ≤ updates + staleness; so nothing is ever older than that
    async, discarding                      engines begin what fits a queue of 2 × staleness batches; what is then too old is thrown away

A batch is prompts × group completions, and trained when all of it is there (discarding: when as many are there, oldest first). Then come
log-probabilities and scores, the updates, and the sync of the weights, for which engines stand still: at once, and read again what they had
begun (partial), or when it is done. The window that is simulated is long enough for the queue to settle; its lengths are those of steps
spread evenly over the run. What strikes the run of such steps is in alignment.py.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush, heapreplace
from typing import NamedTuple

import numpy as np
import simpy

from conf.alignment import ages
from conf.plan import Plan
from sim.alignment import run
from sim.cluster import Course
from sim.kernels import rates
from sim.pace import Pace, pace
from sim.parallel import columns, forward
from sim.power import Meter
from sim.roles import Held, critic, roles
from sim.rollout import FEW, Completion, Decode, Engine, crowd, decode, lengths
from sim.sync import Sync, sync

MEASURED = 8  # least batches that are measured: whole rounds, for those that may run ahead of training come lag + 1 at a time
PAGED = 3.7e9  # B/s of a device to and from pageable memory of its host (NeMo-RL v0.5's steps, LOG.md, 2026-11-30)
BUFFER = 2  # batches that a discarding queue holds for each step of staleness, as NeMo-RL's
THOUSAND = 1000


class Parts(NamedTuple):
    """Seconds of what is done with a batch."""

    logprob: float  # the policy's pass over its own samples, for a correction
    judge: float  # of trainers: values of a critic, the reference with adapters off
    score: float  # of whoever holds reference and reward model
    train: float  # all updates of the batch
    swap: float  # what another role does not need, off the devices and back
    sync: Sync
    step: Pace  # one update

    @property
    def scored(self) -> float:
        return self.judge + self.score


def parts(plan: Plan, twin: Plan | None = None, slower: float = 1.0) -> Parts:
    """What a batch takes; `twin` is the plan whose training is the alignment's, `slower` by how much because others work beside it."""
    align, twin = plan.align, twin or plan.aligned
    step = pace(twin, align.adapters).slowed(slower)
    count = twin.train.global_batch * (align.updates if align.rollouts else 1)
    once = slower * forward(twin, count)
    logprob = once if align.rollouts and align.correction != "none" else 0.0
    judge = once * (critic(plan) + (align.anchored and align.reference == "adapter_off"))
    copies = (align.anchored and align.reference == "model") + (align.reward == "model" and align.rollouts)
    score = copies * (once if plan.roles.scorers == plan.roles.trainers else forward(_whole(twin), count / len(plan.roles.scorers)))
    updates = align.updates if align.rollouts else 1
    moved = sync(plan) if align.rollouts else Sync(0.0, 0, 0.0)
    swap = 2 * roles(plan, twin).kept / PAGED if align.rollouts and align.offload and not align.apart else 0.0
    return Parts(logprob, judge, score, updates * step.step_time * (1 + critic(plan)), swap, moved, step)


def _whole(twin: Plan) -> Plan:
    """The same on a rank that holds the model whole, as one that only scores does."""
    mesh = twin.mesh.but(tp=1, cp=1, pp=1, vpp=1, ep=1, dp_replicate=1, dp_shard=1)
    return twin.but(mesh=mesh, cluster=twin.cluster.part(1))


@dataclass
class Lived:
    """What a window of an alignment came to."""

    plan: Plan
    parts: Parts
    held: Held
    steps: int  # batches measured
    wall: float  # seconds of them
    filled: float  # seconds before them
    spent: dict[str, float]  # rank-seconds by state
    waited: float  # seconds in which the learner waited for samples
    busy: float  # rank-seconds of generators at work
    tail: float  # of these, with few completions under way
    tokens: float  # trained on
    stale: list[int]
    made: int  # samples begun, whole run
    trained: int
    discarded: int
    flying: int  # begun and neither trained nor discarded
    preempted: int = 0
    generators: int = 0  # ranks

    @property
    def step_time(self) -> float:
        return self.wall / self.steps


class Job:
    """Learner, engines and queue under one clock."""

    def __init__(self, plan: Plan, told: Parts, work: Decode, room: float) -> None:
        self.plan, self.parts, self.env = plan, told, simpy.Environment()
        align = plan.align
        self.size = align.prompts * align.group
        self.warm = min(align.steps - 1, 2 + align.lag if align.lag else 0)
        self.batches = min(align.steps, self.warm + -(-MEASURED // (align.lag + 1)) * (align.lag + 1))
        self.version = self.begun = self.taken = self.trained = self.discarded = 0
        self.queue: deque[Completion] = deque()
        self.stale: list[int] = []
        self.tokens = 0
        self.discards = align.placement == "async" and align.stale == "discard"
        self.count: Counter[int] = Counter()  # samples that are done, by batch
        self.fresh = 0  # samples in the queue that are not too old
        self.wanted = self.env.event()
        self.spent = dict.fromkeys(("queue", "logprob", "score", "train", "sync"), 0.0)
        engines = len(plan.roles.generators) // align.engine_tp
        few = FEW * min(align.slots, self.size / engines)
        self.engines = [Engine(self.env, align, work, room, few, lambda: self.version, partial(self._done, i)) for i in range(engines)]
        self.loads = [(0, number) for number in range(engines)]  # heap; what no longer holds is passed over
        self.dice, self.next = np.random.default_rng(plan.seed), iter(self._samples())
        self.ahead: Completion | None = None

    # -- samples

    def _samples(self) -> Iterable[Completion]:
        """Every completion in order; those after the last batch are what engines run ahead with."""
        batch = 0
        while True:
            step = round(min(batch, self.batches - 1) * (self.plan.align.steps - 1) / max(1, self.batches - 1))
            yield from (Completion(batch, int(tokens)) for tokens in lengths(self.plan.align, self.size, step, self.dice))
            batch += 1

    def _may_begin(self, batch: int) -> bool:
        lag = self.plan.align.lag
        if not self.discards:
            return batch <= self.version + lag
        return self.begun - self.taken - self.discarded < max(1, BUFFER * lag) * self.size

    def _usable(self, one: Completion) -> bool:
        return self.version - one.version <= self.plan.align.lag

    def _release(self) -> None:
        """Samples that may begin go to the engine with the fewest, as long as any has a free slot."""
        while True:
            self.ahead = self.ahead or next(self.next)
            while self.loads[0][0] != self.engines[self.loads[0][1]].load:  # said before it changed
                heappop(self.loads)
            load, number = self.loads[0]
            if load >= self.plan.align.slots or not self._may_begin(self.ahead.batch):
                return
            self.engines[number].take(self.ahead)
            self.begun, self.ahead = self.begun + 1, None
            heapreplace(self.loads, (load + 1, number))

    def _done(self, number: int, completion: Completion) -> None:
        """An engine has ended a completion."""
        self.queue.append(completion)
        self.count[completion.batch] += 1
        self.fresh += self._usable(completion)
        if not self.wanted.triggered and self._ready():
            self.wanted.succeed()
        heappush(self.loads, (self.engines[number].load, number))
        self._release()

    # -- the learner

    def _ready(self) -> bool:
        return self.fresh >= self.size if self.discards else self.count[self.version] == self.size

    def _take(self) -> list[Completion]:
        """The next batch out of the queue; what has grown too old is thrown away."""
        if self.discards:
            fresh = [one for one in self.queue if self._usable(one)]
            self.discarded += len(self.queue) - len(fresh)
            taken, left = fresh[: self.size], fresh[self.size :]
        else:
            taken = [one for one in self.queue if one.batch == self.version]
            left = [one for one in self.queue if one.batch != self.version]
        self.queue, self.taken, self.fresh = deque(left), self.taken + len(taken), len(left)
        return taken

    def _spend(self, state: str, seconds: float) -> Course[None]:
        yield self.env.timeout(seconds)
        self.spent[state] += seconds

    def learn(self, mark: Callable[[], None]) -> Course[None]:
        """Every batch; `mark` is called where the measured ones begin."""
        self._release()
        for batch in range(self.batches):
            if batch == self.warm:
                mark()
            began = self.env.now
            self.wanted = self.env.event()
            if not self._ready():
                yield self.wanted
            self.spent["queue"] += self.env.now - began
            taken = self._take()
            yield from self._train(taken)
            yield from self._sync()

    def _train(self, taken: list[Completion]) -> Course[None]:
        """Scores beside log-probabilities where others give them, else after them; then the updates."""
        told, roles_ = self.parts, self.plan.roles
        if roles_.scorers == roles_.trainers:
            yield from self._spend("score", told.scored)
            yield from self._spend("logprob", told.logprob)
        else:
            yield from self._spend("score", told.judge)
            yield from self._spend("logprob", told.logprob)
            yield from self._spend("queue", max(0.0, told.score - told.judge - told.logprob))
        yield from self._spend("train", told.train)
        self.stale += [self.version - one.version for one in taken]
        self.tokens += sum(one.length + self.plan.align.prompt_tokens for one in taken)
        self.trained += len(taken)

    def _sync(self) -> Course[None]:
        began = self.env.now
        yield self.env.all_of([engine.hold(self.plan.align.partial and self.plan.align.apart) for engine in self.engines])
        self.spent["queue"] += self.env.now - began
        yield from self._spend("sync", self.parts.swap + self.parts.sync.seconds)
        self.version += 1
        self.fresh = sum(self._usable(one) for one in self.queue)
        for engine in self.engines:
            engine.go_on()
        self._release()


def live(plan: Plan, twin: Plan | None = None) -> Lived:
    """The window of an alignment with rollouts."""
    twin = twin or plan.aligned
    told, held = parts(plan, twin, _beside(plan, twin)), roles(plan, twin)
    job = Job(plan, told, decode(plan), held.room)
    marks: list[tuple[float, dict[str, float], float, float, int, int]] = []

    def mark() -> None:
        busy, tail = (sum(values) for values in zip(*((e.busy(), e.tail) for e in job.engines), strict=True))
        marks.append((job.env.now, dict(job.spent), busy, tail, job.tokens, len(job.stale)))

    job.env.run(until=job.env.process(job.learn(mark)))
    mark()
    (start, before, busy0, tail0, tokens0, stale0), (stop, after, busy1, tail1, tokens1, _) = marks
    wall, tp = stop - start, plan.align.engine_tp
    trainers = {state: after[state] - before[state] for state in after}
    busy = (busy1 - busy0) * tp
    flying = len(job.queue) + sum(engine.load for engine in job.engines)
    lived = Lived(plan, told, held, job.batches - job.warm, wall, start, _states(plan, told, trainers, busy, wall), trainers["queue"], busy,
                  (tail1 - tail0) * tp, tokens1 - tokens0, job.stale[stale0:], job.begun, job.trained, job.discarded, flying,
                  sum(engine.preempted for engine in job.engines), len(plan.roles.generators))  # fmt: skip
    _conserve(lived, sum(trainers.values()))
    return lived


def _beside(plan: Plan, twin: Plan) -> float:
    """By how much training is slower because engines work on the same cores, where ranks are cores and there are too few: while they
    work everyone is slower by the ranks for a core, so what takes them a second alone gives training a second's work too."""
    most = crowd(plan, False) / float(columns([twin]).crowd)
    if plan.align.placement != "async" or most == 1:
        return 1.0
    alone = live(plan.but(**{"align.placement": "disaggregated"}), twin)
    trained = alone.parts.train + alone.parts.logprob + alone.parts.scored
    return min(most, 1 + (most - 1) * alone.busy / alone.generators / alone.steps / trained)


def _states(plan: Plan, told: Parts, trainers: dict[str, float], busy: float, wall: float) -> dict[str, float]:
    """Rank-seconds of all ranks by state; what no role accounts for is idle."""
    role, steps = plan.roles, trainers["train"] / told.train if told.train else 0.0
    n, apart = len(role.trainers), plan.align.apart
    spent = {state: n * trainers[state] for state in ("logprob", "score", "sync")}
    spent["generate"] = busy
    if apart:
        spent["queue"] = n * trainers["queue"]
        spent["sync"] += len(role.generators) * trainers["sync"]
    if role.scorers != role.trainers:
        spent["score"] += len(role.scorers) * told.score * steps
    for state, share in told.step.mix.items():
        spent[state] = n * trainers["train"] * share
    spent["idle"] = plan.ranks * wall - sum(spent.values())
    return {state: seconds for state, seconds in spent.items() if seconds}


def _conserve(lived: Lived, learner: float) -> None:
    """Samples and time add up: each is counted in two ways."""
    assert lived.made == lived.trained + lived.discarded + lived.flying, (lived.made, lived.trained, lived.discarded, lived.flying)
    assert abs(learner - lived.wall) <= 1e-6 * lived.wall, f"the learner spent {learner} s of {lived.wall}"
    idle, whole = lived.spent.get("idle", 0.0), lived.plan.ranks * lived.wall
    assert idle >= -1e-6 * whole, f"ranks are busier than the clock: {idle} of {whole} rank-seconds are idle"


# -- quantities


def align(plan: Plan, seed: int | None = None) -> dict[str, float]:
    """Quantities of the stage; none where it is off. Its steps are the same in every life, and worked out once; what strikes it is not."""
    if plan.align.method == "none":
        return {}
    if plan.id not in _told_of:
        _told_of[plan.id] = _rollouts(plan) if plan.align.rollouts else _preferences(plan)
    told = _told_of[plan.id]
    return told | (_struck(plan, told, seed) if plan.failures.causes else {})


_told_of: dict[str, dict[str, float]] = {}


def _struck(plan: Plan, told: Mapping[str, float], seed: int | None) -> dict[str, float]:
    """The stage in a life with faults: its length with what checkpoints and falls take, when its devices stand."""
    step, quiet = told["step_time"], told["seconds"]
    waited = told["queue_time"] * plan.ranks / len(plan.roles.trainers) if plan.align.apart else 0.0
    ran = run(plan, step, 1 - waited / step, seed)
    filling = quiet - rates(plan).init - plan.align.steps * step  # by which the first batches take longer than later ones
    seconds = ran.wall + filling
    working = ran.useful + ran.dragged + ran.replayed + filling
    watts = Meter(plan, {"compute": 1.0}).watts({"init": 1.0})
    return {
        "seconds": seconds,
        "cost": told["cost"] * seconds / quiet,
        "energy": told["energy"] * working / quiet + watts * (seconds - working),
        "goodput": ran.useful / seconds,
        "lost": ran.lost,
        "interruptions": float(ran.interruptions),
    }


def _preferences(plan: Plan) -> dict[str, float]:
    """In closed form: the reference is asked, then an update."""
    twin = plan.aligned
    told, held = parts(plan, twin), roles(plan, twin)
    step, n = told.train + told.scored, len(plan.roles.trainers)
    spent = {state: n * told.train * share for state, share in told.step.mix.items()}
    spent["score"] = n * told.judge + len(plan.roles.scorers) * told.score
    spent["idle"] = plan.ranks * step - sum(spent.values())
    tokens = plan.align.sequences * plan.align.longest
    seconds = rates(twin).init + plan.align.steps * step
    return _common(plan, told, held, step, tokens, spent, seconds) | {"trainer_utilisation": (told.train + told.judge) / step}


def _rollouts(plan: Plan) -> dict[str, float]:
    lived = live(plan)
    each = {state: seconds / lived.steps for state, seconds in lived.spent.items()}
    before = lived.trained // plan.align.sequences - lived.steps  # batches until the queue has settled
    seconds = rates(plan).init + lived.filled + (plan.align.steps - before) * lived.step_time
    told = _common(plan, lived.parts, lived.held, lived.step_time, lived.tokens / lived.steps, each, seconds)
    role = plan.roles
    scored = lived.parts.judge + (lived.parts.score if role.scorers == role.trainers else 0.0)
    learned = lived.parts.logprob + scored + lived.parts.train
    return told | {
        "generator_memory": lived.held.generator,
        "generator_utilisation": lived.busy / (lived.generators * lived.wall),
        "trainer_utilisation": learned / lived.step_time,
        "tail": lived.tail / lived.busy,
        "staleness_mean": float(np.mean(lived.stale)),
        "staleness_max": float(max(lived.stale)),
        **ages(lived.stale, plan.align.lag),
        "discarded": lived.discarded / max(1, lived.trained + lived.discarded),
        "preempted": lived.preempted / max(1, lived.made),
        "sync_bytes": lived.parts.sync.bytes,
        "sync_seconds": lived.parts.sync.seconds,
    }


def _common(plan: Plan, told: Parts, held: Held, step: float, tokens: float, spent: dict[str, float], seconds: float) -> dict[str, float]:
    """What both kinds have; `spent` are the rank-seconds of a step by state."""
    training = sum(spent.get(state, 0.0) for state in told.step.mix)
    groups = {name: spent.get(name, 0.0) for name in ("generate", "score", "logprob", "sync", "queue", "idle")} | {"train": training}
    meter = Meter(plan, told.step.mix, told.step.arithmetic, told.step.stalled)
    watts = meter.watts({state: part / (plan.ranks * step) for state, part in spent.items()})
    hour = plan.ranks / 3600 * plan.price.gpu_hours[plan.gpu.name].mid
    return {
        "step_time": step,
        "tokens_per_s": tokens / step,
        "tokens_per_s_per_gpu": tokens / step / plan.ranks,
        **{f"{name}_time": part / plan.ranks for name, part in groups.items()},
        "trainer_memory": held.trainer,
        "scorer_memory": held.scorer,
        "peak_memory": max(held.trainer, held.generator, held.scorer),
        "seconds": seconds,
        "cost": seconds * hour,
        "energy": seconds * watts,
        "seconds_per_thousand": THOUSAND * step,
        "cost_per_thousand": THOUSAND * step * hour,
        "energy_per_thousand": THOUSAND * step * watts,
    }
