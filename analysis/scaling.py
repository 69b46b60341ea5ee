"""A scaling law fitted to a user's runs: parameters, the best size for a budget, how sure both are, and how far they reach."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.asked import quantity
from analysis.chinchilla import NAMES, Array
from analysis.contest import band, choose, rivals
from analysis.envelope import envelope
from analysis.forms import FORMS, Fitted, fit_form, ridge
from analysis.isoflop import isoflop
from analysis.ladder import Ladder
from analysis.law import PER_TOKEN, Fit, fit, optimum, refuse_unfit
from conf.errors import Refused, nearest
from conf.program import flag

OPTIONS = {
    "data": ("", "CSV file of runs: params (or N), tokens (or D), loss; flop (or C), weight, group if there are"),
    "approach": (
        "3",
        "3 = the whole law; 2 = the best size of each budget, of runs of equal flop; 1 = the same of training curves",
    ),
    "form": (
        "chinchilla",
        f"{', '.join(FORMS)}; auto = that which foretells the larger of these runs best from the smaller",
    ),
    "drop": ("0", "runs of the highest losses to leave out"),
    "delta": ("1e-3", "distance in ln loss from which Huber's loss grows linearly; 1e-7 = least absolute deviations"),
    "bootstrap": ("4000", "samples of the bootstrap; 0 = none"),
    "by": ("run", "what is drawn: run, group (a column; without one, runs of the same params), or residual (the scatter, dealt anew)"),
    "budget": ("", "budgets to divide best, with commas, as in 5.76e23 FLOP"),
    "json": ("false", "print one JSON object instead of a table"),
}
BAND = (0.025, 0.975)
LINES = 12  # budgets that are printed
SAME = 0.01  # countings of FLOP that differ by less are one
WIDE = 3.0  # a band of N* from end to end beyond which the division is not determined
ALLOCATION = "these runs do not determine how to divide a budget: vary params and tokens against each other over a wider range"


def scaling(options: Mapping[str, str]) -> int:
    """Fit the law and say what follows."""
    if not options["data"]:
        raise Refused("data= names no file; give a CSV file of runs with columns params, tokens, loss")
    ladder = Ladder.read(options["data"])
    drop, count = _whole(options, "drop"), _whole(options, "bootstrap")
    if options["by"] not in ("run", "group", "residual"):
        raise Refused(f"by={options['by']}: it is run, group or residual")
    budgets = [_budget(text.strip()) for text in options["budget"].split(",") if text.strip()]
    if options["approach"] in ("1", "2"):
        print(by_budget(options["approach"], ladder.without_worst(drop), budgets, flag(options, "json")))
        return 0
    if options["approach"] != "3":
        raise Refused(f"approach={options['approach']}: it is 1, 2 or 3")
    if options["form"] != "chinchilla":
        told = other(ladder.without_worst(drop), options["form"], _delta(options["delta"]), budgets) | {"data": options["data"]}
        print(json.dumps(told) if flag(options, "json") else other_table(told))
        return 0
    found = fit(ladder.without_worst(drop), _delta(options["delta"]), count, options["by"])
    told = describe(found, budgets) | {
        "data": options["data"],
        "dropped": drop,
        "sensitivity": sensitivity(ladder, found, budgets),
        "counting": counting(found, budgets),
    }
    print(json.dumps(told) if flag(options, "json") else table(told))
    return 0


def _whole(options: Mapping[str, str], name: str) -> int:
    if not options[name].isdigit():
        raise Refused(f"{name}={options[name]} is no whole number of 0 or more")
    return int(options[name])


def _budget(text: str) -> float:
    return quantity({"budget": text}, "budget", "FLOP", 0.0)


def _delta(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10:
        raise Refused(f"delta={text} is no distance in ln loss; 1e-3 is usual, 1e-7 is least absolute deviations")
    return value


def by_budget(approach: str, ladder: Ladder, budgets: list[float], as_json: bool) -> str:
    """The best sizes of the budgets that were run, and of others by their power law."""
    found = envelope(ladder) if approach == "1" else isoflop(ladder)
    ahead = [{"flop": flop, "params": found.coefficient * flop**found.exponent, "beyond_largest_run": flop / float(ladder.flop.max())}
             for flop in budgets]  # fmt: skip
    if as_json:
        curves = [dict(zip(("flop", "params", "loss"), map(float, row), strict=True)) for row in zip(*found[:3], strict=True)]
        return json.dumps(
            {
                "form": "envelope" if approach == "1" else "isoflop",
                "exponent": found.exponent,
                "coefficient": found.coefficient,
                "curves": curves,
                "optimum": ahead,
            }
        )
    lines = [f"N* = {found.coefficient:.4g} C^{found.exponent:.4f}, through the best sizes of {len(found.flop)} budgets", ""]
    lines += [
        f"  {flop:8.3g} FLOP  {_amount(params):>13}  loss {loss:.4g}"
        for flop, params, loss in list(zip(*found[:3], strict=True))[:: max(1, len(found.flop) // LINES)]
    ]
    rows = (
        f"{row['flop']:.3g} FLOP, {row['beyond_largest_run']:.3g} times the largest run: {_amount(row['params'])} parameters"
        for row in ahead
    )
    return "\n".join([*lines, *rows])


def other(ladder: Ladder, form: str, delta: float, budgets: list[float]) -> dict[str, Any]:
    """Another form, or the one that foretells best: each form's error on larger runs, and what each says of a budget."""
    if form not in (*FORMS, "auto"):
        raise Refused(f"form={form} is no form of the law; {nearest(form, (*FORMS, 'auto'))}")
    refuse_unfit(ladder)
    found, errors = choose(ladder, delta) if form == "auto" else (fit_form(ladder, form, delta), {})
    forms = [found, *(fit_form(ladder, name, delta) for name in errors if name != found.form)]
    return {
        "form": found.form,
        "runs": len(ladder),
        "parameters": dict(zip(FORMS[found.form].names, found.theta.tolist(), strict=True)),
        "centre": {"ln_params": found.means[0], "ln_tokens": found.means[1]},
        "objective": found.objective,
        "backtest_error": errors,
        "ridge": [dict(zip(("R_D", "R_N", "objective"), row, strict=True)) for row in ridge(ladder, delta)] if form == "repeated" else [],
        "optimum": [_row(ladder, one, errors if one is found else {}, flop) for flop in budgets for one in forms],
        "conventions": ladder.conventions,
    }


def _row(ladder: Ladder, one: Fitted, errors: dict[str, float], flop: float) -> dict[str, Any]:
    """What a form says of a budget; where errors are known, with a band of the loss that holds the choice of form."""
    told: dict[str, Any] = {
        "flop": flop,
        "beyond_largest_run": flop / float(ladder.flop.max()),
        "form": one.form,
        "params": None,
        "loss": None,
    }
    if best := one.optimum(flop):
        told |= {"params": best[0], "loss": best[1]}
        if errors:
            at = np.array([best[0]]), np.array([flop / PER_TOKEN / best[0]])
            low, high = band(ladder, one, errors[one.form], rivals(ladder, one, errors), *at)
            told["loss_interval"] = [float(low[0]), float(high[0])]
    return told


def other_table(told: dict[str, Any]) -> str:
    errors, centre = told["backtest_error"], told["centre"]
    lines = [f"{told['form']} form on {told['runs']} runs of {told['data']}",
             f"centred at ln params {centre['ln_params']:.4f}, ln tokens {centre['ln_tokens']:.4f}", ""]  # fmt: skip
    lines += [f"  {name:6} {value:12.6g}" for name, value in told["parameters"].items()] + [""]
    lines += ["mean error of the larger runs, foretold from the smaller"] if errors else []
    lines += [f"  {name:10} {error:7.2%}" for name, error in sorted(errors.items(), key=lambda pair: pair[1])]
    lines += ["tokens that come again: pairs that fit, R_D* and the R_N* best with it"] if told["ridge"] else []
    lines += [f"  {row['R_D']:6.4g} {row['R_N']:10.3g}   objective {row['objective']:.4g}" for row in told["ridge"]]
    for row in told["optimum"]:
        size = f"{_amount(row['params'])} parameters, loss {row['loss']:.4g}" if row["params"] else "no best size within six decades"
        ends = "{:.4g} … {:.4g}".format(*row["loss_interval"]) if "loss_interval" in row else ""
        head = f"{row['flop']:.3g} FLOP, {row['beyond_largest_run']:.3g} times the largest run, {row['form']}"
        lines.append(f"{head}: {size}" + (f", 95% with the choice of form: {ends}" if ends else ""))
    return "\n".join(lines)


def describe(found: Fit, budgets: list[float]) -> dict[str, Any]:
    """All of it, as numbers."""
    ladder, ends = found.ladder, _ends(found.samples)
    ratio = ladder.tokens / ladder.params
    return {
        "form": "chinchilla",
        "runs": len(ladder),
        "parameters": dict(zip(NAMES, found.parameters.tolist(), strict=True)),
        "objective": found.objective,
        "standard_errors": dict(zip(NAMES, found.samples.std(0).tolist(), strict=True)) if len(found.samples) else {},
        "intervals": {name: [float(low), float(high)] for name, low, high in zip(NAMES, *ends, strict=True)} if len(found.samples) else {},
        "optimum": [_best(found, budget) for budget in budgets],
        "range": {"flop": _span(ladder.flop), "params": _span(ladder.params), "tokens_per_param": _span(ratio)},
        "diagnostics": {"starts_at_optimum": found.at_optimum, "condition": found.condition,
                        "mean_abs_error_pct": float(np.mean(np.abs(found.loss(ladder.params, ladder.tokens) / ladder.loss - 1)) * 100)},
        "conventions": ladder.conventions | {"delta": f"{found.delta:g} of ln loss", "optimum": "C = 6 N D"},
    }  # fmt: skip


def _best(found: Fit, budget: float) -> dict[str, Any]:
    best, others = found.optimum(budget)
    told: dict[str, Any] = {"flop": budget, "params": float(best.params), "tokens": float(best.tokens), "loss": float(best.loss),
                            "beyond_largest_run": budget / float(found.ladder.flop.max())}  # fmt: skip
    if len(found.samples):
        bands = {name: [float(end) for end in _ends(values)] for name, values in others._asdict().items()}
        told |= {
            "intervals": bands,
            "determined": bands["params"][1] / bands["params"][0] <= WIDE and bool(np.isfinite(others.params).all()),
        }
    return told


def _ends(samples: Array) -> Array:
    return np.nanquantile(samples, BAND, axis=0) if len(samples) else np.zeros((2, *samples.shape[1:]))


def _span(values: Array) -> list[float]:
    return [float(values.min()), float(values.max())]


def sensitivity(ladder: Ladder, found: Fit, budgets: list[float]) -> list[dict[str, float]]:
    """N* at the largest budget, as runs of the highest losses are dropped and delta changes: what a bootstrap does not show."""
    budget = max(budgets, default=float(ladder.flop.max()))
    few = [drop for drop in (0, 1, 3, 5, 10, 20) if drop <= len(ladder) // 5]
    choices = [(drop, found.delta) for drop in few] + [(len(ladder) - len(found.ladder), delta) for delta in (1e-7, 1e-4, 1e-2)]
    fits = [(drop, delta, fit(ladder.without_worst(drop), delta, 0)) for drop, delta in choices]
    return [{"dropped": drop, "delta": delta, "params": float(one.optimum(budget)[0].params), "alpha": float(one.parameters[3]),
             "beta": float(one.parameters[4])} for drop, delta, one in fits]  # fmt: skip


def counting(found: Fit, budgets: list[float]) -> list[dict[str, Any]]:
    """The best division of the largest budget as other countings of parameters, or of FLOP, have it: one row a convention known here."""
    ladder, budget = found.ladder, max(budgets, default=float(found.ladder.flop.max()))
    told = [("params, 6 FLOP each a token", found.parameters, PER_TOKEN)]
    told += [(f"{column}, 6 FLOP each a token", fit(replace(ladder, params=counted), found.delta, 0).parameters, PER_TOKEN)
             for column, counted in ladder.counts.items()]  # fmt: skip
    each = float(np.exp(np.log(ladder.flop / ladder.params / ladder.tokens).mean()))
    told += (
        [(f"params, {each:.3g} FLOP each a token, as these runs say", found.parameters, each)] if abs(each / PER_TOKEN - 1) > SAME else []
    )
    bests = [optimum(law, budget, each_token) for _, law, each_token in told]
    return [{"counted": name, "params": float(best.params), "tokens": float(best.tokens),
             "exponent": float(law[4] / (law[3] + law[4]))} for (name, law, _), best in zip(told, bests, strict=True)]  # fmt: skip


def table(told: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{told['form']} form, L = E + A / N^alpha + B / D^beta, on {told['runs']} runs of {told['data']}"
             + (f", {told['dropped']} of the highest losses dropped" if told["dropped"] else ""), ""]  # fmt: skip
    for name, value in told["parameters"].items():
        band = told["intervals"].get(name)
        lines.append(f"  {name:6} {value:10.5g}" + (f"   95%: {band[0]:.4g} … {band[1]:.4g}" if band else ""))
    for best in told["optimum"]:
        lines += ["", *_told(best)]
    lines += ["", "N* as runs are dropped and delta changes"]
    lines += [f"  {row['dropped']:3} dropped, delta {row['delta']:<7g} {_amount(row['params']):>10}" for row in told["sensitivity"]]
    if len(told["counting"]) > 1:
        lines += ["", "the best division, as counted otherwise"]
        lines += [f"  {_amount(row['params']):>12} on {_amount(row['tokens'])} tokens, N* as C^{row['exponent']:.3f}   {row['counted']}"
                  for row in told["counting"]]  # fmt: skip
    fine, kept = told["diagnostics"], told["conventions"]
    lines += [
        "",
        f"{fine['starts_at_optimum']:.0%} of the starts ended at this optimum; mean error on its runs {fine['mean_abs_error_pct']:.2f}%",
    ]
    return "\n".join([*lines, "counted: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in kept.items())])


def _told(best: dict[str, Any]) -> list[str]:
    ratio, rows = best["tokens"] / best["params"], list[str]()
    rows.append(f"{best['flop']:.3g} FLOP, {best['beyond_largest_run']:.3g} times the largest run: {ratio:.3g} tokens a parameter")
    for name, shown in (("params", _amount), ("tokens", _amount), ("loss", "{:.4g}".format)):
        band = f"   95%: {' … '.join(map(shown, best['intervals'][name]))}" if "intervals" in best else ""
        rows.append(f"  {name:6} {shown(best[name]):>10}{band}")
    return [*rows, *([f"  {ALLOCATION}"] if best.get("determined") is False else [])]


def _amount(value: float) -> str:
    """
    >>> _amount(73.2e9), _amount(96_000)
    ('73.2 billion', '96,000')
    """
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"
