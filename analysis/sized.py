"""The sizing page: the plan that was chosen, how sure that is, the law it rests on, the other sizes, and what a lower loss costs."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from analysis import curves
from analysis.curves import short
from analysis.known import Known
from analysis.page import Html, document, tag
from analysis.page import table as listed
from analysis.served import TRAIN
from conf.units import show

MONEY = (("cost", "USD"), ("energy", "J"), ("carbon", "gCO2e"))


def page(told: dict[str, Any], known: Known) -> str:
    """The page as HTML of what `analysis size` tells."""
    best = told["best"]
    title = f"{short(best['params'])} parameters on {short(best['tokens'])} tokens"
    body = [*_head(told, title), *_pictures(told, known), *_frontier(told), *_sizes(told), *_assumptions(told, known)]
    return document(title, *body)


def sure(told: dict[str, Any]) -> list[str]:
    """How sure the answer is, a line for each thing that it rests on."""
    known, lines = told["known"], list[str]()
    far = known["beyond_largest_run"]
    lines.append(f"{far:.3g} times the compute of the law's largest run" if far else "the law's own runs are not known here: no band of it")
    if "loss" in known:
        lines.append("loss of the run, 95% with bootstrap, scatter and choice of form: {:.4g} … {:.4g}".format(*known["loss"]))
    if "params" in known:
        lines.append("best size, 95% over the bootstrap: {} … {}".format(*map(short, known["params"])))
    for name, ends in known["step"].items():
        shown = [("endless" if end is None else f"{end:.4g}" if name == "loss" else show(end, "USD")) for end in ends]
        lines.append(f"{name} where steps are as fast or slow as they may be, 80%: {' … '.join(shown)}")
    best = told["best"]
    if best["total_params"] > best["params"]:
        whole = f"counted whole, {short(best['total_params'])}, the law says a loss of {best['loss_of_total']:.4f}"
        lines.append(f"the {short(best['params'])} parameters that a token visits are the law's N, which is cautious; {whole}")
    return lines + ([instead(told["existing"])] if told["existing"] else [])


def instead(base: dict[str, Any]) -> str:
    """A base that exists against training anew, in a line."""
    each = ", ".join(show(base["finetune"][name], unit) for name, unit in MONEY)
    more, total = base["more_tokens"], [base[name] for name, _ in MONEY]
    if more is None or not np.isfinite(more):
        on = "no further training brings it to this plan's loss"
    elif not more:
        on = "it is there already"
    else:
        on = f"{short(more)} more fresh tokens to this plan's: " + ", ".join(
            show(a, unit) for a, (_, unit) in zip(total, MONEY, strict=True)
        )
    return (
        f"instead {base['model']} on {short(base['tokens'])} tokens: loss {base['loss']:.4f}, {on}; a billion tokens of fine-tuning: {each}"
    )


def _head(told: dict[str, Any], title: str) -> Iterator[Html]:
    best = told["best"]
    mesh = " × ".join(f"{name} {n}" for name, n in best["mesh"].items() if n > 1) or "one device"
    yield tag("h1", title)
    yield tag("p", f"{told['ranks']:,} × {told['gpu']} ({told['cluster']}), mesh {mesh}", class_="lead")
    yield tag("p", "Nothing on this page was measured on this cluster: it is what the law and the simulator foretell.", class_="note")
    cards = [("Loss", f"{best['loss']:.4f}"), ("Time", show(best["seconds"], "s")), ("Cost", show(best["cost"], "USD")),
             ("Energy", show(best["energy"], "J")), ("Operational carbon", show(best["carbon"], "gCO2e")), ("MFU", f"{best['mfu']:.1%}"),
             ("ETTR", f"{best['ettr']:.3f}"), ("Device-hours", f"{best['device_hours']:,.0f}")]  # fmt: skip
    yield tag("div", *(_card(name, value) for name, value in cards), class_="cards")
    yield tag("h2", "How sure this is")
    yield tag("ul", *(tag("li", line) for line in sure(told)))


def _card(name: str, value: str) -> Html:
    number, _, unit = value.partition(" ")
    return tag("div", tag("span", name), tag("b", number, tag("i", f" {unit}")), class_="card")


def _pictures(told: dict[str, Any], known: Known) -> Iterator[Html]:
    rows, best = told["candidates"], told["best"]
    able = [row for row in rows if row["loss"] is not None and row["cost"] is not None]
    yield tag("h2", "The law, and the sizes that the limits allow")
    runs = f"The {len(known.ladder)} runs it was fitted to" if known.ladder else "A law whose runs are not at hand"
    shown = [_figure("What the law says beyond its runs", f"{runs}, and the plan.",
                     curves.reach(known, TRAIN * best["params"] * best["tokens"], best["loss"]))]  # fmt: skip
    if len({round(row["loss"], 6) for row in able}) > 1:
        bands = told["known"].get("losses")
        kept = [bands[rows.index(row)] for row in able] if bands else None
        ends = (np.array([low for low, _ in kept]), np.array([high for _, high in kept])) if kept else None
        params, losses = (np.array([row[name] for row in able]) for name in ("params", "loss"))
        svg = curves.sizes(params, losses, ends, able.index(best), told["alike"])
        shown.append(_figure("Loss of each size", "Each trained for as long as money, time and energy last.", svg))
    yield tag("div", *shown, class_="figures")


def _figure(title: str, caption: str, svg: str) -> Html:
    return tag("figure", tag("figcaption", tag("h3", title), tag("p", caption)), Html(svg))


def _frontier(told: dict[str, Any]) -> Iterator[Html]:
    points, best = told["frontier"], told["best"]
    losses = [point["loss"] for point in points]
    yield tag("h2", "What a lower loss costs")
    names = {"cost": "Cost", "seconds": "Time", "energy": "Energy", "carbon": "Operational carbon"}
    yield tag("div", *(_figure(title, "The least loss of any size.", curves.frontier(name, [point[name] for point in points], losses,
                               (best[name], best["loss"]), {"seconds": "s", **dict(MONEY)}[name])) for name, title in names.items()),
              class_="figures")  # fmt: skip
    head = ("Time", "Parameters", "Loss", *(f"{title}, each 1%" for title in ("Cost", "Energy", "Carbon")))
    rows = [(show(point["seconds"], "s"), short(point["params"]), f"{point['loss']:.4f}",
             *(show(point[f"{name}_per_percent"], unit) for name, unit in MONEY)) for point in points]  # fmt: skip
    yield listed(head, rows)


def _sizes(told: dict[str, Any]) -> Iterator[Html]:
    head = ("Parameters", "Tokens", "Loss", "MFU", "Time", "Cost", "Mesh")
    rows = [((tag("b", short(row["params"])) if row == told["best"] else short(row["params"])), short(row["tokens"]),
             "–" if row["loss"] is None else f"{row['loss']:.4f}", f"{row['mfu']:.1%}", show(row["seconds"], "s"),
             "not within" if row["cost"] is None else show(row["cost"], "USD"),
             " × ".join(f"{name} {n}" for name, n in row["mesh"].items() if n > 1) or "one device")
            for row in told["candidates"]]  # fmt: skip
    yield tag("h2", f"All {len(rows)} sizes")
    yield listed(head, rows)


def _assumptions(told: dict[str, Any], known: Known) -> Iterator[Html]:
    yield tag("h2", "What it rests on")
    law = ", ".join(f"{name} {value:.5g}" for name, value in told["law"].items())
    yield tag("p", f"Loss = E + A / N^alpha + B / D^beta with {law}.")
    if known.ladder:
        yield tag(
            "p", "Counted: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.ladder.conventions.items()) + "."
        )
        errors = ", ".join(f"{name} {error:.2%}" for name, error in sorted(known.errors.items(), key=lambda pair: pair[1]))
        yield from [tag("p", f"Mean error on the larger of its runs, foretold from the smaller: {errors}.")] if errors else []
    yield tag("p", f"Prices of {told['prices']}, the grid of {told['grid']}.")
    project = ", ".join(show(told["project"][name], unit) for name, unit in MONEY) if told["project"] else ""
    alone = "This run alone: failed and smaller runs come on top (published: half to four fifths of a project; development=0.5)."
    yield tag("p", f"With the project's other runs: {project}." if project else alone)
    command = tag("code", f"foretold sim plan={told['plan']}")
    yield tag("p", "The plan lies in ", tag("code", told["plan"]), "; ", command, " foretells a life of it.")
