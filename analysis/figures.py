"""Which figures a pair of records allows: a figure without data is left out."""

import csv
from collections.abc import Mapping
from typing import NamedTuple

from analysis import plot
from analysis.compare import STAGES
from analysis.pair import Pair, Side
from conf.hourly import dated
from conf.plan import Plan
from conf.record import QUANTITIES
from conf.units import show

_BEGIN_AND_END = ("start", "end")
_EVENTS_FIRST = ("failure", "detection", "replacement", "restart", "spike", "rollback", "resize", "checkpoint", "evaluate")


class Shown(NamedTuple):
    """A figure with its title and what to see in it."""

    title: str
    caption: str
    svg: str


def figures(pair: Pair) -> list[Shown]:
    makers = (_loss, _step_time, _timeline, _power, _grid, _time, _ages, _money, _carbon)
    return [shown for make in makers if (shown := make(pair))]


def _loss(pair: Pair) -> Shown | None:
    measured = pair.real.series("pretrain", "loss") if pair.real else []
    held_out = pair.real.series("pretrain", "held_out_loss") if pair.real else []
    predicted = pair.sim.series("pretrain", "loss") if pair.sim else []
    final = pair.sim.value("pretrain.final_loss") if pair.sim else None
    if not measured and not predicted:
        return None
    levels = {"bigram": _bigram(pair.real), "predicted final loss": final}
    caption = "Loss on the training text of each step, and on text held out from training."
    return Shown("What the model learns", caption, plot.loss(measured, predicted, held_out, {k: v for k, v in levels.items() if v}))


def _bigram(real: Side | None) -> float | None:
    """The bigram's loss in nats a token: its bits a byte, scaled as the model's two losses are to each other."""
    names = ("bigram_bits_per_byte", "final_loss", "held_out_bits_per_byte")
    bigram, nats, bits = (real.value(f"pretrain.{name}") if real else None for name in names)
    return bigram * nats / bits if bigram and nats and bits else None


def _step_time(pair: Pair) -> Shown | None:
    measured = pair.real.series("pretrain", "step_time") if pair.real else []
    if not measured:
        return None
    predicted = pair.sim.quantities.get("pretrain.step_time") if pair.sim else None
    band = (predicted.low, predicted.high) if predicted and predicted.low is not None and predicted.high is not None else None
    caption = "Wall clock of each optimizer step" + (" beside the predicted one." if predicted else ".")
    return Shown("How long a step takes", caption, plot.step_time(measured, predicted.value if predicted else None, band))


def _named_sides(pair: Pair) -> dict[str, Side]:
    return {name: side for name, side in (("predicted", pair.sim), ("measured", pair.real)) if side}


def _time(pair: Pair) -> Shown | None:
    rows = {name: side.states for name, side in _named_sides(pair).items() if side.states}
    if not rows:
        return None
    caption = f"Rank-time by state; a bar is as long as {pair.plan.ranks:,} ranks × wall clock."
    return Shown("Where the time goes", caption, plot.shares(rows, "time-by-state", "s"))


def _timeline(pair: Pair) -> Shown | None:
    spans: dict[str, dict[str, tuple[float, float]]] = {}
    marks: dict[str, dict[str, list[float]]] = {}
    for name, side in _named_sides(pair).items():
        for stage, span in _stages(side).items():
            spans.setdefault(stage, {})[name] = span
        for event in side.events:
            if event["event"] not in _BEGIN_AND_END:
                marks.setdefault(str(event["event"]), {}).setdefault(name, []).append(float(event["at"]))
    if not spans:
        return None
    spans = {stage: spans[stage] for stage in STAGES if stage in spans}
    marks = dict(sorted(marks.items(), key=lambda item: (_rank(item[0]), item[0])))
    counted = "; ".join(f"{kind}: " + ", ".join(f"{len(at):,} {side}" for side, at in marks[kind].items()) for kind in marks)
    return Shown("What happens when", f"Stages and events of the run. {counted}", plot.timeline(spans, marks))


def _rank(kind: str) -> int:
    return _EVENTS_FIRST.index(kind) if kind in _EVENTS_FIRST else len(_EVENTS_FIRST)


def _stages(side: Side) -> dict[str, tuple[float, float]]:
    """From the first to the last that was said in each stage."""
    times: dict[str, list[float]] = {}
    for row in (*side.events, *side.ledger):
        times.setdefault(str(row["stage"]), []).append(float(row["at"]))
    return {stage: (min(at), max(at)) for stage, at in times.items() if stage in STAGES and stage != "run"}


def _power(pair: Pair) -> Shown | None:
    predicted, measured = (_over_time(side, "power") if side else [] for side in (pair.sim, pair.real))
    if not predicted and not measured:
        return None
    who = "Predicted and measured" if predicted and measured else "Predicted" if predicted else "Measured"
    return Shown("How much power it draws", f"{who} power at the building's meter.", plot.power(predicted, measured))


def _grid(pair: Pair) -> Shown | None:
    path = pair.sim.folder / "power.csv" if pair.sim else None
    if path is None or not path.is_file():
        return None
    rows = list(csv.DictReader(path.read_text().splitlines()))
    points = [(float(row["at"]), float(row["intensity"])) for row in rows]
    if len({grams for _, grams in points}) < 2:
        return None
    energies = [float(row["power"]) * (after - at) for row, (at, _), (after, _) in zip(rows, points, points[1:], strict=False)]
    mean = sum(energy * grams for energy, (_, grams) in zip(energies, points, strict=False)) / sum(energies)
    caption = f"Hourly intensity of the grid, {dated(pair.plan)['grid']}; a joule of this run emits as much as {mean:.3g} gCO2e/kWh."
    return Shown("How dirty the grid is", caption, plot.intensity(points, mean))


def _ages(pair: Pair) -> Shown | None:
    names = [name for name in QUANTITIES if name.startswith("stale_")]
    found = {who: {name.removeprefix("stale_"): share for name in names if (share := side.value(f"align.{name}")) is not None}
             for who, side in _named_sides(pair).items()}  # fmt: skip
    if not any(found.values()):
        return None
    caption = "Shares of samples by the updates of the weights between their start and their training."
    return Shown("How old samples are", caption, plot.ages({who: shares for who, shares in found.items() if shares}))


def _over_time(side: Side, quantity: str) -> list[tuple[float, float]]:
    return sorted((float(row["at"]), float(row["value"])) for row in side.ledger if row["quantity"] == quantity)


def _carbon(pair: Pair) -> Shown | None:
    names = {"location": "hourly grid mix", "market": "after contracts", "embodied": "making the devices"}
    told = {name: pair.sim.value(f"run.carbon_{kind}") if pair.sim else None for kind, name in names.items()}
    rows = {name: (grams, plot.OTHER if "devices" in name else plot.PREDICTED) for name, grams in told.items() if grams is not None}
    if pair.sim is None or not rows:
        return None
    energy, water = pair.sim.value("run.energy"), pair.sim.value("run.water")
    caption = f"Predicted from {show(energy, 'J')} of energy on the grid “{pair.plan.grid.name}”, with {show(water, 'L')} of water. "
    return Shown("What it emits", caption + "The first two count the same energy in two ways.", plot.bars(rows, "carbon", "gCO2e"))


def _money(pair: Pair) -> Shown | None:
    rows = {name: spent for name, side in _named_sides(pair).items() if (spent := _spent(side, pair.plan))}
    if not rows:
        return None
    cost = next(side.quantities["run.cost"] for side in pair.sides if "run.cost" in side.quantities)
    low, high = show(cost.low, "USD"), show(cost.high, "USD")
    prices = f", between {low} and {high} at other prices" if cost.low is not None else ""
    caption = f"{show(cost.value, 'USD')} at the prices of {pair.plan.price.as_of}{prices}; divided by rank-time."
    return Shown("Where the money goes", caption, plot.shares(rows, "money-by-state", "USD"))


def _spent(side: Side, plan: Plan) -> Mapping[str, float]:
    """The cost of the run divided by the time of its ranks and of the spares beside them."""
    cost, wall, states = side.value("run.cost"), side.value("run.wall_clock"), side.states
    if not cost or not wall or not states:
        return {}
    held = states | {"spares": plan.cluster.spares * plan.cluster.gpus_per_node * wall}
    return {name: cost * seconds / sum(held.values()) for name, seconds in held.items()}
