"""The time of an operation as a training meets it: caches that have forgotten its inputs, and the clock that a training leaves.

A GPU at its power limit runs the same kernel a third slower than a cool one, and a product timed over and over finds its operands in
the cache. So between two timed calls a large product and a large copy run, in about the proportion of a training: they keep the device
at the power that it has there, push everything else out of its caches, and let the host queue the next call before its turn.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
WIDTH, COPIED = 8192, 1 << 30  # of the product between two calls, and bytes of the copy: 1.4 and 0.5 ms on an H200
REPEATS, BUDGET = 9, 0.05  # timed calls at most, and seconds that they may take together beyond the first three
WARM = 2.0  # s until the power limit has settled
LEAD = 10  # products and copies, about 20 ms, in which the host makes the next inputs, and again before the first timed call
SLEEP = 40_000_000  # cycles, about 20 ms, in which the host gets ahead
CALLS = 300  # that a queue takes without blocking the host


class Time(NamedTuple):
    """Median seconds of a call and its coefficient of variation."""

    seconds: float
    cv: float


class Stopwatch:
    def __init__(self, where: torch.device, width: int = WIDTH, copied: int = COPIED) -> None:
        self.where, self.cuda = where, where.type == "cuda"
        dtype = torch.bfloat16 if self.cuda else torch.float32
        self.a, self.b = (torch.randn(width, width, device=where, dtype=dtype) for _ in range(2))
        self.c, self.out = torch.empty(copied, device=where, dtype=torch.uint8), torch.empty_like(self.a)
        self.d = torch.empty_like(self.c)

    def product(self) -> None:
        torch.mm(self.a, self.b, out=self.out)

    def copy(self) -> None:
        self.d.copy_(self.c)

    def busy(self) -> None:
        """What a training does around a kernel."""
        self.product()
        self.copy()

    def warm(self) -> None:
        """Bring a GPU to the power that it has in a training."""
        if self.cuda:
            self.during(self.busy, WARM)

    def lead(self) -> None:
        """Work for a GPU while the host prepares something: it is to stay at its limit."""
        for _ in range(LEAD if self.cuda else 0):
            self.busy()

    def during(self, work: Call, seconds: float) -> float:
        """Do something for at least so long, the device never idle; returns how long it took."""
        began = time.perf_counter()
        while True:
            for _ in range(20 if self.cuda else 1):
                work()
            self.sync()
            if (spent := time.perf_counter() - began) >= seconds:
                return spent

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, work: Call) -> Time:
        """Of a call among others, after one that is not counted."""
        work()
        self.lead()
        spent = self._round(work, 3)
        more = min(REPEATS - 3, int(BUDGET / max(statistics.median(spent), 1e-9)))
        spent += self._round(work, more)
        typical = statistics.median(spent)
        return Time(typical, statistics.stdev(spent) / typical)

    def _round(self, work: Call, times: int) -> list[float]:
        if not self.cuda:
            return [self._clocked(work) for _ in range(times)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
        for start, stop in events:
            self.busy()
            start.record()
            work()
            stop.record()
        self.sync()
        return [start.elapsed_time(stop) * 1e-3 for start, stop in events]

    def _clocked(self, work: Call) -> float:
        self.busy()
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def queued(self, work: Call) -> Time:
        """Of a call on the device behind others that wait already: its kernel and the gap before it."""

        def many() -> float:
            if not self.cuda:
                return self._host(work, CALLS)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP)
            start.record()
            for _ in range(CALLS):
                work()
            stop.record()
            self.sync()
            return start.elapsed_time(stop) * 1e-3 / CALLS

        return _spread(many)

    def hosted(self, work: Call, calls: int = CALLS) -> Time:
        """Of a call on the host, which queues it while the device is busy with something else."""

        def many() -> float:
            if self.cuda:
                torch.cuda._sleep(SLEEP)
            seconds = self._host(work, calls)
            self.sync()
            return seconds

        return _spread(many)

    def stepped(self, work: Call, calls: int) -> Time:
        """Of a call that itself waits for the device, by the clock."""
        return _spread(lambda: self._host(work, calls))

    def _host(self, work: Call, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - began) / calls


def _spread(many: Callable[[], float]) -> Time:
    """Five rounds, after one that is not counted."""
    many()
    spent = [many() for _ in range(5)]
    typical = statistics.median(spent)
    return Time(typical, statistics.stdev(spent) / typical)
