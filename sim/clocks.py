"""Two clocks: the run's own, in which it is simulated, and the wall's, in which it is told.

A watermill: the miller counts turns of the wheel, the village counts hours. Where the stream is low the wheel goes slower or stands
still; the miller's day has as many turns as ever.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from conf.hourly import hour_of
from conf.plan import Plan
from sim.pace import Pace
from sim.power import Meter, Spell
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

    def said(self, ranks: int) -> tuple[str, dict[str, Any]] | None:
        """The event with which it begins, and its detail."""
        if self.meter:
            return "cap", {"device": self.meter.plan.power.cap or math.inf}
        if self.share < 1:
            return "shrink", {"ranks": round(self.share * ranks)}
        return ("pause", {}) if self.state == "paused" else None


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
        wall, turns, hours = self._stretched(lived, step)

        def at(turn: float) -> float:
            place = min(bisect_left(turns, turn), len(turns) - 1)
            if turns[place] == turn or not place:
                return hours[place]
            share = (turn - turns[place - 1]) / (turns[place] - turns[place - 1])
            return hours[place - 1] + share * (hours[place] - hours[place - 1])

        wall.happenings = [h._replace(at=at(h.at)) for h in lived.happenings]
        wall.bars = [bar._replace(start=at(bar.start), stop=at(bar.stop)) for bar in lived.bars]
        for here in self.stretches:
            if here.start < wall.until and (said := here.said(lived.ranks)):
                wall.event(here.start, "run", said[0], until=here.stop, **said[1])
        wall.happenings.sort(key=lambda h: h.at)
        return wall

    def _stretched(self, lived: Timeline, step: Pace) -> tuple[Timeline, list[float], list[float]]:
        """The segments by the wall's clock, and the moments of both clocks at which a segment or a stretch ends."""
        wall, rest = Timeline(lived.ranks), list(self.stretches)
        turns, hours = [0.0], [0.0]
        for stage, start, stop, mix, number in lived.segments:
            left = stop - start
            while left > 0:
                now = wall.until
                while rest and rest[0].stop <= now:
                    rest.pop(0)
                here = rest[0] if rest and rest[0].start <= now else Stretch(now, rest[0].start if rest else math.inf, 1.0)
                if here.state:
                    wall.spend(stage, {here.state: 1.0}, now, here.stop, number)
                else:
                    room = (here.stop - now) * here.speed
                    wall.spend(stage, here.mixed(mix, step.mix), now, now + left / here.speed if left <= room else here.stop, number)
                    left = max(0.0, left - room)
                turns.append(stop - left)
                hours.append(wall.until)
        return wall, turns, hours
