"""The feed: when the grid gives less, or is dirty, and what the run does about it: slow down, run smaller, stand still, start later.

It depends on the hours alone, so that the same plan has the same feed in every life, and the same faults strike after the
same work (`clocks.py` tells the two apart).
"""

from collections.abc import Iterator, Sequence

from conf.errors import Refused
from conf.plan import Limit, Plan
from conf.rules import problems
from conf.units import show
from sim.checkpoint import load, save
from sim.clocks import Feed, Stretch
from sim.grid import HOUR, Shift, full_hour, shifted
from sim.kernels import Rates, rates
from sim.pace import Pace, pace
from sim.power import Meter


def feed_of(plan: Plan, step: Pace, meter: Meter, speed: Rates | None = None) -> Feed:
    """The feed of a plan: its limits, and what it does with the time until its deadline.

    Raises Refused for a limit that not even the idle cluster keeps, and for a deadline that cannot be met.
    """
    if not plan.power.limits and plan.grid.deadline is None:
        return Feed()
    back = _overhead(plan, speed or rates(plan))
    stretches: list[Stretch] = []
    for name, limit in sorted(plan.power.limits.items(), key=lambda item: item[1].start):
        least = meter.least() if limit.answer == "cap" else meter.table["paused"]
        if limit.most < least:
            what = "with devices capped to where they do no arithmetic" if limit.answer == "cap" else "with its devices idle"
            raise Refused(f"power.limits.{name}.most={show(limit.most, 'W')} is below {show(least, 'W')}, what the building draws {what}; "
                          f"raise it, set power.limits.{name}.answer=pause, or hold fewer servers")  # fmt: skip
        if limit.answer == "pause":
            stretches += _paused(limit.start, limit.start + limit.length, back)
        elif meter.peak(meter.step) > limit.most:
            stretches += _capped(plan, limit, meter) if limit.answer == "cap" else _shrunk(plan, name, limit, meter, back)
    feed = Feed(stretches)
    return feed if plan.grid.deadline is None else _waiting(plan, step, feed, back)


def _overhead(plan: Plan, speed: Rates) -> dict[str, float]:
    """Seconds that a pause costs: saving before, starting and loading after it."""
    return {"checkpoint": save(plan, speed), "init": speed.init, "load": load(plan, speed)}


def _paused(start: float, stop: float, back: dict[str, float]) -> list[Stretch]:
    """Save until the pause begins; when it is over, start and load."""
    edges = [max(0.0, start - back["checkpoint"]), start, stop, stop + back["init"], stop + back["init"] + back["load"]]
    states = ("checkpoint", "paused", "init", "load")
    return [Stretch(a, b, 0.0, state) for a, b, state in zip(edges, edges[1:], states, strict=False) if b > a]


def _capped(plan: Plan, limit: Limit, meter: Meter) -> list[Stretch]:
    """Devices limited so that the building keeps the limit."""
    limited = plan.but(**{"power.cap": meter.cap_for(limit.most)})
    slow = pace(limited)
    own = Meter(limited, slow.mix, slow.arithmetic, slow.stalled)
    return [Stretch(limit.start, limit.start + limit.length, pace(plan).step_time / slow.step_time, "", own, slow.mix)]


def _shrunk(plan: Plan, name: str, limit: Limit, meter: Meter, back: dict[str, float]) -> list[Stretch]:
    """As many data-parallel groups as the limit feeds, at the same batch: save and start again on fewer ranks, and in the end on all.

    Raises Refused where no smaller mesh is legal.
    """
    idle = meter.table["idle"]
    groups = int(plan.dp_shard * (limit.most - idle) / (meter.peak(meter.step) - idle))
    rest = plan.ranks // plan.dp_shard
    smaller = (plan.but(**{"mesh.dp_shard": n, "cluster.nodes": n * rest // plan.cluster.gpus_per_node}) for n in range(groups, 0, -1))
    fewer = next((small for small in smaller if not problems(small)), None)
    if fewer is None:
        raise Refused(f"power.limits.{name}.answer=shrink: no legal mesh has at most {groups} of dp_shard={plan.dp_shard} groups, which is "
                      f"what {show(limit.most, 'W')} feeds; set answer=cap or answer=pause")  # fmt: skip
    slow, share = pace(fewer), fewer.ranks / plan.ranks
    stop, come = limit.start + limit.length, back["init"] + back["load"]
    before, after = (_paused(at, at, back) for at in (limit.start, stop))
    speed = min(1.0, pace(plan).step_time / slow.step_time)
    works = Stretch(limit.start + come, max(limit.start + come, stop - back["checkpoint"]), speed, mix=slow.mix, share=share)
    return [*before, works, *after]


def _waiting(plan: Plan, step: Pace, feed: Feed, back: dict[str, float]) -> Feed:
    """The feed with the start or the pauses that emit least until the deadline.

    Every pause costs saving, starting and loading: what they cost together is taken from the time that is left, until it fits.
    """
    from sim.expect import expected

    work = expected(plan, step)["run.wall_clock"]
    work += work - feed.turns(work)
    cost = sum(back.values())
    shift, pauses = _shifted(plan, work), list[tuple[int, int]]()
    for _ in range(9):
        before, pauses = len(pauses), list(_joined(shift.paused, cost))
        if len(pauses) <= before:
            break
        try:
            shift = _shifted(plan, work + len(pauses) * cost)
        except Refused:  # no time for so many: none, then
            shift, pauses = Shift(0, (), 0.0), []
            break
    into = full_hour(plan.start)[1]
    delay = shift.delay * HOUR - into if shift.delay else 0.0
    first = 0.0 if shift.delay else into
    stops = [s for begin, end in pauses for s in _paused(begin * HOUR - first, end * HOUR - first, back)]
    return Feed([*feed.stretches, *stops], delay, shift.saved)


def _shifted(plan: Plan, work: float) -> Shift:
    try:
        return shifted(plan.grid, plan.start, work)
    except ValueError as error:
        raise Refused(str(error)) from error


def _joined(hours: Sequence[int], back: float) -> Iterator[tuple[int, int]]:
    """Hours as stretches from and to, those that leave no more than `back` seconds between them as one.

    >>> list(_joined((3, 4, 6, 9), 5000.0))
    [(3, 7), (9, 10)]
    """
    begin, end = -1, -1
    for hour in hours:
        if begin >= 0 and (hour - end) * HOUR > back:
            yield begin, end
            begin = -1
        begin, end = (hour if begin < 0 else begin), hour + 1
    if begin >= 0:
        yield begin, end
