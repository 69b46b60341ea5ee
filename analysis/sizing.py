"""Sizes of a model on a cluster: each with its best mesh, what a second of it gives and costs, and what limits leave of time."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq

from analysis.chinchilla import Array
from analysis.law import predicted
from analysis.repeated import DECAYS, worth
from analysis.served import SERVE, TRAIN
from analysis.shapes import Shape, shapes
from conf.arithmetic import parameters
from conf.plan import Plan
from sim.expect import expected
from sim.pace import pace
from sim.search import records, search

AROUND = 16.0  # times smaller and larger than the first guess
LEAST, MOST = 40, 64  # sizes
GUESS = 0.4  # MFU of the first guess, from which the batch follows
BATCH = (0.581, 0.571)  # tokens of a batch = 0.581 D^0.571 (Li et al. 2025, Step Law, arXiv 2503.04715)
RATE = (1.797, -0.713, 0.307)  # learning rate = 1.797 N^-0.713 D^0.307 (the same)
MEASURED = 6e7  # parameters from which on Step Law was measured; smaller models keep the plan's own batch and rate
MESH = ("tp", "cp", "pp", "ep", "vpp", "zero", "dp_replicate", "dp_shard", "schedule")
EXECUTED = {"zero": 3}  # of all shardings the one that real executes
TOLD = ("tp", "cp", "pp", "dp_shard", "dp_replicate")


@dataclass(frozen=True)
class Limits:
    """What may be spent [USD, s, J], infinite where nothing was said; tokens in use, tokens that there are; the loss to reach."""

    dollars: float
    seconds: float
    joules: float
    inference: float
    unique: float
    target: float | None


@dataclass(frozen=True)
class Run:
    """A size with its best mesh, and what a second of it gives and costs."""

    plan: Plan
    params: float  # that a token visits
    tokens_per_s: float  # that count, failures and all
    dollars_per_s: float
    watts: float
    carbon_per_s: float  # gCO2e
    mfu: float
    ettr: float
    error: float  # standard deviation of ln of the step time that is foretold

    def slowed(self, factor: float) -> "Run":
        """The same with steps so many times as long, at the same price and power."""
        return replace(self, tokens_per_s=self.tokens_per_s / factor)

    def told(self, law: Array, limits: Limits, seconds: float) -> dict[str, Any]:
        """What so many seconds of it come to."""
        tokens = self.tokens_per_s * seconds
        return {
            "model": self.plan.model.name,
            "params": self.params,
            "total_params": float(parameters(self.plan.model)),
            "tokens": tokens,
            "loss": self.loss(law, limits, tokens, self.params),
            "loss_of_total": self.loss(law, limits, tokens, float(parameters(self.plan.model))),
            "mfu": self.mfu,
            "ettr": self.ettr,
            "seconds": seconds,
            "device_hours": seconds * self.plan.ranks / 3600,
            "cost": self.dollars_per_s * seconds,
            "inference_cost": self.inference_dollars(limits),
            "energy": self.watts * seconds,
            "carbon": self.carbon_per_s * seconds,
            "global_batch": self.plan.train.global_batch,
            "mesh": {name: getattr(self.plan.mesh, name) for name in TOLD},
        }

    def loss(self, law: Array, limits: Limits, tokens: float, params: float) -> float:
        """By so many of its parameters: of a mixture of experts those that a token visits are the cautious count, all of them the bold."""
        return float(predicted(law, params, effective(tokens, limits.unique))) if tokens > 0 else math.inf

    def inference_dollars(self, limits: Limits) -> float:
        """2 N a token in use, at what a FLOP of training costs."""
        return SERVE / TRAIN * limits.inference * self.dollars_per_s / self.tokens_per_s

    def seconds(self, limits: Limits) -> float:
        """That the limits leave for training."""
        money = (limits.dollars - self.inference_dollars(limits)) / self.dollars_per_s
        return min(money, limits.seconds, limits.joules / self.watts)

    def needed(self, law: Array, limits: Limits) -> float:
        """Seconds to the loss that is asked for; infinite where this size never reaches it."""
        return tokens_for(law, self.params, limits) / self.tokens_per_s


def effective(tokens: float, unique: float) -> float:
    """What tokens are worth of which so many are unique (Muennighoff et al. 2023).

    >>> effective(1e9, 2e9), round(effective(4e9, 1e9) / 1e9, 2)
    (1000000000.0, 3.73)
    """
    return tokens if tokens <= unique else float(worth(np.asarray(unique), np.asarray(tokens / unique - 1), DECAYS[0]))


def tokens_for(law: Array, params: float, limits: Limits) -> float:
    """Tokens with which a size reaches the loss that is asked for; infinite where none do."""
    E, A, B, alpha, beta = (float(value) for value in law)
    left = (limits.target or math.inf) - E - A * params**-alpha
    asked = (B / left) ** (1 / beta) if left > 0 else math.inf
    if asked <= limits.unique:
        return asked
    if asked >= effective(1e3 * limits.unique, limits.unique):
        return math.inf  # however often the tokens come again
    return math.exp(
        float(brentq(lambda log: effective(math.exp(log), limits.unique) - asked, math.log(asked), math.log(1e3 * limits.unique)))
    )


def candidates(base: Plan, law: Array, limits: Limits) -> list[Shape]:
    """LEAST to MOST sizes around a first guess of the best, if the family has as many."""
    middle = _middle(base, law, limits)
    near = sorted(shapes(base.model), key=lambda shape: abs(math.log(shape.params / middle)))
    wide = [shape for shape in near if max(shape.params / middle, middle / shape.params) < AROUND]
    return sorted(near[:LEAST] if len(wide) < LEAST else wide[:MOST], key=lambda shape: shape.params)


def _middle(base: Plan, law: Array, limits: Limits) -> float:
    E, A, B, alpha, beta = (float(value) for value in law)
    if limits.target is not None:  # the best share of the reducible loss among the two terms
        return float((A * (1 + alpha / beta) / (limits.target - E)) ** (1 / alpha))
    ratio = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return float(ratio * (_guessed_flop(base, limits) / TRAIN) ** (beta / (alpha + beta)))


def _guessed_flop(base: Plan, limits: Limits) -> float:
    rent = base.price.gpu_hours[base.gpu.name].mid * base.ranks / 3600
    seconds = min(limits.seconds, limits.dollars / rent, limits.joules / (base.gpu.max_power * base.ranks))
    return GUESS * (base.gpu.peak(base.train.precision) or base.gpu.fp32_peak) * base.ranks * seconds


def best_mesh(base: Plan, shape: Shape, law: Array, limits: Limits) -> Run | None:
    """The run of a size on its fastest mesh; None where none fits."""
    plan = base.but(model=shape.model, **{"train.global_batch": _batch(base, shape, law, limits)})
    meshes = search(plan, EXECUTED).meshes
    if meshes.empty:
        return None
    mesh = records(meshes.head(1))[0]
    chosen = {f"mesh.{name}": mesh[name] for name in MESH} | {f"train.{name}": mesh[name] for name in ("micro_batch", "recompute")}
    placed = plan.but(**chosen, **{"train.steps": 100_000, "train.stop_after": None})
    fast = pace(placed)
    told = expected(placed, fast)
    rate = {name: told[f"run.{name}"] / told["run.wall_clock"] for name in ("tokens", "cost", "energy", "carbon_location")}
    return Run(placed, shape.params, rate["tokens"], rate["cost"], rate["energy"], rate["carbon_location"], fast.mfu,
               told["run.ettr"], fast.error)  # fmt: skip


def _batch(base: Plan, shape: Shape, law: Array, limits: Limits) -> int:
    """Sequences of a batch for the tokens that are guessed at first."""
    tokens = _guessed_flop(base, limits) / (TRAIN * shape.params) if limits.target is None else tokens_for(law, shape.params, limits)
    return batch(base, shape.params, tokens if math.isfinite(tokens) else 20 * shape.params)


def batch(plan: Plan, params: float, tokens: float) -> int:
    """Sequences of a batch by Step Law, as a power of two."""
    if params < MEASURED:
        return plan.train.global_batch
    return int(2 ** max(1, round(math.log2(BATCH[0] * tokens ** BATCH[1] / plan.train.seq_len))))


def learning_rate(plan: Plan, params: float, tokens: float) -> float:
    """By Step Law."""
    return plan.train.learning_rate if params < MEASURED else float(RATE[0] * params ** RATE[1] * tokens ** RATE[2])
