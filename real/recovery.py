"""The way back up, executed: ranks are watched, ended when one fails, and started again, on fewer devices if need be.

run → fault → detect (a process that ended, a heart that stands still) → abort (all others end) → reallocate (a pause, or a device
left out) → init → load → replay → run: the states that sim/recovery.py foretells. Two limits tell that a heart stands still:
failures.timeout within steps, failures.start_timeout in what may take longer.
"""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import Refused
from conf.plan import Plan
from conf.record import STATES, Record, read
from conf.rules import problems
from conf.units import show
from real import tiers
from real.cluster import LOST, POLL, Crew, Work, ending
from real.failures import INJECTED, Storm
from real.heartbeat import PATIENT, Beat, Pulse, Stopped

STAGE = "pretrain"
WAITING = ("torch/distributed/", "in synchronize")  # where a rank is that waits for another
LONGEST = 60.0  # seconds of the longest pause before a restart


class Fall(NamedTuple):
    """How an attempt ended before its time; moments on the run's clock."""

    rank: int
    by: str  # who noticed: exit or timeout
    why: str
    fault: float
    seen: float
    at_once: bool = False  # an error of its own, before any rank had done a step


class Supervisor:
    """Keeps the ranks of a run at work on this machine."""

    def __init__(self, plan: Plan, folder: Path, record: Record, say: Callable[[str], None]) -> None:
        self.plan, self.folder, self.record, self.say = plan, folder, record, say
        starts = (event["at"] for event in read(folder, "events") if (event["stage"], event["event"]) == (STAGE, "start"))
        self.storm = Storm(plan, record, min(starts, default=record.now()))
        self.away: dict[int, float] = {}  # devices left out, and when they are back
        self.blamed: Counter[int] = Counter()  # failures of each device since the last new checkpoint
        self.in_a_row, self.saved = 0, self._newest()
        self.asked = 0.0  # when a signal asked to stop

    def run(self, work: Work, start: Any) -> None:
        """`work(plan, start)` on every rank until it is done.

        Raises Refused with what a rank refused, and when failures.retries are spent; Stopped when a signal asked for it.
        """
        with self._signals():
            while True:
                devices = self._devices()
                plan = self._on(len(devices))
                pulse, launched = Pulse(plan.ranks), self.record.now()
                self.record.flush()
                crew = Crew(
                    plan, devices, pulse, self.folder, work, replace(start, launched=launched, pulse=pulse, whole=start.whole or self.plan)
                )
                try:
                    fall = self._watch(crew, shrunk=len(devices) < self.plan.ranks)
                finally:
                    crew.end()
                if fall is None and self.asked:
                    raise Stopped
                if fall is None and not pulse.stop:
                    return
                start = replace(start, furthest=max(start.furthest, *(beat.step for beat in pulse)))
                if fall is None:
                    self._resized()
                else:
                    self._fell(crew, fall, devices, launched)
                    self._again(fall, devices)

    # -- watching

    def _watch(self, crew: Crew, shrunk: bool) -> Fall | None:
        """Until all ranks have ended well, or one has failed."""
        before, pulse, newest = self.record.now(), crew.pulse, self._newest()
        while True:
            ended = crew.ended()
            if any(ended.values()):
                return self._exited(crew, before)
            if len(ended) == pulse.ranks:
                return None
            if (still := self._still(crew)) is not None:
                return still
            if self.asked and not pulse.stop:
                pulse.ask_to_stop()
            if self.asked and time.monotonic() - self.asked > self.plan.failures.grace:
                grace = show(self.plan.failures.grace, "s")
                self.say(f"failures.grace={grace} was not enough to save: what followed step {self._newest()} is lost; raise it")
                raise Stopped
            if shrunk and not pulse.stop and self._newest() > newest and self._back():
                pulse.ask_to_stop()
            before = self.record.now()
            self.storm.blow(crew)
            time.sleep(POLL)

    def _exited(self, crew: Crew, before: float) -> Fall:
        """Of several that ended the one that a signal killed, else one that erred, else the one that beat longest ago.

        Raises Refused with what a rank refused.
        """
        seen = self.record.now()
        time.sleep(POLL)
        if refused := crew.refused():
            raise refused
        ended = {number: status for number, status in crew.ended().items() if status}
        rank = min(ended, key=lambda number: (ended[number] == LOST, ended[number] > 0, crew.pulse[number].at))
        at_once = 0 < ended[rank] != LOST and not any(beat.work for beat in crew.pulse)
        return Fall(rank, "exit", ending(ended[rank]), before, seen, at_once)

    def _still(self, crew: Crew) -> Fall | None:
        """The rank whose heart has stood still for too long, and that the others wait for.

        That is one that does not say where it is, else one that is not waiting in a collective, else the one that beat longest ago.
        """
        now, limits = time.monotonic(), self.plan.failures
        beats = {number: beat for number, beat in enumerate(crew.pulse) if number not in crew.ended()}
        starting = any(beat.work == 0 for beat in beats.values())  # somebody has not done a step yet

        def late(beat: Beat) -> bool:
            compiling = beat.state == "evaluate" and self.plan.train.compile
            patient = starting or beat.state in PATIENT or compiling
            return now - beat.at > (limits.start_timeout if patient else limits.timeout.mean)

        if not any(map(late, beats.values())):
            return None
        span, seen, places = now - min(beat.at for beat in beats.values()), self.record.now(), crew.places()
        rank = min(beats, key=lambda number: (places[number] != "", any(sign in places[number] for sign in WAITING), beats[number].at))
        where = f"at {places[rank]}" if places[rank] else "without an answer"
        return Fall(rank, "timeout", f"no progress for {show(span, 's')} in {beats[rank].state}, {where}", seen - span, seen)

    # -- after a fall

    def _fell(self, crew: Crew, fall: Fall, devices: list[int], launched: float) -> None:
        """Tell of it, and book the time since the ranks last did: work that is lost, noticing it, ending the rest."""
        record, ranks, step = self.record, len(devices), max(beat.step for beat in crew.pulse)
        fall = fall._replace(fault=self._played(fall, launched))
        record.event(STAGE, "failure", step, at=fall.fault, cause=fall.why, culprit=fall.rank, device=devices[fall.rank])
        record.event(STAGE, "detection", step, at=fall.seen, by=fall.by)
        rows = read(self.folder, "ledger")
        booked = sum(row["value"] for row in rows if row["stage"] == STAGE and row["at"] > launched and row["quantity"] in STATES)
        now = record.now()
        detect, abort = ranks * (fall.seen - fall.fault), ranks * (now - fall.seen)
        torn = ranks * (now - launched) - booked - detect - abort
        for state, seconds in (("replay", torn), ("detect", detect + min(0.0, torn)), ("abort", abort)):
            if seconds > 0:
                record.observe(STAGE, state, seconds, at=now)
        record.span("recovery", fall.fault, now, STAGE, step, "job")
        self.say(f"rank {fall.rank} of {ranks} failed after step {step}: {fall.why}")

    def _played(self, fall: Fall, launched: float) -> float:
        """When the fault struck: where it was played, the record knows better than who noticed it."""
        told = (event for event in read(self.folder, "events") if event["event"] == INJECTED and launched < event["at"] <= fall.seen)
        mine = (event["at"] for event in told if fall.rank in (event["rank"], json.loads(event["detail"]).get("struck")))
        return max(mine, default=fall.fault) if fall.by == "exit" else fall.fault

    def _again(self, fall: Fall, devices: list[int]) -> None:
        """Pause, and leave out a device that failed again and again.

        Raises Refused when failures.retries are spent.
        """
        newest, limits = self._newest(), self.plan.failures
        if newest > self.saved:
            self.saved, self.in_a_row = newest, 0
            self.blamed.clear()
        self.in_a_row += 1
        if fall.at_once and self.in_a_row > 1:
            raise Refused(f"rank {fall.rank} ended with {fall.why} before its first step, twice: its output is above, and a third "
                          "start would end the same way")  # fmt: skip
        if self.in_a_row > limits.retries:
            at = f"step {newest}" if newest else "the start"
            raise Refused(f"failures.retries={limits.retries}: the ranks failed {self.in_a_row} times in a row without a new checkpoint, "
                          f"the last time rank {fall.rank} with {fall.why}; the same command goes on from {at}")  # fmt: skip
        device = devices[fall.rank]
        self.blamed[device] += 1
        if limits.without_spare == "shrink" and limits.quarantine and self.blamed[device] >= limits.quarantine:
            self.away[device] = self.record.now() + limits.repair.mean
            del self.blamed[device]
            self._resized()
        began = self.record.now()
        if self.in_a_row > 1:
            time.sleep(min(LONGEST, limits.backoff * 2 ** (self.in_a_row - 2)))
        self.record.observe(STAGE, "reallocate", len(devices) * (self.record.now() - began))

    def _resized(self) -> None:
        ranks = len(self._devices())
        self.record.event(STAGE, "resize", self._newest(), ranks=ranks)
        self.say(f"goes on with {ranks} of {self.plan.ranks} ranks")

    # -- devices

    def _devices(self) -> list[int]:
        """Those in use."""
        self._back()
        return [device for device in range(self.plan.ranks) if device not in self.away][: self._on(self.plan.ranks - len(self.away)).ranks]

    def _back(self) -> bool:
        """Whether a device that was left out is there again."""
        there = [device for device, until in self.away.items() if until <= self.record.now()]
        for device in there:
            del self.away[device]
        return bool(there)

    def _on(self, devices: int) -> Plan:
        """The plan on so many devices or fewer: as many data-parallel ranks as divide the same batch.

        Raises Refused where no mesh is legal.
        """
        if devices == self.plan.ranks:
            return self.plan
        for ranks in range(devices, 0, -1):
            smaller = self.plan.but(**{"cluster.gpus_per_node": ranks, "mesh.dp_shard": -1, "failures.script": []})
            if not problems(smaller):
                return smaller
        mesh = " × ".join(f"{name} {size}" for name, size in self.plan.axes.items() if size > 1)
        raise Refused(f"{devices} of {self.plan.ranks} devices are left, and no mesh of that many ranks is legal for {mesh} and "
                      f"train.global_batch={self.plan.train.global_batch}; repair them and give the same command again")  # fmt: skip

    def _newest(self) -> int:
        return tiers.last_saved(self.plan, self.folder)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 ask for a checkpoint and an end."""

        def ask(*_: Any) -> None:
            self.asked = self.asked or time.monotonic()

        before = {which: signal.signal(which, ask) for which in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
