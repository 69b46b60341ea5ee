"""The feed: where the grid gives less, or is dirty, the run's own clock goes slower or stands still.

A watermill: the miller counts turns of the wheel, the village counts hours. A life is simulated in turns and told in hours.
Since the feed depends on the hours alone, the same plan has the same feed in every life, and the same faults strike
after the same turns.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from conf.arithmetic import state_bytes
from conf.errors import Refused
from conf.hourly import hour_of
from conf.plan import Limit, Plan
from conf.rules import problems
from conf.units import show
from sim.grid import HOUR, Shift, full_hour, shifted
from sim.kernels import Rates, rates
from sim.power import Meter, Spell
from sim.pretrain import Pace, pace
from sim.timeline import Timeline


class Stretch(NamedTuple):
    """A stretch of the wall's clock in which the run's goes at `speed`, under a meter of its own; or stands still in `state`."""

    start: float
    stop: float
    speed: float
    state: str = ""
    meter: Meter | None = None
    mix: Mapping[str, float] | None = None  # of a step meanwhile
    share: float = 1.0  # of the ranks at work; the others idle

    def mixed(self, mix: Mapping[str, float], step: Mapping[str, float]) -> Mapping[str, float]:
        """What a mix of states becomes."""
        mix = self.mix if self.mix and mix == step else mix
        return mix if self.share == 1 else {state: part * self.share for state, part in mix.items()} | {"idle": 1 - self.share}


@dataclass(frozen=True)
class Feed:
    """Stretches in order; between them the two clocks go together."""

    stretches: Sequence[Stretch] = ()
    delay: float = 0.0  # of the start, for a cleaner grid [s]
    saved: float = 0.0  # share of the location-based carbon that waiting was expected to save

    def turns(self, wall: float) -> float:
        """Time on the run's clock."""
        return wall - sum((1 - s.speed) * max(0.0, min(wall, s.stop) - s.start) for s in self.stretches)

    def budgeted(self, plan: Plan) -> Plan:
        """The plan with train.stop_after, hours of the wall, in turns; hours that the run chose to pause do not count."""
        if plan.train.stop_after is None or not self.stretches or plan.grid.shift == "pause":
            return plan
        return plan.but(**{"train.stop_after": self.turns(plan.train.stop_after)})

    def start(self, plan: Plan) -> str:
        """The date and hour at which the run starts."""
        return (hour_of(plan.start) + timedelta(seconds=self.delay)).isoformat() if self.delay else plan.start

    def spells(self) -> list[Spell]:
        return [Spell(s.start, s.stop, s.meter) for s in self.stretches if s.meter]

    def told(self, lived: Timeline, step: Pace) -> Timeline:
        """The same life by the wall's clock: what fell into a slow stretch takes longer, and pauses stand between."""
        if not self.stretches:
            return lived
        wall, rest = Timeline(lived.ranks), list(self.stretches)
        turns, hours = [0.0], [0.0]
        for stage, start, stop, mix, number in lived.segments:
            left = stop - start
            while left > 0:
                while rest and rest[0].stop <= wall.until:
                    rest.pop(0)
                now, here = wall.until, rest[0] if rest and rest[0].start <= wall.until else None
                if here and here.state:
                    wall.spend(stage, {here.state: 1.0}, now, here.stop, number)
                else:
                    speed, until = (here.speed, here.stop) if here else (1.0, rest[0].start if rest else float("inf"))
                    slow = here.mixed(mix, step.mix) if here else mix
                    whole = left <= (until - now) * speed
                    wall.spend(stage, slow, now, now + left / speed if whole else until, number)
                    left = 0.0 if whole else left - (until - now) * speed
                turns.append(stop - left)
                hours.append(wall.until)

        def at(turn: float) -> float:
            place = min(bisect_left(turns, turn), len(turns) - 1)
            if turns[place] == turn or not place:
                return hours[place]
            share = (turn - turns[place - 1]) / (turns[place] - turns[place - 1])
            return hours[place - 1] + share * (hours[place] - hours[place - 1])

        wall.happenings = [h._replace(at=at(h.at)) for h in lived.happenings]
        wall.bars = [bar._replace(start=at(bar.start), stop=at(bar.stop)) for bar in lived.bars]
        for here in self.stretches:
            if here.state == "paused" and here.start < wall.until:
                wall.event(here.start, "run", "pause", until=here.stop)
            if here.meter and here.start < wall.until:
                wall.event(here.start, "run", "cap", until=here.stop, device=here.meter.plan.power.cap)
            if here.share < 1 and here.start < wall.until:
                wall.event(here.start, "run", "shrink", until=here.stop, ranks=round(here.share * lived.ranks))
        wall.happenings.sort(key=lambda h: h.at)
        return wall


def feed_of(plan: Plan, step: Pace, meter: Meter, speed: Rates | None = None) -> Feed:
    """The feed of a plan: its limits, and what it does with the time until its deadline.

    Raises Refused for a limit that not even the idle cluster keeps, and for a deadline that cannot be met.
    """
    if not plan.power.limits and plan.grid.deadline is None:
        return Feed()
    back = _overhead(plan, speed or rates(plan))
    stretches: list[Stretch] = []
    for name, limit in sorted(plan.power.limits.items(), key=lambda item: item[1].start):
        least = meter.least() if limit.answer == "cap" else meter.table["paused"]
        if limit.most < least:
            what = "with devices capped to where they do no arithmetic" if limit.answer == "cap" else "with its devices idle"
            raise Refused(f"power.limits.{name}.most={show(limit.most, 'W')} is below {show(least, 'W')}, what the building draws {what}; "
                          f"raise it, set power.limits.{name}.answer=pause, or hold fewer servers")  # fmt: skip
        if limit.answer == "pause":
            stretches += _paused(limit.start, limit.start + limit.length, back)
        elif meter.peak(meter.step) > limit.most:
            stretches += _capped(plan, limit, meter) if limit.answer == "cap" else _shrunk(plan, name, limit, meter, back)
    feed = Feed(stretches)
    return feed if plan.grid.deadline is None else _waiting(plan, step, feed, back)


def _overhead(plan: Plan, speed: Rates) -> dict[str, float]:
    """Seconds that a pause costs: saving before, starting and loading after it."""
    size = float(state_bytes(plan.model))
    return {"checkpoint": size / speed.storage_write, "init": speed.init, "load": size / speed.storage_read}


def _paused(start: float, stop: float, back: dict[str, float]) -> list[Stretch]:
    """Save until the pause begins; when it is over, start and load."""
    edges = [max(0.0, start - back["checkpoint"]), start, stop, stop + back["init"], stop + back["init"] + back["load"]]
    states = ("checkpoint", "paused", "init", "load")
    return [Stretch(a, b, 0.0, state) for a, b, state in zip(edges, edges[1:], states, strict=False) if b > a]


def _capped(plan: Plan, limit: Limit, meter: Meter) -> list[Stretch]:
    """Devices limited so that the building keeps the limit."""
    limited = plan.but(**{"power.cap": meter.cap_for(limit.most)})
    slow = pace(limited)
    own = Meter(limited, slow.mix, slow.arithmetic, slow.stalled)
    return [Stretch(limit.start, limit.start + limit.length, pace(plan).step_time / slow.step_time, "", own, slow.mix)]


def _shrunk(plan: Plan, name: str, limit: Limit, meter: Meter, back: dict[str, float]) -> list[Stretch]:
    """As many data-parallel groups as the limit feeds, at the same batch: save and start again on fewer ranks, and in the end on all.

    Raises Refused where no smaller mesh is legal.
    """
    idle = meter.table["idle"]
    groups = int(plan.dp_shard * (limit.most - idle) / (meter.peak(meter.step) - idle))
    rest = plan.ranks // plan.dp_shard
    smaller = (plan.but(**{"mesh.dp_shard": n, "cluster.nodes": n * rest // plan.cluster.gpus_per_node}) for n in range(groups, 0, -1))
    fewer = next((small for small in smaller if not problems(small)), None)
    if fewer is None:
        raise Refused(f"power.limits.{name}.answer=shrink: no legal mesh has at most {groups} of dp_shard={plan.dp_shard} groups, which is "
                      f"what {show(limit.most, 'W')} feeds; set answer=cap or answer=pause")  # fmt: skip
    slow, share = pace(fewer), fewer.ranks / plan.ranks
    stop, come = limit.start + limit.length, back["init"] + back["load"]
    before, after = (_paused(at, at, back) for at in (limit.start, stop))
    speed = min(1.0, pace(plan).step_time / slow.step_time)
    works = Stretch(limit.start + come, max(limit.start + come, stop - back["checkpoint"]), speed, mix=slow.mix, share=share)
    return [*before, works, *after]


def _waiting(plan: Plan, step: Pace, feed: Feed, back: dict[str, float]) -> Feed:
    """The feed with the start or the pauses that emit least until the deadline.

    Every pause costs saving, starting and loading: what they cost together is taken from the time that is left, until it fits.
    """
    from sim.expect import expected

    work = expected(plan, step)["run.wall_clock"]
    work += work - feed.turns(work)
    cost = sum(back.values())
    shift, pauses = _shifted(plan, work), list[tuple[int, int]]()
    for _ in range(9):
        before, pauses = len(pauses), list(_joined(shift.paused, cost))
        if len(pauses) <= before:
            break
        try:
            shift = _shifted(plan, work + len(pauses) * cost)
        except Refused:  # no time for so many: none, then
            shift, pauses = Shift(0, (), 0.0), []
            break
    into = full_hour(plan.start)[1]
    delay = shift.delay * HOUR - into if shift.delay else 0.0
    first = 0.0 if shift.delay else into
    stops = [s for begin, end in pauses for s in _paused(begin * HOUR - first, end * HOUR - first, back)]
    return Feed([*feed.stretches, *stops], delay, shift.saved)


def _shifted(plan: Plan, work: float) -> Shift:
    try:
        return shifted(plan.grid, plan.start, work)
    except ValueError as error:
        raise Refused(str(error)) from error


def _joined(hours: Sequence[int], back: float) -> Iterator[tuple[int, int]]:
    """Hours as stretches from and to, those that leave no more than `back` seconds between them as one.

    >>> list(_joined((3, 4, 6, 9), 5000.0))
    [(3, 7), (9, 10)]
    """
    begin, end = -1, -1
    for hour in hours:
        if begin >= 0 and (hour - end) * HOUR > back:
            yield begin, end
            begin = -1
        begin, end = (hour if begin < 0 else begin), hour + 1
    if begin >= 0:
        yield begin, end
