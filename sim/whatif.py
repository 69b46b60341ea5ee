"""What if: two plans side by side, the difference, and where it comes from."""

from collections.abc import Iterator, Mapping
from typing import Any

from conf.plan import Plan
from conf.record import STATES
from conf.units import show
from sim.failures import rate
from sim.pace import Pace

SHOWN = ("pretrain.step_time", "pretrain.tokens_per_s", "pretrain.mfu", "pretrain.peak_memory", "pretrain.final_loss", "run.wall_clock",
         "run.tokens", "run.ettr", "run.interruptions", "run.gpu_hours", "run.cost", "run.energy", "run.carbon_location")  # fmt: skip
NOTABLE = 0.002  # share of the longer of two times below which a part is no cause


def changed(one: Plan, other: Plan) -> dict[str, tuple[Any, Any]]:
    """Values that differ, by key."""
    from conf.node import leaves

    first, second = ({key: value for key, value, _ in leaves(plan)} for plan in (one, other))
    names = [*first, *(key for key in second if key not in first)]
    return {key: (first.get(key), second.get(key)) for key in names if first.get(key) != second.get(key)}


def parts(one: Pace, other: Pace) -> dict[str, float]:
    """Seconds that each part of a step takes longer in the other plan; they add up to the difference of the step times."""
    names = dict.fromkeys((*one.mix, *other.mix))
    return {name: other.step_time * other.mix.get(name, 0.0) - one.step_time * one.mix.get(name, 0.0) for name in names}


def shares(told: Mapping[str, Any]) -> dict[str, float]:
    """Share of the run in each state."""
    spent = {state: told[f"state.{state}"]["value"] for state in STATES if f"state.{state}" in told}
    return {state: seconds / sum(spent.values()) for state, seconds in spent.items()}


def table(plans: tuple[Plan, Plan], paces: tuple[Pace, Pace], told: tuple[Mapping[str, Any], Mapping[str, Any]]) -> str:
    """For a person: what was varied, both columns, and the causes."""
    lines = [f"{key} {before} → {after}" for key, (before, after) in changed(*plans).items()] or ["the two plans are the same"]
    lines += ["", f"{'':24}{plans[0].id:>16}{plans[1].id:>16}   change"]
    for name in SHOWN:
        if all(name in side for side in told):
            lines.append(_row(name, *(side[name] for side in told)))
    lines += ["", "why a step takes another time", *_step(*paces)]
    lines += ["", "why the run makes other use of its time (points of its share)", *_run(*(shares(side) for side in told))]
    days = [rate(plan) * 86400 for plan in plans]
    return "\n".join([*lines, f"  {'failures expected a day':22}{days[0]:16.3g}{days[1]:16.3g}"])


def _row(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    unit = "1" if one["unit"] in ("count", "h") else one["unit"]
    before, after = one["value"], other["value"]
    change = f"{after / before - 1:+.1%}" if before else "–"
    return f"  {name.split('.')[1].replace('_', ' '):22}{show(before, unit):>16}{show(after, unit):>16}   {change}"


def _step(one: Pace, other: Pace) -> Iterator[str]:
    found = False
    for name, seconds in sorted(parts(one, other).items(), key=lambda item: -abs(item[1])):
        if abs(seconds) > NOTABLE * max(one.step_time, other.step_time):
            found = True
            yield f"  {name:22}{'+' if seconds > 0 else '−'}{show(abs(seconds), 's')}"
    if not found:
        yield "  it does not"


def _run(one: Mapping[str, float], other: Mapping[str, float]) -> Iterator[str]:
    moved = {state: other.get(state, 0.0) - one.get(state, 0.0) for state in dict.fromkeys((*one, *other))}
    for state, points in sorted(moved.items(), key=lambda item: -abs(item[1])):
        if abs(points) > NOTABLE:
            yield f"  {state:22}{points * 100:+.1f}"
