"""Which small runs to make before a large one: budgets and sizes within a share of the target's compute, and what they will tell.

Near its optimum a law that is fitted to runs with a scatter s of ln L knows its theta with the covariance s² (JᵀJ)⁻¹, J the derivatives
of ln L at the runs; what a quantity of theta may be off follows from its own derivatives. Precision of the best size is bought by sizes
far apart at each budget, that of the loss by compute, so curves are wide and budgets few. The next run of a ladder that exists is the one
that takes most of the variance of the target's loss for its cost (V-optimal, greedily).
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.asked import base_of, law_of, quantity, share_of
from analysis.chinchilla import Array
from analysis.ladder import Ladder
from analysis.law import PER_TOKEN, optimum, predicted, refuse_unfit
from analysis.shapes import Shape, shapes
from analysis.sizing import batch, learning_rate
from conf.errors import Refused
from conf.plan import Plan
from conf.program import count, flag

OPTIONS = {
    "target": ("", "compute of the large run, as in 1e22 FLOP"),
    "share": ("0.01", "of it that the small runs may cost together"),
    "budgets": ("5", "budgets, each three times the one before"),
    "sizes": ("7", "sizes of each budget, from a quarter of the best to four times it"),
    "noise": ("0.005", "scatter of ln loss between runs that differ by their seed alone"),
    "law": ("", "JSON file of a fit (analysis scaling json=true); without it the plan's law, or Chinchilla's"),
    "data": ("", "runs that exist: a CSV file or a folder of real's runs; then the next run is chosen"),
    "json": ("false", "print one JSON object instead of commands"),
}
PLAN_WORDS = True
RATIO, SPAN = 3.0, 4.0
EIGHTY = 1.2816  # standard deviations on either side that hold 80% of a normal distribution
TRIED = 40  # sizes times budgets that the next run is chosen from, each way


class Rung(NamedTuple):
    """A small run."""

    shape: Shape
    tokens: float

    @property
    def flop(self) -> float:
        return PER_TOKEN * self.shape.params * self.tokens


def design(options: Mapping[str, str], words: Sequence[str]) -> int:
    """Print the runs as commands, with what they will tell of the target."""
    base = base_of(words)
    law, target = law_of(options["law"], base).law, quantity(options, "target", "FLOP", 0.0)
    if not target:
        raise Refused("target= names no compute; say what the large run will take, as in target='1e22 FLOP'")
    noise, share = share_of(options, "noise"), share_of(options, "share")
    if options["data"]:
        done = Ladder.read(options["data"])
        refuse_unfit(done)
        rungs = [_next(base, law, target, share, noise, done)]
        at = np.stack([np.append(done.params, rungs[0].shape.params), np.append(done.tokens, rungs[0].tokens)])
    else:
        rungs = ladder(base, law, target * share, count(options, "budgets"), count(options, "sizes"))
        at = np.array([[rung.shape.params, rung.tokens] for rung in rungs]).T
    told = {"target": target, "spent": sum(rung.flop for rung in rungs), **precision(law, at, target, noise),
            "runs": [{"params": rung.shape.params, "tokens": rung.tokens, "flop": rung.flop, "overrides": overrides(base, rung, words)}
                     for rung in rungs]}  # fmt: skip
    print(json.dumps(told) if flag(options, "json") else table(told))
    return 0


def ladder(base: Plan, law: Array, spend: float, budgets: int, sizes: int) -> list[Rung]:
    """Sizes around the best of each budget, as many budgets as asked for, together at most what may be spent."""
    largest = spend / sizes / sum(RATIO**-i for i in range(budgets))
    every, rungs = shapes(base.model), list[Rung]()
    for flop in (largest * RATIO**-i for i in reversed(range(budgets))):
        best = float(optimum(law, flop).params)
        wanted = best * np.geomspace(1 / SPAN, SPAN, sizes) if sizes > 1 else np.array([best])
        near = {min(range(len(every)), key=lambda i: abs(math.log(every[i].params / size))) for size in wanted}
        rungs += [Rung(every[i], flop / PER_TOKEN / every[i].params) for i in sorted(near)]
    if len(rungs) <= len(law) or len({rung.shape.params for rung in rungs}) < 3:
        raise Refused(
            f"{spend:.3g} FLOP make {len(rungs)} runs of {len({r.shape.params for r in rungs})} sizes, too few for a law; spend more"
        )
    return rungs


# -- what they will tell


def precision(law: Array, at: Array, target: float, noise: float) -> dict[str, Any]:
    """Half-widths of 80% bands, relative: of the best size for the target, and of its loss, if the law's form is true.

    `at` is (2, runs) of parameters and tokens.
    """
    J = derivatives(law, at[0], at[1])
    information = J.T @ J / noise**2
    values, vectors = np.linalg.eigh(information)
    if values[0] <= 1e-12 * values[-1]:
        return {"best_size": None, "loss": None}
    covariance = vectors / values @ vectors.T
    best = optimum(law, target)
    by_loss = derivatives(law, np.array([float(best.params)]), np.array([float(best.tokens)]))[0]
    by_size = _slopes(lambda logs: math.log(float(optimum(np.exp(logs), target).params)), np.log(law))
    off = [EIGHTY * math.sqrt(float(by @ covariance @ by)) for by in (by_size, by_loss)]
    return {"best_size": math.expm1(off[0]), "loss": math.expm1(off[1])}


def derivatives(law: Array, params: Array, tokens: Array) -> Array:
    """(runs, 5) of ln L by the logarithms of E, A, B, alpha, beta."""
    E, A, B, alpha, beta = law
    total = predicted(law, params, tokens)
    one, two = A * params**-alpha / total, B * tokens**-beta / total
    return np.stack([E / total, one, two, -alpha * np.log(params) * one, -beta * np.log(tokens) * two], -1)


def _slopes(of: Any, at: Array) -> Array:
    steps = np.eye(len(at)) * 1e-6
    return np.array([(of(at + step) - of(at - step)) / 2e-6 for step in steps])


def _next(base: Plan, law: Array, target: float, share: float, noise: float, done: Ladder) -> Rung:
    """Of sizes and budgets up to what may be spent, the run that takes most of the variance of the target's loss, a FLOP."""
    J = derivatives(law, done.params, done.tokens)
    ridge = 1e-9 * np.trace(J.T @ J) * np.eye(len(law))
    inverse = np.linalg.inv((J.T @ J + ridge) / noise**2)
    best = optimum(law, target)
    goal = derivatives(law, np.array([float(best.params)]), np.array([float(best.tokens)]))[0]
    every = shapes(base.model)
    rungs = [Rung(shape, flop / PER_TOKEN / shape.params) for flop in np.geomspace(done.flop.min(), target * share, TRIED)
             for shape in every if 1 / SPAN < shape.params / float(optimum(law, flop).params) < SPAN]  # fmt: skip
    if not rungs:
        raise Refused(f"no size fits a run of up to {target * share:.3g} FLOP; raise share")
    rows = derivatives(law, np.array([rung.shape.params for rung in rungs]), np.array([rung.tokens for rung in rungs]))
    gain = (rows @ inverse @ goal) ** 2 / (noise**2 + np.einsum("ri,ij,rj->r", rows, inverse, rows))
    return rungs[int((gain / np.array([rung.flop for rung in rungs])).argmax())]


# -- as commands


def overrides(base: Plan, rung: Rung, words: Sequence[str]) -> list[str]:
    """The words of `foretold real` that make a run; batch and learning rate by Step Law."""
    model, ranks = rung.shape.model, base.cluster.ranks
    sequences = max(batch(base, rung.shape.params, rung.tokens), ranks)
    steps = max(10, round(rung.tokens / (sequences * base.train.seq_len)))
    rate = learning_rate(base, rung.shape.params, rung.tokens)
    shape = [f"model.{name}={getattr(model, name)}" for name in ("name", "hidden", "layers", "heads", "kv_heads", "ffn")]
    micro = min(sequences // ranks, base.train.micro_batch)
    train = {"global_batch": sequences, "micro_batch": micro, "steps": steps, "warmup": max(1, steps // 20), "learning_rate": rate}
    return [
        *words,
        *shape,
        *(f"train.{name}={value:.3g}" if name == "learning_rate" else f"train.{name}={value}" for name, value in train.items()),
    ]


def table(told: dict[str, Any]) -> str:
    size, loss = told["best_size"], told["loss"]
    lines = [f"# {len(told['runs'])} runs, {told['spent']:.3g} FLOP, {told['spent'] / told['target']:.2%} of the target"]
    if size is not None:
        lines.append(
            f"# expected, 80%: the best size within a factor of {1 + size:.2f}, its loss within {loss:.2%}, if the law's form is true"
        )
    lines += [f"foretold real {shlex.join(run['overrides'])}" for run in told["runs"]]
    return "\n".join([*lines, "# then: foretold analysis scaling data=runs"])
