"""Which rank is slow: its own work in a step against that of the others, waiting left out.

All ranks take the same wall clock for a step, because the fast ones wait for the slow one; what tells it is the time in which a
rank waits for nobody. The score is the median over the last steps of this work over the median rank's.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

SPAN = 15  # steps that a score looks back
SLOW = 1.4  # score from which a rank is a straggler


class Slow(NamedTuple):
    rank: int
    score: float  # times the work of the median rank
    cost: float  # share by which all steps are longer, if it is kept


class Scores:
    """Scores of all ranks, fed once a step; pipeline stages have different work, so a rank is held against those of its own."""

    def __init__(self, ranks: int, stages: int = 1) -> None:
        self.peers = ranks // stages
        self.recent = [deque[tuple[float, float]](maxlen=SPAN) for _ in range(ranks)]  # times the usual work, share of the step
        self.flagged: set[int] = set()

    def look(self, work: Sequence[float], step_time: float) -> list[Slow]:
        """Ranks that have become stragglers with this step: seconds of own work of each, and of the step."""
        if self.peers < 2 or min(work) <= 0:
            return []
        found = []
        for rank, (seconds, recent) in enumerate(zip(work, self.recent, strict=True)):
            first = rank // self.peers * self.peers
            usual = statistics.median_low(work[first : first + self.peers])
            longer = max(0.0, seconds - usual)
            recent.append((seconds / usual, longer / max(step_time - longer, 1e-9)))
            score, cost = (statistics.median(values) for values in zip(*recent, strict=True))
            if len(recent) == SPAN and score > SLOW and rank not in self.flagged:
                self.flagged.add(rank)
                found.append(Slow(rank, score, cost))
            elif score < SLOW and rank in self.flagged:
                self.flagged.discard(rank)
        return found
