"""The best mesh for a model, a cluster and a batch: every legal one is predicted, those that fit are ranked by step time.

A candidate has an outer part, which decides its kernels (tp, cp, pp, ep, micro-batch), and an inner one (schedule with virtual
stages, sharding, recomputation). Outer parts are listed; inner ones are further axes of the arrays, so that a kernel is timed
once for all candidates that run it. Outer parts are taken by the time that their kernels alone need: as soon as that exceeds
the best step found, nothing behind them can be better.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from conf.plan import Plan
from sim.kernels import Array, Device, rates
from sim.memory import USABLE
from sim.network import Network
from sim.parallel import columns, kernels_alone, predict
from sim.schedule import PARTED, V_SHAPED

OUTER = ("tp", "cp", "pp", "ep", "micro_batch")
RECOMPUTE = ("none", "selective", "full")
NAMES = (*OUTER, "schedule", "vpp", "zero", "dp_replicate", "dp_shard", "recompute")
PARTS = ("compute", "communication", "bubble", "optimizer")
COLUMNS = (*NAMES, "step_time", *PARTS, "memory", "mfu")
NEAR = 1.10  # meshes this much slower than the best are listed too
CHUNK = 60_000  # candidates predicted at a time
KEYS = {name: f"mesh.{name}" for name in NAMES} | {name: f"train.{name}" for name in ("micro_batch", "recompute")}


_Rows = dict[str, Any]  # columns of candidates


@dataclass(frozen=True)
class Search:
    """What a search found; a mesh is a row with NAMES, step_time, PARTS, memory and mfu."""

    meshes: pd.DataFrame  # those that fit and are at most NEAR times slower than the best, fastest first
    leanest: Mapping[str, Any] | None  # of all predicted, the one that needs the least memory; None if there is no legal mesh
    predicted: int  # legal meshes that were predicted; the kernels of the others take longer than NEAR times the best step


@dataclass(frozen=True)
class Inner:
    """Choices that do not change the kernels: schedules with virtual stages, shardings as (zero, replicas of a shard), recomputation."""

    schedules: list[tuple[str, int]]
    shardings: list[tuple[int, int]]
    recompute: list[str]

    @property
    def size(self) -> int:
        return len(self.schedules) * len(self.shardings) * len(self.recompute)


def search(plan: Plan, pins: Mapping[str, Any] | None = None, prune: bool = True) -> Search:
    """The best meshes for a plan's model, cluster and batch, with some of NAMES pinned to a value.

    The plan's own mesh, micro-batch and recomputation are not looked at. GPipe is left out: it takes as long as 1F1B, and more
    memory.
    """
    pins = pins or {}
    base, device = columns([plan]), Device([rates(plan)])
    network, inner, room = Network([plan], device), _inner(plan, pins), USABLE * plan.gpu.memory
    outer = np.array(list(_outer(plan, pins)), float).reshape(-1, len(OUTER))
    if not len(outer) or not inner.size:
        return Search(pd.DataFrame(columns=NAMES), None, 0)
    floor = _floor(plan, base, device, outer)
    found, leanest, best, predicted = list[_Rows](), (np.inf, _Rows({})), np.inf, 0
    for mine, choices in _chunks(plan, outer, floor, inner):
        if prune and floor[mine[0]] > NEAR * best:
            break
        p = _grid(plan, base, outer[mine], choices)
        legal, step = _legal(plan, p, pins), predict(p, device, network.on(p))
        predicted += int(legal.sum())
        memory = np.where(legal, step.memory, np.inf)
        fits = memory <= room
        best = min(best, float(np.min(step.step_time, where=fits, initial=np.inf)))
        if (near := fits & (step.step_time <= NEAR * best)).any():
            found.append(_rows(p, choices, step, np.nonzero(near)))
        if memory.min() < leanest[0]:
            leanest = memory.min(), _rows(p, choices, step, tuple(np.array([i]) for i in np.unravel_index(memory.argmin(), memory.shape)))
    if not predicted:
        return Search(pd.DataFrame(columns=NAMES), None, 0)
    meshes = _table(found).sort_values(["step_time", "memory"], kind="stable", ignore_index=True)
    return Search(meshes[meshes["step_time"] <= NEAR * best], records(_table([leanest[1]]))[0], predicted)


def _chunks(plan: Plan, outer: Array, floor: Array, inner: Inner) -> list[tuple[Any, Inner]]:
    """Outer parts of one number of pipeline ranks at a time, with the schedules that it allows, those of the lowest floor first."""
    found = []
    for pp in np.unique(outer[:, OUTER.index("pp")]):
        choices = replace(inner, schedules=[(name, vpp) for name, vpp in inner.schedules if _folds(plan.model.layers, int(pp), vpp)])
        mine = np.flatnonzero(outer[:, OUTER.index("pp")] == pp)
        mine = mine[np.argsort(floor[mine], kind="stable")]
        rows = max(1, CHUNK // max(1, choices.size))
        found += [(part, choices) for part in np.split(mine, range(rows, len(mine), rows))] if choices.size else []
    return sorted(found, key=lambda chunk: floor[chunk[0][0]])


def _folds(layers: int, pp: int, vpp: int) -> bool:
    """Whether a pipeline may have so many virtual stages a rank; the rule of conf.rules."""
    stages = pp * vpp
    return vpp == 1 or (pp > 1 and stages <= layers + 2 and (layers % stages == 0 or (layers + 2) % stages == 0))


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [d for d in range(1, min(number, most or number) + 1) if number % d == 0]


def _outer(plan: Plan, pins: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """Legal (tp, cp, pp, ep, micro_batch); the same rules as conf.rules, for whole lists."""
    model, seq, ranks = plan.model, plan.train.seq_len, plan.cluster.ranks
    tps = [tp for tp in _divisors(ranks, plan.cluster.domain_ranks) if not (model.heads % tp or model.kv_heads % tp or model.ffn % tp)]
    cps = [cp for cp in _divisors(ranks) if seq % cp == 0]
    pps = _divisors(ranks, model.layers + 2)
    eps = _divisors(model.moe.experts) if model.moe.experts else [1]
    for tp, cp, pp in product(*(_pinned(pins, name, values) for name, values in zip(OUTER, (tps, cps, pps), strict=False))):
        dp, rest = divmod(ranks, tp * cp * pp)
        if rest or seq // cp % tp or plan.train.global_batch % dp:
            continue
        share = plan.train.global_batch // dp
        experts = [ep for ep in _pinned(pins, "ep", eps) if dp * cp * tp % ep == 0]
        sizes = [size for size in _pinned(pins, "micro_batch", _divisors(share)) if (plan.train.first_batch or 0) % (dp * size) == 0]
        yield from ((tp, cp, pp, ep, size) for ep in experts for size in sizes)


def _pinned(pins: Mapping[str, Any], name: str, values: list[Any]) -> list[Any]:
    return [value for value in values if name not in pins or value == pins[name]]


def _inner(plan: Plan, pins: Mapping[str, Any]) -> Inner:
    layers, ranks = plan.model.layers, plan.cluster.ranks
    folds = sorted({d for whole in (layers, layers + 2) for d in _divisors(whole)} - {1})
    schedules = [("1f1b", 1), *(("interleaved", n) for n in folds), *(("zero_bubble", n) for n in folds), ("zbv", 2), ("dualpipev", 2)]
    shardings = [(0, 1), (1, 1), (2, 1), *((3, n) for n in _divisors(ranks))]
    return Inner(
        [(name, n) for name, n in schedules if pins.get("schedule", name) in (name, "auto") and pins.get("vpp", n) == n],
        [(zero, n) for zero, n in shardings if pins.get("zero", zero) == zero and pins.get("dp_replicate", n) == n],
        _pinned(pins, "recompute", list(RECOMPUTE)),
    )


def _placed(plan: Plan, base: Any, outer: Array) -> Any:
    """The plan's numbers with the outer parts of candidates, along the first of four axes."""
    p = copy(base)
    p.tp, p.cp, p.pp, p.ep, p.micro_batch = outer.T[:, :, None, None, None]
    p.ranks = plan.cluster.ranks
    p.dp = p.ranks / (p.tp * p.cp * p.pp)
    p.accumulation = plan.train.global_batch / (p.dp * p.micro_batch)
    return p


def _floor(plan: Plan, base: Any, device: Device, outer: Array) -> Array:
    """Least seconds of a step of each outer part."""
    parts = np.array_split(outer, max(1, len(outer) // 1000))
    return np.concatenate([kernels_alone(_placed(plan, base, part), device).ravel() for part in parts])


def _grid(plan: Plan, base: Any, outer: Array, inner: Inner) -> Any:
    """Candidates as arrays that broadcast over (outer part, schedule, sharding, recomputation)."""
    p = _placed(plan, base, outer)
    second, third, fourth = (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)
    p.vpp = np.reshape([float(n) for _, n in inner.schedules], second)
    p.parted = np.reshape([name in PARTED for name, _ in inner.schedules], second)
    p.schedule = np.reshape([name for name, _ in inner.schedules], second)
    p.v_shaped = np.reshape([name in V_SHAPED for name, _ in inner.schedules], second)
    p.gpipe = np.array(False)
    p.dual = np.reshape([name == "dualpipev" for name, _ in inner.schedules], second)
    p.zero = np.reshape([float(zero) for zero, _ in inner.shardings], third)
    p.dp_replicate = np.reshape([float(n) for _, n in inner.shardings], third)
    p.dp_shard = p.dp / p.dp_replicate
    p.recompute = np.reshape([how == "full" for how in inner.recompute], fourth)
    p.core = np.array(False)
    p.selective = np.reshape([how == "selective" for how in inner.recompute], fourth)
    return p


def _legal(plan: Plan, p: Any, pins: Mapping[str, Any]) -> Any:
    """Whether a candidate keeps the other rules of conf.rules; where there is one data-parallel rank, sharding is told once."""
    by_turns = (p.schedule == "interleaved") | (p.schedule == "zero_bubble")
    dealt = ~by_turns | (p.accumulation <= p.pp) | (p.accumulation % p.pp == 0)
    enough = (p.schedule != "dualpipev") | (p.accumulation >= 2 * p.pp)
    sharded = (p.dp_shard == np.floor(p.dp_shard)) & ((p.dp > 1) | (p.zero == 3))
    legal = dealt & enough & sharded & (p.dp_shard * p.cp * p.tp % p.ep == 0) & (p.dp_shard == pins.get("dp_shard", p.dp_shard))
    return np.broadcast_to(legal[..., :1], np.broadcast_shapes(legal.shape, p.recompute.shape))


def _rows(p: Any, inner: Inner, step: Any, at: Any) -> _Rows:
    """The candidates at some places of the grid, a column each."""
    shape = step.step_time.shape
    rows = {name: np.broadcast_to(getattr(p, name), shape)[at].astype(int) for name in NAMES if name not in ("schedule", "recompute")}
    rows["schedule"] = np.where(rows["pp"] > 1, np.broadcast_to(p.schedule, shape)[at], "auto")
    rows["recompute"] = np.array(inner.recompute)[at[3]]
    told = {name: getattr(step, name)[at] for name in ("step_time", *PARTS, "memory", "mfu")}
    return _Rows({name: rows[name] for name in NAMES} | told)


def _table(parts: list[_Rows]) -> pd.DataFrame:
    """Chosen candidates as one table: pandas costs more than predicting a chunk."""
    return (
        pd.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        if parts
        else pd.DataFrame(columns=COLUMNS)
    )


def records(meshes: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain numbers under their names."""
    return [{str(name): value for name, value in row.items()} for row in meshes.to_dict("records")]
