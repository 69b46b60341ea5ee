"""Heartbeats: what each rank did last, in memory that the process which started it shares.

A beat is a few stores to memory, so every change of a rank's state is one: what beats makes progress, and is not merely
alive. The same memory carries what is wanted of the ranks: to stop after this step, or a fault that is to be played.
"""

import time
from collections.abc import Iterator
from multiprocessing import RawArray
from typing import NamedTuple

from conf.plan import Plan
from conf.record import STATES

FIELDS = ("beats", "at", "state", "step", "work")
ORDERS = ("slow", "until", "flip")  # played faults: times as slow, until when; a bit of a weight to turn
PATIENT = ("init", "load", "checkpoint", "idle", "queue", "sync")  # states that may last longer than a part of a step


STOPPED = "stopped"  # a file of a run's folder that says the same


class Stopped(Exception):
    """The run ended because a signal asked it to; it can go on."""


def clock(plan: Plan) -> float:
    """Seconds that all ranks count alike: on one server without the jumps of the wall clock."""
    return time.monotonic() if plan.cluster.nodes == 1 else time.time()


class Beat(NamedTuple):
    """What one rank did last."""

    beats: int  # changes of state since it was started; 0 = it has not come up yet
    at: float  # moment of the last one, on time.monotonic's clock
    state: str
    step: int  # steps done in this life and before
    work: float  # seconds in which it computed in the last step, waiting left out


class Pulse:
    """The heartbeats of all ranks, written by them, read by whoever started them."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.cells = RawArray("d", ranks * len(FIELDS))
        self.orders = RawArray("d", ranks * len(ORDERS))
        self.wish = RawArray("d", 1)
        for rank in range(ranks):
            self.cells[rank * len(FIELDS) + 1] = time.monotonic()

    # -- of a rank

    def beat(self, rank: int, state: str) -> None:
        place = rank * len(FIELDS)
        self.cells[place + 2] = STATES.index(state)
        self.cells[place + 1] = time.monotonic()
        self.cells[place] += 1

    def stepped(self, rank: int, step: int, work: float) -> None:
        place = rank * len(FIELDS)
        self.cells[place + 3], self.cells[place + 4] = step, work

    def take(self, rank: int, order: str) -> float:
        """What was ordered of a rank; a bit is turned only once."""
        place = rank * len(ORDERS) + ORDERS.index(order)
        value = self.orders[place]
        if order == "flip":
            self.orders[place] = 0.0
        return value

    @property
    def stop(self) -> bool:
        """Whether the ranks are to save and end after the step on which they are."""
        return bool(self.wish[0])

    # -- of whoever started them

    def ask_to_stop(self) -> None:
        self.wish[0] = 1.0

    def order(self, rank: int, **values: float) -> None:
        for name, value in values.items():
            self.orders[rank * len(ORDERS) + ORDERS.index(name)] = value

    def __getitem__(self, rank: int) -> Beat:
        beats, at, state, step, work = self.cells[rank * len(FIELDS) : (rank + 1) * len(FIELDS)]
        return Beat(int(beats), at, STATES[int(state)], int(step), work)

    def __iter__(self) -> Iterator[Beat]:
        return (self[rank] for rank in range(self.ranks))
