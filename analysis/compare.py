"""Compare: a plan's prediction beside its measurement, quantity by quantity and state by state."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from analysis.pair import Pair, Side, open_pair, unit_of
from conf.arithmetic import parameters
from conf.hourly import dated
from conf.plan import Plan
from conf.program import flag
from conf.record import QUANTITIES, STATES
from conf.units import show

OPTIONS = {
    "runs": ("runs", "folder of the records"),
    "plan": ("", "id of the plan; empty = the one measured last"),
    "json": ("false", "print one JSON object and nothing else"),
}
STAGES = ("run", "crawl", "extract", "dedup", "tokens", "pretrain", "finetune", "align", "kernels", "network")
_TOLERANCE = 0.005  # of the sum of the states
_STEP = "pretrain.step_time"
_STEPS = {_STEP: "A step", "finetune.step_time": "A step of fine-tuning", "align.step_time": "A step of alignment"}


@dataclass(frozen=True)
class Row:
    """One quantity, foretold and seen."""

    name: str
    unit: str
    predicted: float | None
    low: float | None
    high: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted and self.measured is not None else None

    @property
    def band(self) -> str:
        low, high = show(self.low, self.unit), show(self.high, self.unit)
        return "–" if low == high else f"{low} – {high}"


@dataclass(frozen=True)
class State:
    """Rank-seconds in one state, foretold and seen, and its share of the run (the measured one where there is one)."""

    name: str
    predicted: float | None
    measured: float | None
    share: float

    @property
    def difference(self) -> float | None:
        return None if self.predicted is None or self.measured is None else self.measured - self.predicted


def compare(options: Mapping[str, str]) -> int:
    """Print the comparison; exit status 0."""
    only_json, pair = flag(options, "json"), open_pair(options["runs"], options["plan"])
    print(json.dumps(as_json(pair), indent=1) if only_json else as_text(pair))
    return 0


def quantities(pair: Pair) -> list[Row]:
    """Every quantity that either side knows but the states, the run as a whole first, then stage by stage."""
    names = {name for side in pair.sides for name in side.quantities if not name.startswith("state.")}
    rows = []
    for name in sorted(names, key=_place):
        predicted = pair.sim.quantities.get(name) if pair.sim else None
        low, high = (predicted.low, predicted.high) if predicted else (None, None)
        measured = pair.real.value(name) if pair.real else None
        rows.append(Row(name, unit_of(name) or "", predicted.value if predicted else None, low, high, measured))
    return rows


def _place(name: str) -> tuple[int, str, int]:
    stage, _, quantity = name.partition(".")
    return (STAGES.index(stage) if stage in STAGES else len(STAGES)), stage, list(QUANTITIES).index(quantity)


def states(pair: Pair) -> list[State]:
    """Where the time of all ranks went; each column sums to ranks × wall clock."""
    predicted, measured = (side.states if side else {} for side in (pair.sim, pair.real))
    shown = measured or predicted
    whole = sum(shown.values()) or 1.0
    names = [name for name in STATES if predicted.get(name) or measured.get(name)]
    return [State(name, _known(predicted, name), _known(measured, name), shown.get(name, 0.0) / whole) for name in names]


def _known(spent: Mapping[str, float], name: str) -> float | None:
    """Nothing is known where no state was written; otherwise an absent state took no time."""
    return spent.get(name, 0.0) if spent else None


def rank_seconds(pair: Pair, side: Side | None) -> float | None:
    """Ranks × wall clock, which the states must add up to."""
    wall = side.wall_clock if side else None
    return None if wall is None else pair.plan.ranks * wall


def unaccounted(pair: Pair) -> list[str]:
    """What must be said of a side whose states do not add up to its clock; a run of stages with records of their own has none."""
    said = []
    for how, side in (("predicted", pair.sim), ("measured", pair.real)):
        whole, states_sum = rank_seconds(pair, side), sum(side.states.values()) if side else 0.0
        if whole and states_sum and abs(missing := 1 - states_sum / whole) > _TOLERANCE:
            said.append(f"{abs(missing):.1%} of the {how} time is {'in no state' if missing > 0 else 'counted twice'}.")
    return said


def stragglers(pair: Pair) -> list[str]:
    """What keeping each slow rank costs to the end of the plan: a share of every step, in time and at the plan's price."""
    side, steps = pair.real, pair.plan.train.steps
    events = [e for e in side.events if e["event"] == "straggler"] if side else []
    said = []
    for event in events:
        told, at = json.loads(event["detail"]), int(event["step"])
        who = f"Rank {told['culprit']} was slow by step {at}, {told['factor']:.1f} times the work of the others"
        text = f"{who}: steps {told['cost']:.0%} longer"
        step = next((s for s in (pair.sim and pair.sim.value(_STEP), side and side.value(_STEP)) if s), None)
        if steps and step and told["cost"] > 0:
            seconds = (steps - at) * step * told["cost"]
            dollars = seconds * pair.plan.ranks / 3600 * pair.plan.price.gpu_hours[pair.plan.gpu.name].mid
            text += f"; kept for the {steps - at:,} that followed it costs {show(seconds, 's')} and {show(dollars, 'USD')}"
        said.append(text + ".")
    return said


def verdict(pair: Pair) -> str:
    """Whether steps took as long as foretold, a sentence for each stage that was measured."""
    rows = {row.name: row for row in quantities(pair) if row.name in _STEPS}
    said = [_took(_STEPS[name], row) for name, row in rows.items() if row.measured is not None]
    if said:
        return " ".join(said)
    foretold = rows[_STEP].predicted if _STEP in rows else None
    if foretold is None:
        return "No step has been measured: run foretold real."
    return f"A step is predicted to take {show(foretold, 's')}; nothing was measured: run foretold real."


def _took(name: str, row: Row) -> str:
    if row.ratio is None:
        return f"{name} took {show(row.measured, 's')}; nothing was predicted: run foretold sim."
    return f"{name} took {show(row.measured, 's')}, where {show(row.predicted, 's')} was predicted: {_how_far(row.ratio)}{_inside(row)}."


def _how_far(ratio: float) -> str:
    if ratio >= 2:
        return f"{ratio:.1f} times as long as predicted"
    error = ratio - 1
    return "as predicted" if abs(error) < 0.005 else f"{abs(error):.1%} {'longer' if error > 0 else 'shorter'} than predicted"


def _inside(row: Row) -> str:
    if row.low is None or row.high is None or row.measured is None or row.band == "–":
        return ""
    return f", {'inside' if row.low <= row.measured <= row.high else 'outside'} the predicted 10–90% band ({row.band})"


def learning(pair: Pair) -> str | None:
    """What the model learnt beside what counting pairs of tokens learns, when it was measured."""
    real = pair.real
    model, bigram = (real.value(f"pretrain.{who}_bits_per_byte") if real else None for who in ("held_out", "bigram"))
    if model is None:
        return None
    said = f"On text that it never saw, the model needs {show(model, 'bit/B')}"
    if not bigram:
        return f"{said}."
    better = f"{abs(1 - model / bigram):.0%} {'less' if model < bigram else 'more'}"
    return f"{said}: {better} than a bigram of the same tokens ({show(bigram, 'bit/B')})."


def sentence(plan: Plan) -> str:
    """The plan in one line."""
    cluster, train = plan.cluster, plan.train
    length = f"{train.steps:,} steps" if train.steps is not None else f"{show(train.stop_after, 's')} of steps"
    where = f"{cluster.ranks:,} × {plan.gpu.name} ({cluster.name})"
    return f"{plan.model.name}, {large(parameters(plan.model))} parameters, on {where}, {length} of {plan.tokens_per_step:,} tokens"


def large(count: float) -> str:
    """A large count as models are spoken of.

    >>> large(2_020_000), large(8.03e9), large(405_853_388_800)
    ('2.0 M', '8.0 B', '406 B')
    """
    size, name = next((s for s in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= s[0]), (1.0, ""))
    return f"{count / size:.1f} {name}" if count < 100 * size else f"{count / size:.0f} {name}"


def when(side: Side | None) -> str:
    if side is None:
        return "–"
    at = datetime.fromtimestamp(side.written, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return at if side.finished else f"{at}, unfinished ({side.last_step:,} steps so far)"


def as_json(pair: Pair) -> dict[str, object]:
    told = {row.name: {**_without_name(row), "ratio": row.ratio} for row in quantities(pair)}
    spent = {state.name: {**_without_name(state), "difference": state.difference} for state in states(pair)}
    return {"plan": pair.id, "unfinished": bool(pair.real and not pair.real.finished), "quantities": told, "states": spent}


def _without_name(row: Row | State) -> dict[str, object]:
    return {key: value for key, value in asdict(row).items() if key != "name"}


def as_text(pair: Pair) -> str:
    """The comparison for a person on a terminal."""
    head = [f"{pair.id}  {sentence(pair.plan)}", f"predicted {when(pair.sim)}   measured {when(pair.real)}"]
    told = [("quantity", "predicted", "10–90%", "measured", "ratio")]
    told += [(r.name, show(r.predicted, r.unit), r.band, show(r.measured, r.unit), show_ratio(r.ratio)) for r in quantities(pair)]
    head += [", ".join(f"{name} {said}" for name, said in dated(pair.plan).items())] if pair.sim else []
    parts = [*head, "", *columns(told), ""]
    if states(pair):
        parts += [*columns(_spent(pair)), ""]
    return "\n".join([*parts, verdict(pair), *filter(None, [learning(pair)]), *stragglers(pair), *unaccounted(pair)])


def _spent(pair: Pair) -> list[tuple[str, ...]]:
    found = states(pair)
    told: list[tuple[str, ...]] = [("state", "predicted rank-s", "measured rank-s", "difference", "share of the run")]
    told += [(s.name, show(s.predicted, "s"), show(s.measured, "s"), signed(s.difference), f"{s.share:.1%}") for s in found]
    told += [(name, show(predicted, "s"), show(measured, "s"), "", "") for name, predicted, measured in sums(pair)]
    return told


def sums(pair: Pair) -> list[tuple[str, float | None, float | None]]:
    """The sum of the states on each side, and what it must equal."""
    found = states(pair)
    added = "sum", total([s.predicted for s in found]), total([s.measured for s in found])
    return [added, (f"{pair.plan.ranks:,} ranks × wall clock", rank_seconds(pair, pair.sim), rank_seconds(pair, pair.real))]


def total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def show_ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}"


def signed(seconds: float | None) -> str:
    return ("+" if seconds and seconds > 0 else "") + show(seconds, "s")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows]
    return [lines[0], "  ".join("─" * width for width in widths), *lines[1:]]
