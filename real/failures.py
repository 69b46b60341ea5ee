"""Makes faults happen, for tests: real signals, real files, real numbers, never in a run that did not ask for them.

An `Injector` sits in each rank and plays what failures.script says of it, at the phase of the step that it names. A `Storm` sits
with the supervisor and lets the causes of failures.causes strike at moments drawn from their laws, where failures.inject
asks for that. Each writes an event before it strikes: a fault that was planned and left no event did not fire.
"""

import heapq
import json
import math
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from conf.plan import Cause, Plan
from conf.record import Record, read
from conf.script import Fault
from conf.script import read as read_fault
from real import checkpoint
from real.cluster import Crew
from real.heartbeat import Pulse
from real.optim import local
from real.tiers import tiers

STAGE = "pretrain"
INJECTED = "injected"
SAVES = ("saving", "sealing", "saved")  # beside training these come when the step that they belong to is over
LOADING = 0  # before the first step of a life: a load comes before any step, whichever it leads to


class Injector:
    """The faults of one rank's script."""

    def __init__(self, plan: Plan, record: Record, rank: int, pulse: Pulse, folder: Path, first: int = 0) -> None:
        self.record, self.rank, self.pulse, self.tiers = record, rank, pulse, tiers(plan, folder)
        script = enumerate(map(read_fault, plan.failures.script))
        self.mine = [(number, fault) for number, fault in script if fault.rank == first + rank]
        self.struck = Counter(fired(folder)) if self.mine else Counter[int]()
        self.step, self.drag, self.until = LOADING, 1.0, -1
        self.slept = self.lagged = 0.0  # in this step, and in the last in which it lagged
        self.storm = plan.failures.inject
        self.named: list[tuple[str, Tensor]] = []

    def attach(self, parts: Sequence[nn.Module], named: Sequence[tuple[str, Tensor]]) -> None:
        """Come between the forward and the backward pass of the model's last part."""
        self.named = list(named)
        if self.mine or self.storm:
            parts[-1].register_forward_hook(self._forward)

    def _forward(self, _: nn.Module, __: Any, output: Any) -> None:
        self.at("forward")
        self._lag()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: self.at("backward"))

    def begin(self, step: int) -> None:
        """A step begins; the first is 1."""
        self.step, self.slept = step, 0.0
        if self.pulse.take(self.rank, "flip"):
            self._flip()

    def _lag(self) -> None:
        """A slow rank needs as many times its usual work as its factor says, in the first forward pass of a step."""
        ordered = self.pulse.take(self.rank, "slow") if time.monotonic() < self.pulse.take(self.rank, "until") else 1.0
        drag = max(ordered, self.drag if self.step <= self.until else 1.0)
        if drag > 1 and not self.slept:
            self.slept = (drag - 1) * max(0.0, self.pulse[self.rank].work - self.lagged)
            time.sleep(self.slept)
            self.lagged = self.slept

    def at(self, phase: str) -> None:
        """What the script says of this phase of this step."""
        for number, fault in self.mine:
            due = self.step in (fault.step, LOADING) or (phase in SAVES and self.step > fault.step)
            if fault.phase == phase and due and self.struck[number] < fault.times:
                self.struck[number] += 1
                self.record.event(STAGE, INJECTED, self.step, fault=fault.kind, entry=number, phase=phase)
                self.record.flush()
                self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit":
                sys.stdout.flush()
                os._exit(3)
            case "sleep" | "slowdisk":
                time.sleep(fault.seconds)
            case "nan":
                local(next(p for _, p in self.named if p.grad is not None).grad).view(-1)[:1] = float("nan")
            case "flip":
                self._flip()
            case "slow":
                self.drag, self.until = fault.factor, fault.step + fault.steps - 1
            case "truncate" | "alter" | "remove":
                spoil(max(self._held(), key=lambda path: path.stat().st_mtime), fault.kind)
            case "full":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            case "broken":
                raise OSError(5, "Input/output error")
            case "clock":
                jump, now = fault.seconds, time.time
                time.time = lambda: now() + jump

    def _held(self) -> list[Path]:
        return [path for tier in self.tiers for path in checkpoint.complete(tier.folder)]

    @torch.no_grad()
    def _flip(self) -> None:
        """Turn a bit of the exponent of one weight, which makes it 16 times as large or as small: wrong, and silent."""
        cells = local(self.named[0][1]).view(-1)
        bits = cells[:1].view(torch.int32 if cells.element_size() == 4 else torch.int16)
        bits ^= 1 << (8 * cells.element_size() - 7)


def spoil(folder: Path, how: str) -> None:
    """Damage the largest file of a checkpoint: cut it, change a byte, or take it away."""
    file = max((p for p in folder.iterdir() if p.name != "manifest.json"), key=lambda p: p.stat().st_size)
    if how == "remove":
        file.unlink()
        return
    with file.open("r+b") as out:
        if how == "truncate":
            out.truncate(file.stat().st_size // 2)
        else:
            out.seek(file.stat().st_size // 2)
            byte = out.read(1)
            out.seek(-1, os.SEEK_CUR)
            out.write(bytes([byte[0] ^ 0x40]))


def fired(folder: Path) -> Iterator[int]:
    """Entries of the script that have struck, each as often as it did."""
    events = read(folder, "events") if folder.is_dir() else []
    details = (json.loads(event["detail"]) for event in events if event["event"] == INJECTED)
    return (detail["entry"] for detail in details if "entry" in detail)


def unfired(plan: Plan, folder: Path) -> list[str]:
    """Entries of the script that have not struck as often as they were to."""
    struck = Counter(fired(folder))
    return [entry for number, entry in enumerate(plan.failures.script) if struck[number] < read_fault(entry).times]


class Strike(NamedTuple):
    at: float  # after the start of pre-training
    name: str
    cause: Cause
    rank: int


def strikes(plan: Plan, seed: int) -> Iterator[Strike]:
    """When each cause strikes, and whom; for causes without memory at the moments at which it strikes in `sim`, from the same seed."""
    each = (_strikes(plan, name, seed) for name in sorted(plan.failures.causes))
    return heapq.merge(*each, key=lambda strike: strike.at)


def _strikes(plan: Plan, name: str, seed: int) -> Iterator[Strike]:
    """A Poisson process, or for a Weibull shape other than 1 renewals of the whole job."""
    cause, cluster = plan.failures.causes[name], plan.cluster
    when, where = (np.random.default_rng([seed, crc32(name.encode()), part]) for part in (0, 2))
    units = {"job": 1, "node": cluster.servers, "gpu": cluster.servers * cluster.gpus_per_node, "switch": cluster.servers / cause.blast}
    mean, at = 1 / (cause.rate * units[cause.per]), 0.0
    while True:
        gap = when.exponential(mean) if cause.shape == 1 else when.weibull(cause.shape) * mean / math.gamma(1 + 1 / cause.shape)
        at += float(gap)
        yield Strike(at, name, cause, int(where.integers(plan.ranks)))


class Storm:
    """The strikes of one run, in their order; those of an earlier attempt at it are over."""

    def __init__(self, plan: Plan, record: Record, began: float) -> None:
        self.record, self.began = record, began
        self.coming = strikes(plan, plan.seed) if plan.failures.inject else iter(())
        self.next = next(self.coming, None)
        while self.next and began + self.next.at < record.now():
            self.next = next(self.coming, None)

    def blow(self, crew: Crew) -> None:
        """Let strike what is due; what finds no rank at work is over."""
        pulse = crew.pulse
        while self.next and self.began + self.next.at <= self.record.now():
            strike, self.next = self.next, next(self.coming, None)
            rank = strike.rank % pulse.ranks
            if rank in crew.ended() or not pulse[rank].beats:
                continue
            self.record.event(STAGE, INJECTED, pulse[rank].step, fault=strike.cause.how, cause=strike.name, struck=rank)
            self.record.flush()
            self._strike(strike.cause, crew, rank)

    @staticmethod
    def _strike(cause: Cause, crew: Crew, rank: int) -> None:
        match cause.how:
            case "stop":
                crew.signal(rank, signal.SIGKILL)
            case "hang":
                crew.signal(rank, signal.SIGSTOP)
            case "corrupt":
                crew.pulse.order(rank, flip=1.0)
            case "slow":
                crew.pulse.order(rank, slow=cause.factor, until=time.monotonic() + cause.lasts.mean)
