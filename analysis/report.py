"""The report: one page on one plan, to show to those who pay for it, with every assumption and where it comes from."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from analysis.compare import Row, learning, quantities, sentence, show_ratio, signed, states, stragglers, sums, unaccounted, verdict, when
from analysis.figures import figures
from analysis.funnel import funnel
from analysis.page import Html, document, join, key, table, tag
from analysis.pair import Pair, open_pair
from conf.files import write
from conf.hourly import dated
from conf.node import Node
from conf.plan import Plan
from conf.profile import read_profile
from conf.record import QUANTITIES
from conf.rules import get
from conf.schema import groups, keys
from conf.units import show, unit_of

OPTIONS = {
    "runs": ("runs", "folder of the records"),
    "plan": ("", "id of the plan; empty = the one measured last"),
    "out": ("", "file to write; empty = report.html beside the plan's records"),
}
_CARDS = {
    "pretrain.step_time": "Step", "pretrain.tokens_per_s": "Throughput", "pretrain.mfu": "Model FLOPs utilisation",
    "pretrain.peak_memory": "Peak memory of a device", "run.wall_clock": "Wall clock", "run.goodput": "Goodput",
    "run.interruptions": "Interruptions", "pretrain.final_loss": "Final loss", "finetune.step_time": "Step of fine-tuning",
    "align.step_time": "Step of alignment", "align.tokens_per_s": "Throughput of alignment", "align.held_out_reward": "Held-out reward",
    "align.held_out_accuracy": "Held-out preference accuracy", "run.gpu_hours": "Device-hours", "run.energy": "Energy",
    "run.carbon_location": "Operational carbon", "run.cost": "Cost",
}  # fmt: skip
_SHORT = 22  # characters of a value that stay on one line
_UNITS_FOR_PEOPLE = {"gCO2e/J": ("gCO2e/kWh", 3.6e6), "L/J": ("L/kWh", 3.6e6), "1/s": ("a year", 365.25 * 86400)}


def report(options: Mapping[str, str]) -> int:
    """Write the page and say where it is; exit status 0."""
    pair = open_pair(options["runs"], options["plan"])
    out = Path(options["out"] or pair.folder / "report.html")
    write(out, page(pair))
    print(out)
    return 0


def page(pair: Pair) -> str:
    """The whole report as HTML; the same records give the same bytes."""
    body = [*_head(pair), *_pictures(pair), *_comparison(pair), *_data(pair), *_assumptions(pair), *_plan(pair.plan), _foot(pair)]
    return document(f"{pair.plan.model.name} – {pair.id}", *body)


def _head(pair: Pair) -> Iterator[Html]:
    name, _, rest = sentence(pair.plan).partition(", ")
    yield tag("h1", name)
    yield tag("p", rest[:1].upper() + rest[1:], class_="lead")
    dates = [f" · {how} {when(side)}" for how, side in (("predicted", pair.sim), ("measured", pair.real)) if side]
    yield tag("p", "Plan ", tag("code", pair.id), *dates, class_="soft")
    yield tag("p", verdict(pair), class_="note")
    if learned := learning(pair):
        yield tag("p", learned, class_="note")
    rows = {row.name: row for row in quantities(pair)}
    yield tag("div", *(_card(title, rows[name]) for name, title in _CARDS.items() if name in rows), class_="cards")


def _card(title: str, row: Row) -> Html:
    if row.measured is None:
        big, small = row.predicted, "predicted only"
    elif row.predicted is None:
        big, small = row.measured, "measured, not predicted"
    else:
        big, small = row.measured, f"measured; {show(row.predicted, row.unit)} predicted"
    number, _, unit = show(big, row.unit).partition(" ")
    return tag("div", tag("span", title), tag("b", number, tag("i", f" {unit}")), tag("span", small), class_="card")


def _pictures(pair: Pair) -> Iterator[Html]:
    shown = [
        tag("figure", tag("figcaption", tag("h3", figure.title), tag("p", figure.caption)), Html(figure.svg)) for figure in figures(pair)
    ]
    if shown:
        yield tag("h2", "The run in pictures")
        yield tag("div", *shown, class_="figures")


def _comparison(pair: Pair) -> Iterator[Html]:
    yield tag("h2", "Predicted and measured")
    yield from (tag("p", line) for line in _what_was_measured(pair))
    head = ("Quantity", "Predicted", "10–90%", "Measured", "Ratio")
    yield table(head, [_line(row) for row in quantities(pair)])
    found = states(pair)
    if found:
        yield tag("h2", "Time of the ranks by state")
        rows = [(s.name, show(s.predicted, "s"), show(s.measured, "s"), signed(s.difference), f"{s.share:.1%}") for s in found]
        rows += [(name, show(predicted, "s"), show(measured, "s"), "", "") for name, predicted, measured in sums(pair)]
        yield table(("State", "Predicted", "Measured", "Difference", "Share of the run"), rows, sums=2)
        yield from (tag("p", said, class_="soft") for said in (*stragglers(pair), *unaccounted(pair)))


def _line(row: Row) -> tuple[str, ...]:
    name = join(key(row.name), tag("small", QUANTITIES[row.name.partition(".")[2]][1]))
    return name, show(row.predicted, row.unit), row.band, show(row.measured, row.unit), show_ratio(row.ratio)


def _what_was_measured(pair: Pair) -> Iterator[str]:
    """Plain words on what rests on evidence and what does not."""
    rows = quantities(pair)
    both = sum(row.measured is not None and row.predicted is not None for row in rows)
    if pair.real is None:
        yield "Nothing on this page was measured: every number is a prediction."
        return
    if not pair.real.finished:
        yield f"The measured run did not reach its end: it is shown as far as its record goes, to step {pair.real.last_step:,}."
    if pair.sim is None:
        yield "Nothing was predicted: every number is a measurement."
        return
    yield f"{both} of {len(rows)} quantities were both predicted and measured; the ratio is of the measured to the predicted."
    if only := list(_unmeasured(rows)):
        yield f"Only predicted, not measured: {', '.join(only)}."


def _unmeasured(rows: Sequence[Row]) -> Iterator[str]:
    """Quantities that are only predicted; a stage of which nothing was measured, by its name."""
    for stage, found in groupby(rows, lambda row: row.name.partition(".")[0]):
        missing = [(row.measured is None, row.name) for row in found]
        yield from [f"all of {stage}"] if all(none for none, _ in missing) else [name for none, name in missing if none]


def _data(pair: Pair) -> Iterator[Html]:
    if pair.real:
        yield from funnel(pair.real)


def _assumptions(pair: Pair) -> Iterator[Html]:
    sources = {name: getattr(getattr(pair.plan, name), "source", None) for name in groups()}
    yield tag("h2", "What the plan assumes")
    yield tag(
        "p",
        f"Prices are of {pair.plan.price.as_of}, the grid's intensity of {dated(pair.plan)['grid']}. Each group of the plan says where its "
        "numbers come from, or that they are guesses:",
    )
    yield table(("Group", "Source"), [(name, source) for name, source in sources.items() if source], "text")
    yield from _calibration(pair)


def _plan(plan: Plan) -> Iterator[Html]:
    """Every key of the plan with its value and meaning, group by group."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for path, (annotation, means, _) in keys().items():
        group, _, field = path.rpartition(".")
        if field != "source":
            rows.setdefault(group or "run", []).extend(_planned(field, means, get(plan, path), unit_of(annotation)))
    yield tag("h2", "The plan")
    yield tag("div", *(tag("section", tag("h3", name), table((), told, "plan")) for name, told in rows.items()), class_="groups")


def _planned(field: str, means: str, value: Any, unit: str | None) -> list[tuple[str, ...]]:
    """A row for a value, or one for each entry of a table of values."""
    if isinstance(value, dict) and value:
        return [row for name, inner in value.items() for row in _planned(f"{field}.{name}", means, inner, None)]
    text = _shown(value, unit)
    return [(join(key(field), tag("small", means)), tag("span", text, class_="short") if len(text) < _SHORT else text)]


def _shown(value: Any, unit: str | None) -> str:
    """A planned value for a person."""
    if unit in _UNITS_FOR_PEOPLE and value is not None:
        name, size = _UNITS_FOR_PEOPLE[unit]
        return f"{value * size:.4g} {name}"
    if isinstance(value, float):
        return show(value, unit) if unit else f"{value:g}"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    if value in (None, {}, []):
        return "–"
    return _several(value) if isinstance(value, Node | list) else str(value)


def _several(value: Any) -> str:
    if isinstance(value, Node):
        told = {name: (getattr(value, name), unit_of(kind)) for name, (kind, _, _) in keys(type(value)).items()}
        return ", ".join(
            name if inner is True else f"{name} {_shown(inner, unit)}" for name, (inner, unit) in told.items() if inner is not False
        )
    if isinstance(value[0], str):
        return ", ".join(value)
    numbers = [number for row in value for number in row]
    return f"{len(value)} × {len(value[0])} values, {min(numbers):g} to {max(numbers):g}"


def _calibration(pair: Pair) -> Iterator[Html]:
    """The measured rates that the plan names, from the copy in its record."""
    path = next((path for side in pair.sides if (path := side.folder / "profile.yaml").is_file()), None)
    if path is None:
        if pair.plan.profile:
            yield tag("p", f"The plan takes its rates from {pair.plan.profile}, of which its record holds no copy.")
        return
    profile = read_profile(path)
    told = (
        f"Rates of {profile.name} ({profile.machine}), fitted on {profile.created} to measured operations; they replace the plan's tables."
    )
    rows = [(name, show(p.value, p.unit), f"± {show(p.standard_error, p.unit)}") for name, p in profile.parameters.items()]
    yield tag("h2", "Calibration")
    yield tag("p", told)
    yield table(("Parameter", "Value", "Standard error"), rows)


def _foot(pair: Pair) -> Html:
    command = f"foretold analysis report plan={pair.id}"
    return tag("footer", tag("p", "Made by ", tag("code", command), f" from the records in {pair.folder}."))
