"""One step as events: pipeline ranks that run their passes in order, messages between them, and traffic beside their kernels.

The same pieces as the closed form (sim.parallel.pieces), but moved by a clock: a pass waits for what it needs, a message for
links that others use too, a rank for the slowest. One pipeline stands for all of them; a rank for its tensor-parallel group.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import simpy

from conf.arithmetic import stage_blocks
from conf.errors import Refused
from conf.plan import Plan
from conf.units import show
from sim.cluster import Course
from sim.flows import Flows, Link
from sim.kernels import Device, rates
from sim.network import Network
from sim.parallel import columns, pieces
from sim.schedule import Pass, orders, rank_of

MOST = 2_000_000  # passes of a step that are simulated
STATES = ("compute", "communication", "bubble", "optimizer")


class Span(NamedTuple):
    """A bar of the timeline."""

    name: str
    start: float
    stop: float
    rank: int
    lane: str


@dataclass
class Lived:
    """A step that was lived through."""

    step_time: float
    states: list[dict[str, float]]  # seconds of every pipeline rank by state; each adds up to step_time
    spans: list[Span] = field(default_factory=list)


def lived(plan: Plan) -> Lived:
    """Simulate one step of one pipeline.

    Raises Refused where a step has too many passes to go through one by one.
    """
    passes = plan.mesh.pp * plan.mesh.vpp * plan.accumulation
    if passes > MOST:
        raise Refused(f"mesh.pp × mesh.vpp × micro-batches = {passes:,} passes of a step, more than {MOST:,}; lower train.global_batch")
    return Step(plan).run()


def _numbers(arrays: Mapping[str, Any]) -> SimpleNamespace:
    """Arrays of one plan as numbers."""
    return SimpleNamespace(**{
        name: {kind: float(np.ravel(part)[0]) for kind, part in value.items()} if isinstance(value, dict) else float(np.ravel(value)[0])
        for name, value in arrays.items()
    })  # fmt: skip


class Step:
    """The world of one step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        p, device = columns([plan]), Device([rates(plan)])
        self.part = _numbers(vars(pieces(p, device, Network([plan], device))))
        self.slowdown, self.crowd = float(device["slowdown"][0]), float(np.ravel(p.crowd)[0])
        self.beside = bool(p.beside[0])
        self.pp, self.vpp, self.count = plan.mesh.pp, plan.mesh.vpp, plan.accumulation
        self.schedule = plan.mesh.pipeline
        self.env = simpy.Environment()
        self.flows = Flows(self.env)
        self.told: dict[Pass, simpy.Event] = {}  # a pass has ended, and what the next stage needs has arrived there
        self.busy = [simpy.Event(self.env) for _ in range(self.pp)]  # fires when a rank's traffic beside its kernels changes
        self.beside_now = [0] * self.pp
        self.spent = [dict.fromkeys(STATES, 0.0) for _ in range(self.pp)]
        self.spans: list[Span] = []

    def run(self) -> Lived:
        lengths = {kind: self._compute(Pass(kind, self.vpp, 0)) + self._traffic(kind) for kind in "FBIW"}
        ranks = [
            self.env.process(self._rank(rank, order))
            for rank, order in enumerate(orders(self.schedule, self.pp, self.vpp, self.count, lengths))
        ]
        self.env.run(until=self.env.process(self._end(ranks)))
        for states in self.spent:
            states["bubble"] = self.env.now - sum(states.values())
        return Lived(self.env.now, self.spent, sorted(self.spans, key=lambda span: span.start))

    def _compute(self, each: Pass) -> float:
        """Seconds of a pass: its stage's blocks, and on the last stage the ends; the embedding is little and counted there too."""
        part, stages = self.part, self.pp * self.vpp
        units, blocks = 0.5 * part.units / self.vpp, len(stage_blocks(self.plan.model.layers, stages, each.stage))
        ends = {kind: seconds * (each.stage == stages - 1) for kind, seconds in part.ends.items()}
        whole = {"F": blocks * part.block["F"] + ends["F"] + part.around / self.vpp + units, "W": blocks * part.block["W"]}
        whole["B"] = blocks * part.block["B"] + ends["B"] + part.added / self.vpp + units
        whole["I"] = whole["B"] - whole["W"]
        return self.crowd * float(whole[each.kind])

    def _traffic(self, kind: str) -> float:
        return 0.0 if kind == "W" else 0.5 * float(self.part.traffic) / self.vpp

    def _event(self, each: Pass) -> simpy.Event:
        if each not in self.told:
            self.told[each] = self.env.event()
        return self.told[each]

    def _rank(self, rank: int, order: list[Pass]) -> Course[None]:
        """A pipeline rank runs its passes in order."""
        zero = self.plan.mesh.zero
        last = self._last_micro_batch(order)
        starts = {3: 0, 2: last, 1: last, 0: len(order)}
        sharding = None
        for place, each in enumerate(order):
            if place == starts[zero] and self.beside:
                sharding = self.env.process(self._sharding(rank))
            for needed in self._needs(each):
                yield self._event(needed)
            start = self.env.now
            yield from self._work(rank, self._compute(each))
            self.spent[rank]["compute"] += self.env.now - start
            if self._traffic(each.kind):
                yield self.env.timeout(self._traffic(each.kind))
                self.spent[rank]["communication"] += self._traffic(each.kind)
            self.spans.append(Span(f"{each.kind}{each.micro} of stage {each.stage}", start, self.env.now, rank, "kernels"))
            self.env.process(self._send(rank, each))
        start = self.env.now
        yield sharding or self.env.process(self._sharding(rank))
        self.spent[rank]["communication"] += self.env.now - start

    def _last_micro_batch(self, order: list[Pass]) -> int:
        """From which pass on as much is left as one micro-batch is: the window of traffic that waits for whole gradients."""
        left, whole = 0.0, sum(map(self._compute, order)) / self.count
        for place in range(len(order) - 1, -1, -1):
            left += self._compute(order[place])
            if left >= whole * (1 - 1e-9):
                return place
        return 0

    def _needs(self, each: Pass) -> Iterator[Pass]:
        """Passes on other stages that must have ended before this one."""
        if each.kind == "F" and each.stage > 0:
            yield each._replace(stage=each.stage - 1)
        if each.kind in "BI" and each.stage < self.pp * self.vpp - 1:
            yield each._replace(stage=each.stage + 1)

    def _work(self, rank: int, seconds: float) -> Course[None]:
        """Compute, slower while traffic runs beside it."""
        left = seconds
        while left > 1e-12 * seconds:
            rate = 1 - self.slowdown * min(self.beside_now[rank], 1) if self.beside else 1.0
            start = self.env.now
            yield self.env.timeout(left / rate) | self.busy[rank]
            left -= rate * (self.env.now - start)

    def _sharding(self, rank: int) -> Course[None]:
        """Gathers and reductions of data parallelism, over this rank's way out of its server."""
        if self.part.sharding <= 0:
            return
        start = self.env.now
        self._mark(rank, 1)
        yield self.flows.send(self.part.sharding, [self._out(rank)])
        self._mark(rank, -1)
        self.spans.append(Span("gathers and reductions", start, self.env.now, rank, "data parallelism"))

    def _mark(self, rank: int, change: int) -> None:
        self.beside_now[rank] += change
        event, self.busy[rank] = self.busy[rank], self.env.event()
        event.succeed()

    def _out(self, rank: int) -> Link:
        return "out", rank

    def _send(self, rank: int, each: Pass) -> Course[None]:
        """What the neighbour needs of a pass, to where its stage lies."""
        target = each.stage + (1 if each.kind == "F" else -1)
        if each.kind != "W" and 0 <= target < self.pp * self.vpp:
            to = rank_of(self.schedule, target, self.pp)
            if to != rank:
                start = self.env.now
                yield self.flows.send(self.part.send, [self._out(rank), ("in", to)])
                self.spans.append(Span(f"{each.kind}{each.micro} → rank {to}", start, self.env.now, rank, "messages"))
        self._event(each).succeed()

    def _end(self, ranks: list[simpy.Process]) -> Course[None]:
        """All ranks agree on the gradient norm, then each updates its shard."""
        yield simpy.AllOf(self.env, ranks)
        start = self.env.now
        optimizer = self.crowd * self.part.optimizer
        yield self.env.timeout(optimizer + self.part.agreed)
        for rank, states in enumerate(self.spent):
            states["optimizer"] += optimizer
            states["communication"] += self.part.agreed
            self.spans.append(Span("optimizer", start, self.env.now, rank, "kernels"))


def told(plan: Plan, step: Lived, closed: float) -> dict[str, Any]:
    """The step as one record."""
    return {"plan": plan.id, "step_time": step.step_time, "closed_form": closed, "ranks": step.states}


def page(plan: Plan, record: Mapping[str, Any]) -> str:
    """The same for a person: where the time of the first, the middle and the last pipeline rank goes."""
    ranks, whole, closed = record["ranks"], record["step_time"], record["closed_form"]
    passes = f"{plan.mesh.pp} pipeline ranks, {plan.accumulation} micro-batches, {plan.mesh.pipeline}" if plan.mesh.pp > 1 else "one stage"
    told_of = f"plan {plan.id}   {plan.model.name}   one step of one pipeline: {passes}"
    both = [
        f"  step, event by event   {show(whole, 's'):>9}",
        f"  step, closed form      {show(closed, 's'):>9}   {closed / whole - 1:+.1%}",
    ]
    lines = [told_of, "", *both, "", "  rank " + "".join(f"{state:>15}" for state in STATES)]
    for rank in sorted({0, len(ranks) // 2, len(ranks) - 1}):
        lines.append(f"  {rank:>4} " + "".join(f"{ranks[rank][state] / whole:>15.1%}" for state in STATES))
    return "\n".join(lines)


def trace(step: Lived) -> str:
    """The timeline for Perfetto: a process a pipeline rank, a lane a stream."""
    lanes = ("kernels", "messages", "data parallelism")
    ranks = range(len(step.states))
    named = [{"name": "process_name", "pid": rank, "args": {"name": f"pipeline rank {rank}"}} for rank in ranks]
    named += [{"name": "thread_name", "pid": rank, "tid": i, "args": {"name": lane}} for rank in ranks for i, lane in enumerate(lanes)]
    bars = [{"ph": "M", **name} for name in named]
    for span in step.spans:
        at = {"ts": 1e6 * span.start, "dur": 1e6 * (span.stop - span.start)}
        bars.append({"ph": "X", "name": span.name, "pid": span.rank, "tid": lanes.index(span.lane), **at})
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": bars})
