"""The record of a life that was only imagined: the same files that a real run leaves, thinned to what a reader can use."""

import heapq
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from conf.files import write
from conf.program import to_yaml
from conf.record import Record, seal
from sim.life import History
from sim.load import write_power
from sim.summary import pretraining, run
from sim.timeline import Bar, Segment

SEGMENTS = 10_000  # stretches that the ledger tells one by one; a longer story is told in SLICES of the time
SLICES = 5_000
BARS = 10_000  # the longest are drawn
CHECKPOINTS = 10_000  # events of checkpoints and evaluations, evenly thinned


def tell(history: History, folder: Path) -> None:
    """Write plan, ledger, events and trace into the folder, over those of an earlier prediction."""
    for name in ("ledger.parquet", "events.parquet", "trace.json", "power.csv", "summary.json"):
        (folder / name).unlink(missing_ok=True)
    write(folder / "plan.yaml", to_yaml(history.plan))
    if history.plan.profile:
        write(folder / "profile.yaml", Path(history.plan.profile).read_bytes())
    record = Record(folder, rank=None, live=False)
    _ledger(history, record)
    _quantities(history, record)
    _events(history, record)
    _trace(history, record)
    seal(folder, [record])
    write_power(history.meter, history.timeline, history.feed.start(history.plan), folder)


def _ledger(history: History, record: Record) -> None:
    """Rank-seconds by state, and power where it changes."""
    ranks, before = history.timeline.ranks, None
    draw = dict(zip((segment.start for segment in history.timeline.segments), history.meter.draw(history.timeline), strict=True))
    for slice_ in _slices(history.timeline.segments, history.timeline.until):
        states: dict[str, float] = {}
        energy = 0.0
        for segment in slice_:
            seconds = segment.stop - segment.start
            energy += float(draw[segment.start]) * seconds
            for state, share in segment.mix.items():
                states[state] = states.get(state, 0.0) + share * seconds * ranks
        first, last = slice_[0], slice_[-1]
        for state, value in states.items():
            record.observe(last.stage, state, value, last.step, last.stop)
        power = energy / (last.stop - first.start)
        if power != before:
            record.observe(first.stage, "power", power, at=first.start)
        before = power


def _slices(segments: list[Segment], until: float) -> Iterator[list[Segment]]:
    """Segments one by one, or bundled by slice of time and stage when there are too many."""
    if len(segments) <= SEGMENTS:
        yield from ([segment] for segment in segments)
        return
    width = until / SLICES
    for _, bundle in groupby(segments, key=lambda s: (int(s.start / width), s.stage)):
        yield list(bundle)


def _quantities(history: History, record: Record) -> None:
    stages = {**history.told, "pretrain": pretraining(history), "run": run(history)}
    ends = {segment.stage: segment.stop for segment in history.timeline.segments}
    for stage, values in stages.items():
        for quantity, value in values.items():
            record.observe(stage, quantity, value, at=ends.get(stage, history.timeline.until))


def _events(history: History, record: Record) -> None:
    periodic = sum(h.event in ("checkpoint", "evaluate") for h in history.timeline.happenings)
    stride, seen = periodic // CHECKPOINTS + 1, 0
    for at, stage, event, step, detail in history.timeline.happenings:
        if event in ("checkpoint", "evaluate"):
            seen += 1
            if seen % stride:
                continue
        record.event(stage, event, step, at, **detail)


def _trace(history: History, record: Record) -> None:
    """The job's lane, servers in repair, workers at their tasks, and one typical step with its parts in a row."""
    timeline = history.timeline
    bars = [Bar(s.name, s.start, s.stop, s.stage, "job", s.step) for s in timeline.segments]
    bars += [bar._replace(stop=min(bar.stop, timeline.until)) for bar in timeline.bars]
    for stage, bundle in groupby(timeline.segments, key=lambda segment: segment.stage):
        of_stage = list(bundle)
        bars.append(Bar(stage, of_stage[0].start, of_stage[-1].stop, "stages", "stages"))
    longest = heapq.nlargest(BARS, bars, key=lambda bar: bar.stop - bar.start)
    for bar in sorted(longest, key=lambda bar: bar.start):
        record.span(bar.name, bar.start, bar.stop, bar.stage, bar.step, bar.lane)
    at = 0.0
    for state, share in history.pace.mix.items():
        record.span(state, at, at + share * history.pace.step_time, "one step", lane="a rank, on average")
        at += share * history.pace.step_time
