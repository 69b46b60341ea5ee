"""The report: one page on one plan, to show to those who pay for it, with every assumption and where it comes from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from analysis.compare import Row, large, learning, quantities, sentence, show_ratio, signed, states, sums, verdict, when
from analysis.figures import figures
from analysis.page import Html, document, join, table, tag
from analysis.pair import Pair, open_pair
from conf.errors import Refused
from conf.files import write
from conf.node import Node, hints
from conf.plan import groups
from conf.record import QUANTITIES
from conf.units import show, unit_of

OPTIONS = {
    "runs": ("runs", "folder of the records"),
    "plan": ("", "id of the plan; empty = the one measured last"),
    "out": ("", "file to write; empty = report.html beside the plan's records"),
}
_CARDS = {
    "pretrain.step_time": "Step", "pretrain.tokens_per_s": "Throughput", "pretrain.mfu": "Model FLOPs utilisation",
    "pretrain.peak_memory": "Peak memory of a device", "run.wall_clock": "Wall clock", "run.goodput": "Goodput",
    "run.interruptions": "Interruptions", "pretrain.final_loss": "Final loss", "run.gpu_hours": "Device-hours", "run.energy": "Energy",
    "run.carbon_location": "Operational carbon", "run.cost": "Cost",
}  # fmt: skip
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
    return document(f"{pair.plan.model.name} – {pair.id}", *_head(pair), *_pictures(pair), *_comparison(pair), *_assumptions(pair), _foot(pair))


def _head(pair: Pair) -> Iterator[Html]:
    name, _, rest = sentence(pair.plan).partition(", ")
    yield tag("h1", name)
    yield tag("p", rest[:1].upper() + rest[1:], class_="lead")
    yield tag("p", "Plan ", tag("code", pair.id), f" · predicted {when(pair.sim)} · measured {when(pair.real)}", class_="soft")
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
    return tag("div", tag("span", title), tag("b", show(big, row.unit)), tag("span", small), class_="card")


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
    head = ("Quantity", "Predicted", "10–90%", "Measured", "Measured / predicted")
    yield table(head, [_line(row) for row in quantities(pair)])
    found = states(pair)
    if found:
        yield tag("h2", "Time of the ranks by state")
        rows = [(s.name, show(s.predicted, "s"), show(s.measured, "s"), signed(s.difference), f"{s.share:.1%}") for s in found]
        rows += [(name, show(predicted, "s"), show(measured, "s"), "", "") for name, predicted, measured in sums(pair)]
        yield table(("State", "Predicted", "Measured", "Difference", "Share of the run"), rows, sums=2)


def _line(row: Row) -> tuple[str, ...]:
    name = join(tag("code", row.name), tag("small", QUANTITIES[row.name.partition(".")[2]][1]))
    return name, show(row.predicted, row.unit), row.band, show(row.measured, row.unit), show_ratio(row.ratio)


def _what_was_measured(pair: Pair) -> Iterator[str]:
    """Plain words on what rests on evidence and what does not."""
    rows = quantities(pair)
    both = sum(row.measured is not None and row.predicted is not None for row in rows)
    only = [row.name for row in rows if row.measured is None]
    if pair.real is None:
        yield "Nothing on this page was measured: every number is a prediction."
        return
    if not pair.real.finished:
        yield f"The measured run did not reach its end: it is shown as far as its record goes, to step {pair.real.last_step:,}."
    if pair.sim is None:
        yield "Nothing was predicted: every number is a measurement."
        return
    yield f"{both} of {len(rows)} quantities were both predicted and measured."
    if only:
        yield f"Only predicted, not measured: {', '.join(only)}."


def _assumptions(pair: Pair) -> Iterator[Html]:
    plan = pair.plan
    named: dict[str, Node] = {name: getattr(plan, name) for name in groups()}
    yield tag("h2", "What the prediction assumes")
    yield tag("p", f"Prices are of {plan.price.as_of}. Where a number comes from, or that it is a guess, is said by its group:")
    yield table(("Group", "Source"), [(name, str(node.source)) for name, node in named.items() if hasattr(node, "source")], "text")
    if profile := _profile(pair):
        yield tag("h2", "Calibration")
        yield tag("p", "Rates measured on the machine; they replace those of the plan's tables.")
        yield table(("Parameter", "Value", "Standard error", "Source"), profile, "text")
    yield tag("h2", "The plan")
    whole = {name: getattr(plan, name) for name in ("seed", "start", "profile")}
    sections = [_group("run", [_row(type(plan), name, value) for name, value in whole.items()])]
    for name, node in named.items():
        fields = [field for field in hints(type(node)) if field != "source"]
        sections.append(_group(name, [_row(type(node), field, getattr(node, field)) for field in fields]))
    yield tag("div", *sections, class_="groups")


def _group(name: str, rows: list[tuple[str, ...]]) -> Html:
    return tag("section", tag("div", tag("h3", name), table((), rows), class_="group"))


def _row(kind: type[Node], field: str, value: Any) -> tuple[str, str]:
    """A key of the plan with its meaning, and its value."""
    means = str(kind.__dataclass_fields__[field].metadata["means"])
    return join(tag("code", field), tag("small", means)), _shown(value, unit_of(hints(kind)[field]))


def _shown(value: Any, unit: str | None) -> str:
    """A planned value for a person."""
    if value is None:
        return "–"
    if isinstance(value, Node):
        return ", ".join(f"{name} {_shown(getattr(value, name), unit_of(hint))}" for name, hint in hints(type(value)).items())
    if isinstance(value, dict):
        return join(*(tag("div", f"{name}: {_shown(inner, None)}") for name, inner in value.items())) if value else "none"
    if isinstance(value, list):
        flat = [number for row in value for number in row]
        return f"{len(value)} × {len(value[0])} values, {min(flat):g} to {max(flat):g}"
    if unit in _UNITS_FOR_PEOPLE:
        name, size = _UNITS_FOR_PEOPLE[unit]
        return f"{value * size:.4g} {name}"
    if unit and isinstance(value, float):
        return show(value, unit)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _profile(pair: Pair) -> list[tuple[str, ...]]:
    """The calibrated parameters that the record holds a copy of.

    Raises Refused for a file that is not a profile.
    """
    path = next((path for side in pair.sides if (path := side.folder / "profile.yaml").is_file()), None)
    if path is None:
        return []
    try:
        told = yaml.safe_load(path.read_text())["parameters"]
        return [_parameter(name, entry) for name, entry in told.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise Refused(f"{path} is no profile ({' '.join(str(error).split())}); make it anew with foretold analysis calibrate") from error


def _parameter(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    unit, error = str(entry.get("unit", "1")), entry.get("standard_error")
    return name, show(float(entry["value"]), unit), show(None if error is None else float(error), unit), str(entry.get("source", "–"))


def _foot(pair: Pair) -> Html:
    command = f"foretold analysis report plan={pair.id}"
    return tag("footer", tag("p", "Made by ", tag("code", command), f" from the records in {pair.folder}."))
