"""How big, how long, how much: the best model that money, time or energy buys on a cluster, or the cheapest one for a loss.

For every size the best mesh is searched, and the run on it foretold in closed form: its speed, failures, price and energy. What the limits
leave of time is what it trains; a scaling law says what comes of it. Compute is an outcome of dollars and days, not an input.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from analysis.asked import base_of, law_of, quantity, share_of
from analysis.chinchilla import NAMES, Array
from analysis.curves import short
from analysis.known import Known
from analysis.law import predicted
from analysis.served import TRAIN
from analysis.shapes import Shape
from analysis.sized import page, sure
from analysis.sizing import BATCH, RATE, Limits, Run, best_mesh, candidates, effective, learning_rate, tokens_for
from conf.arithmetic import active_parameters
from conf.errors import Refused
from conf.files import write
from conf.hourly import dated
from conf.plan import Plan
from conf.program import flag, load, to_yaml
from conf.rules import problems
from conf.units import show

OPTIONS = {
    "budget": ("", "most money, as in 2 MUSD"),
    "deadline": ("", "most time, as in 60 d"),
    "energy": ("", "most energy, as in 500 MWh"),
    "target_loss": ("", "loss to reach at least cost, in the law's unit; without it, the least loss within the limits"),
    "law": ("", "runs to fit (a CSV file, a folder of real's runs), or JSON of a fit; without it the plan's law, or Chinchilla's"),
    "inference_tokens": ("", "tokens of the model in use, as in 1e13 token; what they cost comes out of the budget"),
    "unique_tokens": ("", "tokens that there are, as in 2e11 token; what is trained beyond them is repeated"),
    "development": ("0", "share of the project that is not this run (failed and smaller ones; published: 0.5 to 0.8), as in 0.5 or 50%"),
    "existing": ("", "a model of conf/model that exists, as in llama3_8b: what it costs to train it on, or to fine-tune it, instead"),
    "existing_tokens": ("", "tokens that it was trained on, as in 15e12 token"),
    "out": ("size.yaml", "file of the plan to write; a page for a browser lies beside it, as in size.html"),
    "json": ("false", "print one JSON object instead of a table"),
}
PLAN_WORDS = True  # other words are the plan's: cluster=…, gpu=…, price=…
MONEY = {"USD": 1.0, "kUSD": 1e3, "MUSD": 1e6, "GUSD": 1e9}
DEEPSEEK = {"batch": (0.292, 0.3271), "rate": (0.3118, -0.125)}  # by compute (DeepSeek LLM, arXiv 2401.02954; from memory)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the best run's time, along the frontier
OLMO = {"batch": (327_680, 108e6, 2 / 3), "rate": (0.0047, 108e6, -1 / 3)}  # by params (OLMo-core's model ladder, arXiv 2412.04403)
EIGHTY = 1.2816  # standard deviations on either side that hold 80% of a normal distribution
SHOWN, STEPS = 12, 100  # sizes that are printed; steps that are the least of a training
ALIKE = 1e-3  # of the loss: less than a law knows


def size(options: Mapping[str, str], words: Sequence[str]) -> int:
    """Foretell every size, print the best with its neighbours, and write its plan."""
    _refuse_options(options)
    base, limits = base_of(words), _limits(options)
    known, development = law_of(options["law"], base), share_of(options, "development", none=True)
    law = known.law
    _refuse_open(limits, law)
    runs = [run for shape in candidates(base, law, limits) if (run := best_mesh(base, shape, law, limits))]
    if not runs:
        raise Refused(f"no size has a mesh on {base.cluster.name}; take more devices, or devices with more memory")
    rows = [_row(run, law, limits) for run in runs]
    best = min(range(len(rows)), key=lambda i: rows[i]["loss"] if limits.target is None else rows[i]["cost"] + rows[i]["inference_cost"])
    _refuse_nothing(rows[best], runs[best], limits)
    out, chosen = options["out"], rows[best]
    beside = str(Path(out).with_suffix(".html"))
    told = {"cluster": base.cluster.name, "gpu": base.gpu.name, "ranks": base.ranks, "prices": base.price.as_of,
            "grid": dated(base)["grid"],
            "law": dict(zip(NAMES, law.tolist(), strict=True)), "candidates": rows, "best": chosen,
            "known": _known(known, rows, runs[best], limits, best), "alike": _alike(rows, chosen),
            "frontier": _frontier(runs, law, limits, chosen), "batch_tokens": _batches(chosen), "learning_rate": _rates(chosen),
            "project": {name: chosen[name] / (1 - development) for name in ("cost", "energy", "carbon")} if development else {},
            "existing": _existing(options, base, law, limits, chosen) if options["existing"] else {},
            "plan": out, "page": beside}  # fmt: skip
    plan = to_yaml(_launch(runs[best], chosen))
    write(Path(beside), page(_finite(told), known))
    write(Path(out), plan)
    print(json.dumps(_finite(told)) if flag(options, "json") else table(told))
    return 0


# -- what is asked


def _limits(options: Mapping[str, str]) -> Limits:
    seconds, joules = quantity(options, "deadline", "s", math.inf), quantity(options, "energy", "J", math.inf)
    use, unique = quantity(options, "inference_tokens", "token", 0.0), quantity(options, "unique_tokens", "token", math.inf)
    return Limits(_money(options["budget"]), seconds, joules, use, unique, _target(options["target_loss"]))


def _money(text: str) -> float:
    if not text:
        return math.inf
    number, _, unit = text.strip().partition(" ")
    try:
        value = float(number) * MONEY[unit.strip()]
    except (ValueError, KeyError) as error:
        raise Refused(f"budget={text} is no amount of money; write for example budget='2 MUSD' or budget='500 kUSD'") from error
    if not value > 0:
        raise Refused(f"budget={text} must be more than 0")
    return value


def _target(text: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError as error:
        raise Refused(f"target_loss={text} is no number; write for example target_loss=2.0") from error
    if value is not None and not math.isfinite(value):
        raise Refused(f"target_loss={text} is no number; write for example target_loss=2.0")
    return value


def _refuse_options(options: Mapping[str, str]) -> None:
    if Path(options["out"]).suffix not in (".yaml", ".yml"):
        raise Refused(f"out={options['out']} is no name of a plan; it ends in .yaml, and the page beside it in .html")
    if options["existing_tokens"] and not options["existing"]:
        raise Refused("existing_tokens= is said of no model; name it, as in existing=llama3_8b")


def _refuse_open(limits: Limits, law: Array) -> None:
    if limits.target is None and not math.isfinite(min(limits.dollars, limits.seconds, limits.joules)):
        raise Refused("nothing limits the run; say budget='2 MUSD', deadline='60 d', energy='500 MWh' or target_loss=2.0")
    if limits.target is not None and limits.target <= law[0]:
        raise Refused(f"target_loss={limits.target:.4g} is at or below the law's irreducible loss {law[0]:.4g}: no size reaches it")


def _refuse_nothing(row: dict[str, Any], run: Run, limits: Limits) -> None:
    """A budget that buys nothing, or a loss that no size reaches within the limits: says what would."""
    if not math.isfinite(row["cost"]):
        raise Refused(f"no size reaches a loss of {limits.target:.4g} within the limits on {run.plan.cluster.name}; give more of them")
    if row["tokens"] < STEPS * run.plan.tokens_per_step:
        need = STEPS * run.plan.tokens_per_step / run.tokens_per_s
        least = f"{show(need, 's')} and {show(need * run.dollars_per_s + row['inference_cost'], 'USD')}"
        left = show(max(0.0, row["seconds"]), "s")
        raise Refused(f"the limits leave {left} of training on {run.plan.cluster.name}, not {STEPS} steps, which take {least}")


# -- what is told


def _row(run: Run, law: Array, limits: Limits) -> dict[str, Any]:
    """What a size comes to; where a loss is asked for that it does not reach within the limits, its cost is endless."""
    if limits.target is None:
        return run.told(law, limits, run.seconds(limits))
    seconds = run.needed(law, limits)
    row = run.told(law, limits, seconds if math.isfinite(seconds) else 0.0)
    return row | ({} if seconds <= run.seconds(limits) else {"cost": math.inf})


def _finite(told: Any) -> Any:
    """The same with null for what has no end, which JSON cannot hold."""
    if isinstance(told, dict):
        return {name: _finite(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return [_finite(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told


def _alike(rows: Sequence[dict[str, Any]], best: dict[str, Any]) -> tuple[float, float]:
    """The smallest and the largest size whose loss is that of the best within ALIKE; with a loss to reach, the best alone."""
    near = [row["params"] for row in rows if row["loss"] <= best["loss"] * (1 + ALIKE) and row["cost"] <= best["cost"] * (1 + ALIKE)]
    return min(near), max(near)


def _known(known: Known, rows: Sequence[dict[str, Any]], run: Run, limits: Limits, best: int) -> dict[str, Any]:
    """How sure the answer is: 95% bands over laws, what the step model's error does (80%), how far beyond the law's runs it lies."""
    sizes, tokens = (np.array([row[name] for row in rows]) for name in ("params", "tokens"))
    worth = np.array([effective(max(many, 1.0), limits.unique) for many in tokens])
    told: dict[str, Any] = {"beyond_largest_run": TRAIN * sizes[best] * tokens[best] / known.reach if known.reach else None}
    if bands := known.loss(sizes, worth):
        told |= {"loss": [float(end[best]) for end in bands], "losses": [list(map(float, ends)) for ends in zip(*bands, strict=True)]}
    if limits.target is None and (ends := known.best(sizes, worth)):
        told["params"] = list(ends)
    sides = [_row(run.slowed(math.exp(side * EIGHTY * run.error)), known.law, limits) for side in (-1, 1)]
    name = "loss" if limits.target is None else "cost"
    return told | {"step": {name: [side[name] for side in sides]}}


def _existing(options: Mapping[str, str], base: Plan, law: Array, limits: Limits, best: dict[str, Any]) -> dict[str, Any]:
    """A base that exists instead of training anew: its loss by the law, what it takes to the chosen plan's loss on fresh tokens of the same
    kind, and what each billion tokens of fine-tuning costs."""
    tokens = quantity(options, "existing_tokens", "token", 0.0)
    if not tokens:
        raise Refused(f"existing={options['existing']} needs existing_tokens=, the tokens it was trained on, as in '15e12 token'")
    model = load([f"model={options['existing']}"], rules=lambda _: []).model
    shape = Shape(float(active_parameters(model)), model)
    run = best_mesh(base, shape, law, limits)
    if run is None:
        raise Refused(f"existing={options['existing']} has no mesh on {base.cluster.name}; take more devices")
    more = max(0.0, tokens_for(law, shape.params, replace(limits, target=best["loss"])) - tokens)
    rate = {"cost": run.dollars_per_s, "energy": run.watts, "carbon": run.carbon_per_s}
    return {"model": model.name, "tokens": tokens, "loss": float(predicted(law, shape.params, effective(tokens, limits.unique))),
            "more_tokens": more, **{name: value * more / run.tokens_per_s for name, value in rate.items()},
            "finetune": {name: value * 1e9 / run.tokens_per_s for name, value in rate.items()}}  # fmt: skip


def _frontier(runs: Sequence[Run], law: Array, limits: Limits, best: dict[str, Any]) -> list[dict[str, float]]:
    """The least loss for parts and multiples of the time, and what each further 1% of loss costs on the way there."""
    points = [min((run.told(law, limits, best["seconds"] * factor) for run in runs), key=lambda row: row["loss"]) for factor in FACTORS]
    told = []
    for before, after in pairwise(points):
        percent = 100 * math.log(before["loss"] / after["loss"])
        further = {f"{name}_per_percent": (after[name] - before[name]) / percent for name in ("cost", "energy", "carbon")}
        told.append({name: after[name] for name in ("seconds", "params", "loss", "cost", "energy", "carbon")} | further)
    return told


def _batches(best: dict[str, Any]) -> dict[str, float]:
    """Tokens of a batch by three laws, each measured on others' recipes."""
    flop, (level, at, power) = TRAIN * best["params"] * best["tokens"], OLMO["batch"]
    return {"step_law": BATCH[0] * best["tokens"] ** BATCH[1], "deepseek": DEEPSEEK["batch"][0] * flop ** DEEPSEEK["batch"][1],
            "olmo": level * (best["params"] / at) ** power}  # fmt: skip


def _rates(best: dict[str, Any]) -> dict[str, float]:
    flop, (level, at, power) = TRAIN * best["params"] * best["tokens"], OLMO["rate"]
    step_law = RATE[0] * best["params"] ** RATE[1] * best["tokens"] ** RATE[2]
    return {"step_law": step_law, "deepseek": DEEPSEEK["rate"][0] * flop ** DEEPSEEK["rate"][1],
            "olmo": level * (best["params"] / at) ** power}  # fmt: skip


def _launch(run: Run, row: dict[str, Any]) -> Plan:
    """The chosen plan as sim and real take it."""
    steps = int(row["tokens"] / run.plan.tokens_per_step)
    changes = {
        "train.steps": steps,
        "train.learning_rate": learning_rate(run.plan, row["params"], row["tokens"]),
        "train.warmup": max(1, min(2000, steps // 50)),
    }
    plan = run.plan.but(**changes, **({"data.tokens": int(row["tokens"]) + 1} if run.plan.data.path is None else {}))
    if wrong := problems(plan):
        raise Refused(*wrong)
    return plan


def table(told: dict[str, Any]) -> str:
    best, rows = told["best"], told["candidates"]
    first = max(0, min(rows.index(best) - SHOWN // 2, len(rows) - SHOWN))
    devices = f"{told['ranks']:,} × {told['gpu']} ({told['cluster']})"
    lines = [f"{len(rows)} sizes, each on its best mesh of {devices}, prices of {told['prices']}", ""]
    lines.append("    params    tokens  a param    loss   MFU  ETTR      time          cost     energy     carbon  mesh")
    lines += [_line(row, row is best) for row in rows[first : first + SHOWN]]
    lines += ["", "the least loss for more time, and what each further 1% of it costs"]
    for point in told["frontier"]:
        money, joules, grams = (point[f"{name}_per_percent"] for name in ("cost", "energy", "carbon"))
        further = f"{show(money, 'USD'):>14} {show(joules, 'J'):>10} {show(grams, 'gCO2e'):>11}"
        lines.append(f"  {show(point['seconds'], 's'):>8} {short(point['params']):>8}  loss {point['loss']:.4f} {further}")
    rates, batches = told["learning_rate"], told["batch_tokens"]
    if told["alike"][0] < told["alike"][1]:
        lines += ["", f"sizes of {short(told['alike'][0])} to {short(told['alike'][1])} are within {ALIKE:.1%} of the least loss: "
                      "the smallest costs least in use"]  # fmt: skip
    lines += ["", *sure(told), "", f"batch of {best['global_batch']:,} sequences; {_rivals(batches, short)} tokens",
              f"learning rate {_rivals(rates, '{:.3g}'.format)}",
              *([f"use costs {show(best['inference_cost'], 'USD')} at the price of training"] if best["inference_cost"] else []),
              *([_project(told["project"])] if told["project"] else []),
              "", f"page: {told['page']}", f"plan: {told['plan']}", f"next: foretold sim plan={told['plan']}"]  # fmt: skip
    return "\n".join(lines)


def _rivals(values: dict[str, float], shown: Callable[[float], str]) -> str:
    names = {"step_law": "Step Law", "deepseek": "DeepSeek's law", "olmo": "OLMo's ladder"}
    return ", ".join(f"{shown(value)} by {names[name]}" for name, value in values.items())


def _project(project: dict[str, float]) -> str:
    cost, energy, carbon = (show(project[name], unit) for name, unit in (("cost", "USD"), ("energy", "J"), ("carbon", "gCO2e")))
    return f"the project with its other runs: {cost}, {energy}, {carbon}"


def _line(row: dict[str, Any], chosen: bool) -> str:
    mesh = " × ".join(f"{name} {n}" for name, n in row["mesh"].items() if n > 1) or "one device"
    cost = show(row["cost"], "USD") if math.isfinite(row["cost"]) else "not within"
    model = f"{short(row['params']):>7} {short(row['tokens']):>9} {row['tokens'] / row['params']:8.4g} {row['loss']:7.4f}"
    speed = f"{row['mfu']:5.1%} {row['ettr']:5.3f} {show(row['seconds'], 's'):>9}"
    price = f"{cost:>13} {show(row['energy'], 'J'):>10} {show(row['carbon'], 'gCO2e'):>10}"
    return f"{'→' if chosen else ' '} {model} {speed} {price}  {mesh}"
