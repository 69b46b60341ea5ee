"""The clock of a rank: always in exactly one state, so that the states add up to the wall clock.

On a CPU the clock is read at each change. On a GPU work runs behind the host, so each change drops an event into the
stream and the durations are read when the step closes.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Timeline:
    """States of one rank; `changed` hears of each."""

    def __init__(self, cuda: bool = False, changed: Callable[[str], None] = lambda _: None) -> None:
        self.cuda, self.changed = cuda, changed
        self.state = "init"
        self.marks: list[tuple[str, Any, float]] = [("init", self._event(), time.perf_counter())]

    def _event(self) -> Any:
        if not self.cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(self, state: str) -> str:
        """Change the state; returns the one before."""
        before, self.state = self.state, state
        self.marks.append((state, self._event(), time.perf_counter()))
        self.changed(state)
        return before

    @contextmanager
    def during(self, state: str) -> Iterator[None]:
        before = self.enter(state)
        yield
        self.enter(before)

    def close(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last close, and how they divide into states; the two agree exactly."""
        if self.cuda:
            torch.cuda.synchronize()
        began, ended = self.marks[0][2], time.perf_counter()
        last = self._event()
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (state, event, at), (_, following, then) in zip(self.marks, [*self.marks[1:], ("", last, ended)], strict=True):
            seconds[state] += event.elapsed_time(following) / 1e3 if self.cuda else then - at
        total = ended - began
        if self.cuda:  # the stream's clock and the host's differ by microseconds: the host's is the wall clock
            scale = total / max(sum(seconds.values()), 1e-9)
            seconds = defaultdict(float, {state: s * scale for state, s in seconds.items()})
        self.marks = [(self.state, last, ended)]
        return total, dict(seconds)
