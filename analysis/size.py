"""How big, how long, how much: the best model that money, time or energy buys on a cluster, or the cheapest one for a loss.

For every size the best mesh is searched, and the run on it foretold in closed form: its speed, failures, price and energy. What the limits
leave of time is what it trains; a scaling law says what comes of it. Compute is an outcome of dollars and days, not an input.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from analysis.asked import base_of, law_of, quantity
from analysis.chinchilla import NAMES, Array
from analysis.served import TRAIN
from analysis.sizing import BATCH, RATE, Limits, Run, best_mesh, candidates, learning_rate
from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from conf.program import flag, to_yaml
from conf.rules import problems
from conf.units import show

OPTIONS = {
    "budget": ("", "most money, as in 2 MUSD"),
    "deadline": ("", "most time, as in 60 d"),
    "energy": ("", "most energy, as in 500 MWh"),
    "target_loss": ("", "loss to reach at least cost, in the law's unit; without it, the least loss within the limits"),
    "law": ("", "JSON file of a fit (analysis scaling json=true); without it the plan's law, or Chinchilla's"),
    "inference_tokens": ("", "tokens of the model in use, as in 1e13 token; what they cost comes out of the budget"),
    "unique_tokens": ("", "tokens that there are, as in 2e11 token; what is trained beyond them is repeated"),
    "out": ("size.yaml", "file of the plan to write"),
    "json": ("false", "print one JSON object instead of a table"),
}
PLAN_WORDS = True  # other words are the plan's: cluster=…, gpu=…, price=…
MONEY = {"USD": 1.0, "kUSD": 1e3, "MUSD": 1e6, "GUSD": 1e9}
DEEPSEEK = {"batch": (0.292, 0.3271), "rate": (0.3118, -0.125)}  # by compute (DeepSeek LLM, arXiv 2401.02954; from memory)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the best run's time, along the frontier
SHOWN, STEPS = 12, 100  # sizes that are printed; steps that are the least of a training
ALIKE = 1e-3  # of the loss: less than a law knows


def size(options: Mapping[str, str], words: Sequence[str]) -> int:
    """Foretell every size, print the best with its neighbours, and write its plan."""
    base, limits = base_of(words), _limits(options)
    law = law_of(options["law"], base)
    _refuse_open(limits, law)
    runs = [run for shape in candidates(base, law, limits) if (run := best_mesh(base, shape, law, limits))]
    if not runs:
        raise Refused(f"no size has a mesh on {base.cluster.name}; take more devices, or devices with more memory")
    rows = [_row(run, law, limits) for run in runs]
    best = min(range(len(rows)), key=lambda i: rows[i]["loss"] if limits.target is None else rows[i]["cost"] + rows[i]["inference_cost"])
    _refuse_nothing(rows[best], runs[best], limits)
    write(Path(options["out"]), to_yaml(_launch(runs[best], rows[best])))
    told = {"cluster": base.cluster.name, "gpu": base.gpu.name, "ranks": base.ranks, "prices": base.price.as_of,
            "law": dict(zip(NAMES, law.tolist(), strict=True)), "candidates": rows, "best": rows[best],
            "alike": _alike(rows, rows[best]), "frontier": _frontier(runs, law, limits, rows[best]), "batch_tokens": _batches(rows[best]),
            "learning_rate": _rates(rows[best]), "plan": options["out"]}  # fmt: skip
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
    flop = TRAIN * best["params"] * best["tokens"]
    return {"step_law": BATCH[0] * best["tokens"] ** BATCH[1], "deepseek": DEEPSEEK["batch"][0] * flop ** DEEPSEEK["batch"][1]}


def _rates(best: dict[str, Any]) -> dict[str, float]:
    flop = TRAIN * best["params"] * best["tokens"]
    step_law = RATE[0] * best["params"] ** RATE[1] * best["tokens"] ** RATE[2]
    return {"step_law": step_law, "deepseek": DEEPSEEK["rate"][0] * flop ** DEEPSEEK["rate"][1]}


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
        lines.append(f"  {show(point['seconds'], 's'):>8} {_short(point['params']):>8}  loss {point['loss']:.4f} {further}")
    rates, batches = told["learning_rate"], told["batch_tokens"]
    if told["alike"][0] < told["alike"][1]:
        lines += ["", f"sizes of {_short(told['alike'][0])} to {_short(told['alike'][1])} are within {ALIKE:.1%} of the least loss: "
                      "the smallest costs least in use"]  # fmt: skip
    lines += ["", f"batch of {best['global_batch']:,} sequences; Step Law says {_short(batches['step_law'])} tokens, "
                  f"DeepSeek's {_short(batches['deepseek'])}",
              f"learning rate {rates['step_law']:.3g} by Step Law, {rates['deepseek']:.3g} by DeepSeek's",
              *([f"use costs {show(best['inference_cost'], 'USD')} at the price of training"] if best["inference_cost"] else []),
              "", f"plan: {told['plan']}", f"next: foretold sim plan={told['plan']}"]  # fmt: skip
    return "\n".join(lines)


def _line(row: dict[str, Any], chosen: bool) -> str:
    mesh = " × ".join(f"{name} {n}" for name, n in row["mesh"].items() if n > 1) or "one device"
    cost = show(row["cost"], "USD") if math.isfinite(row["cost"]) else "not within"
    model = f"{_short(row['params']):>7} {_short(row['tokens']):>9} {row['tokens'] / row['params']:8.4g} {row['loss']:7.4f}"
    speed = f"{row['mfu']:5.1%} {row['ettr']:5.3f} {show(row['seconds'], 's'):>9}"
    price = f"{cost:>13} {show(row['energy'], 'J'):>10} {show(row['carbon'], 'gCO2e'):>10}"
    return f"{'→' if chosen else ' '} {model} {speed} {price}  {mesh}"


def _short(value: float) -> str:
    """
    >>> _short(8.03e9), _short(512), _short(246_000)
    ('8.03 B', '512', '246 k')
    """
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g}"
