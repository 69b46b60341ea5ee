"""A model's life, foretold: extract → dedup → tokens → pretrain, in one world with one clock."""

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial

from conf.hourly import hour_of
from conf.plan import Plan
from sim.clocks import Feed
from sim.cluster import Course, World
from sim.crawl import corpus_of, crawl
from sim.dedup import dedup, unique
from sim.extract import corpus, extract, kept
from sim.failures import faults, spikes
from sim.feed import feed_of
from sim.kernels import Rates, rates
from sim.pace import Pace, pace
from sim.power import Footprint, Meter, footprint
from sim.pretrain import Pretraining
from sim.timeline import Timeline
from sim.tokens import tokens


@dataclass
class History:
    """All that happened in one life of a plan."""

    plan: Plan
    pace: Pace
    timeline: Timeline
    meter: Meter
    feed: Feed = field(default_factory=Feed)
    told: dict[str, dict[str, float]] = field(default_factory=dict)  # of each data stage
    steps: int = 0  # that counted
    falls: Mapping[str, int] = field(default_factory=dict)  # by cause
    lost: Mapping[str, float] = field(default_factory=dict)  # wall clock on the way back up and over old ground, by cause [s]
    resized: bool = False
    seed: int | None = None  # of its weather; none = the plan's
    blocked: float = 0.0  # time that training waits for one checkpoint [s]
    trained: float = 0.0  # wall clock of pre-training [s]

    @property
    def planned(self) -> int:
        """Interruptions that were planned."""
        return sum(
            count for name, count in self.falls.items() if name in self.plan.failures.causes and self.plan.failures.causes[name].planned
        )

    @property
    def end(self) -> str:
        """The date and hour at which it ends."""
        return (hour_of(self.feed.start(self.plan)) + timedelta(seconds=self.timeline.until)).isoformat()

    @cached_property
    def footprint(self) -> Footprint:
        return footprint(self.plan, self.meter, self.timeline, self.feed.start(self.plan))


def live(plan: Plan, seed: int | None = None, pace_: Pace | None = None, rates_: Rates | None = None) -> History:
    """One life; another seed is another weather."""
    step, speed = pace_ or pace(plan), rates_ or rates(plan)
    meter = Meter(plan, step.mix, step.arithmetic, step.stalled)
    feed = feed_of(plan, step, meter, speed)
    meter.spells = feed.spells()
    world = World(feed.budgeted(plan), speed)
    history = History(plan, step, world.timeline, meter, feed, seed=seed)
    collects = gc.isenabled()
    gc.disable()  # a life keeps all that it makes: the collector would look through it again and again
    try:
        world.env.run(until=world.env.process(_live(world, history, plan.seed if seed is None else seed)))
    finally:
        if collects:
            gc.enable()
    history.timeline = feed.told(world.timeline, step)
    history.trained += history.timeline.until - world.timeline.until
    conserve(history)
    return history


def _live(world: World, history: History, seed: int) -> Course[None]:
    world.event("run", "start")
    if world.plan.data.path is not None or world.plan.data.raw is not None:
        yield from _data(world, history)
    began = world.now
    job = Pretraining(world, history.pace, faults(world.plan, seed), spikes(world.plan, seed))
    yield from job.run()
    history.steps, history.trained = job.step, world.now - began
    history.falls, history.lost, history.resized = job.falls, job.lost, bool(job.shape.smaller.known)
    history.blocked = job.checkpoints.remote.block
    world.event("run", "end")


def _data(world: World, history: History) -> Course[None]:
    """The data stages. A fault there costs one task of seconds, done again by another worker, and is left out."""
    began = world.now
    yield world.env.timeout(world.rates.workers)
    world.timeline.spend("run", {"init": 1.0}, began, world.now)
    whole = corpus(corpus_of(world.plan))
    text = kept(whole, world.plan.data)
    stay = unique(text, world.plan.data)
    first = {"crawl": crawl} if world.plan.crawl.seeds else {}
    stages = first | {"extract": partial(extract, found=whole), "dedup": partial(dedup, text=text), "tokens": partial(tokens, text=stay)}
    for name, stage in stages.items():
        start = world.now
        world.event(name, "start")
        history.told[name] = yield from stage(world)
        world.timeline.spend(name, {"data": 1.0}, start, world.now)
        world.event(name, "end")


def conserve(history: History) -> None:
    """Nothing is lost: time, energy, money and steps add up, each counted in two ways."""
    plan, timeline, foot = history.plan, history.timeline, history.footprint
    states, wall = timeline.states(), timeline.until
    ranks, spares = plan.ranks, plan.cluster.spares * plan.cluster.gpus_per_node
    held = (sum(states.values()) + spares * wall) / 3600
    new = sum(states.get(state, 0.0) for state in (*history.pace.mix, "idle"))  # idle: ranks for which a limit left no power
    useful = history.steps * history.pace.stride * ranks
    _same("time", sum(states.values()), ranks * wall)
    _same("energy", sum(foot.energy_in.values()), foot.energy)
    _same("energy", sum(foot.energy_of.values()), foot.energy)
    _same("money", sum(item[0] for item in foot.bill), foot.cost[0])
    if not plan.price.owned:
        held -= sum(states.get(state, 0.0) for state in plan.price.unbilled or []) / 3600
        _same("rent", held * plan.price.gpu_hours[plan.gpu.name].mid, foot.bill.devices[0])
    assert history.resized or useful <= new * (1 + 1e-9), (
        f"steps that counted took {useful} rank-seconds, but only {new} were spent on new steps"
    )


def _same(what: str, one: float, other: float) -> None:
    assert math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12), f"{what} is not conserved: {one} against {other}"
