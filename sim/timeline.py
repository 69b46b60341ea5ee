"""The clock of the job: always in exactly one mix of states, so that the states add up to ranks × wall clock.

A tape on which every stretch of time is written once. A stretch that leaves a gap or overlaps the one before is refused
at once, not found at the end in a sum that is off.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from conf.record import STATES

KNOWN = frozenset(STATES)
WHOLLY: Mapping[str, Mapping[str, float]] = {state: {state: 1.0} for state in STATES}  # all ranks in one state


class Segment(NamedTuple):
    """A stretch of time and how the ranks shared it among states; the shares add up to 1."""

    stage: str
    start: float
    stop: float
    mix: Mapping[str, float]
    step: int | None

    @property
    def name(self) -> str:
        return next(iter(self.mix)) if len(self.mix) == 1 else "steps"


class Happening(NamedTuple):
    at: float
    stage: str
    event: str
    step: int | None
    detail: Mapping[str, Any]


class Bar(NamedTuple):
    """What a picture of the run shows: the job in a state, a server in repair, a worker at its task."""

    name: str
    start: float
    stop: float
    stage: str
    lane: str
    step: int | None = None


class Timeline:
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.segments: list[Segment] = []
        self.happenings: list[Happening] = []
        self.bars: list[Bar] = []
        self.until = 0.0
        self.summed: tuple[int, dict[str, float]] = (0, {})  # stretches, and what they come to

    def spend(self, stage: str, mix: Mapping[str, float], start: float, stop: float, step: int | None = None) -> None:
        """All ranks spent [start, stop] in these states."""
        assert start == self.until, f"a stretch starts at {start}, the tape ends at {self.until}"
        assert stop >= start and mix.keys() <= KNOWN, (stage, mix, start, stop)
        if stop > start:
            self.segments.append(Segment(stage, start, stop, mix, step))
            self.until = stop

    def event(self, at: float, stage: str, event: str, step: int | None = None, **detail: Any) -> None:
        self.happenings.append(Happening(at, stage, event, step, detail))

    def states(self) -> dict[str, float]:
        """Rank-seconds by state; a run has thousands of stretches and a handful of mixes."""
        if self.summed[0] == len(self.segments):
            return dict(self.summed[1])
        spent: dict[int, tuple[Mapping[str, float], list[float]]] = {}
        for _, start, stop, mix, _ in self.segments:
            key = id(mix)
            if key not in spent:
                spent[key] = (mix, [])
            spent[key][1].append(stop - start)
        totals: dict[str, float] = defaultdict(float)
        for mix, seconds in spent.values():
            for state, share in mix.items():
                totals[state] += share * math.fsum(seconds) * self.ranks
        self.summed = len(self.segments), dict(totals)
        return dict(totals)
