"""The form of a GPU's products, attention and streaming kernels, fitted to what was measured.

    minimise  Σ ρ(log(predicted / measured) / 0.1),  ρ the soft L1 loss

over all of them at once, predicted by the simulator's own formula (sim.kernels.Device.each), so that a parameter's error holds what it
shares with the others. A third of the products' shapes, told by a hash of m, n and k, takes no part. Products thinner than half a tile
are not fitted either, because the form has no tiles for them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from analysis.calibrate import Rows, _by, _spread
from conf.plan import Plan
from conf.profile import Parameter
from sim.kernels import ALIGNED, Array, Device, Work, attention, given, matmul


class Sought(NamedTuple):
    """The kinds of rows that a parameter is about, its least and its most, and where the search begins when the table has no number."""

    kinds: str
    least: float
    most: float
    usual: float


FORM = {
    "memory_efficiency": Sought("add|cast|gelu", 0.05, 1.5, 0.8),
    "gemm_efficiency": Sought("matmul.*bf16", 0.02, 1.5, 0.7),
    "narrow_efficiency": Sought("matmul.*fp8", 0.02, 1.5, 0.6),
    "gemm_depth": Sought("matmul", 1.0, 4000.0, 80.0),
    "gemm_half": Sought("matmul", 0.05, 500.0, 8.0),
    "overlap": Sought("matmul", 0.0, 1.0, 0.5),
    "gemm_backward": Sought("matmul.(input|weight)", 0.2, 3.0, 1.0),
    "gemm_odd": Sought("matmul", 0.02, 2.0, 0.7),
    "grouped_efficiency": Sought("grouped", 0.02, 2.0, 0.8),
    "attention_efficiency": Sought("attention.forward", 0.01, 3.0, 0.5),
    "attention_backward": Sought("attention.backward", 0.01, 3.0, 0.4),
    "attention_head": Sought("attention", 0.05, 1000.0, 20.0),
}
STREAMS = ("add.forward", "cast.forward", "gelu.forward")  # one kernel each, which reads and writes everything once
LEAST = 128  # rows, columns and depth of a product that the form is about
THIRD = 3
ROBUST = 0.1
TELLS = 1e-3  # of a parameter's logarithm, by which some prediction must move for the rows to speak of it


Flags: TypeAlias = NDArray[np.bool_]


class Group(NamedTuple):
    """Rows of one formula: their work as arrays, what was measured, and what else is said of them."""

    kind: str
    precision: str
    work: Work
    seconds: Array
    kept: Flags  # which rows take part in the fit
    odd: Flags
    thin: Flags


def solved(plan: Plan, groups: list[Group], base: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The parameters of the form that the groups speak of."""
    from scipy.optimize import least_squares

    seconds = np.concatenate([group.seconds[group.kept] for group in groups] or [np.ones(0)])
    table = {name: float(getattr(plan.gpu, name)) for name in FORM}

    def misses(x: Array, names: Sequence[str]) -> Array:
        values = table | {name: _number(name, value) for name, value in zip(names, x.tolist(), strict=True)}
        found = {name: Parameter(value, "1") for name, value in values.items()} | dict(base)
        told = [predicted(plan, group, found)[group.kept] for group in groups]
        return np.asarray(np.log(np.concatenate(told) / seconds))

    def speak(name: str) -> bool:
        """Whether there are rows that a parameter is about, and some prediction moves with it."""
        if not any(re.match(FORM[name].kinds, group.kind) for group in groups):
            return False
        here = _place(name, _start(plan, name))
        return bool(np.ptp([misses(np.array([here + step]), [name]) for step in (0.0, 0.1)], axis=0).max() > TELLS)

    names = [name for name in FORM if speak(name)]
    if not names:
        return {}
    x0 = [_place(name, _start(plan, name)) for name in names]
    least, most = ([_place(name, number) for name, number in zip(names, side, strict=True)] for side in
                   ([FORM[name].least for name in names], [FORM[name].most for name in names]))  # fmt: skip
    best = least_squares(misses, x0, args=(names,), bounds=(least, most), loss="soft_l1", f_scale=ROBUST, x_scale="jac")
    found = {}
    for name, x, error in zip(names, best.x.tolist(), _spread(best, len(seconds)).tolist(), strict=True):
        value = _number(name, x)
        found[name] = Parameter(value, "1", error if name == "overlap" else value * error)
    return found


def _start(plan: Plan, name: str) -> float:
    """Where the search begins: at the table's number, if it has one."""
    sought, number = FORM[name], float(getattr(plan.gpu, name))
    return number if sought.least < number < sought.most and number != 1 else sought.usual


def _place(name: str, number: float) -> float:
    """Where a number lies in the search: its logarithm, save the overlap's, which may be nothing."""
    return number if name == "overlap" else float(np.log(number))


def _number(name: str, place: float) -> float:
    return place if name == "overlap" else float(np.exp(place))


def predicted(plan: Plan, group: Group, found: Mapping[str, Parameter]) -> Array:
    """Seconds of a group's rows with these parameters, by the simulator."""
    own = plan.but(**{"train.precision": group.precision, "train.compile": True, "power.cap": None})
    return np.broadcast_to(Device([given(own, found)]).each([group.work])[0], group.seconds.shape)


def groups_of(rows: Rows) -> Iterator[Group]:
    lost = overhead(rows)
    for kind, same in _by([row for row in rows if not row["how"]], "op", "stage", "precision").items():
        op, stage, precision = kind.split(".")
        n = {name: np.array([float(row[name] or 0) for row in same]) for name in ("batch", "m", "n", "k", "seq", "heads", "qk_head_dim")}
        work = _single(op, stage, n) if f"{op}.{stage}" not in STREAMS else _stream(f"{op}.{stage}", n["m"] * n["k"])
        if work is None:
            continue
        product = op == "matmul"
        out = np.array([product and crc32(f"{row['m']},{row['n']},{row['k']}".encode()) % THIRD == 0 for row in same])
        thin = product & (np.minimum(np.minimum(n["m"], n["n"]), n["k"]) < LEAST)
        odd = product & ((n["n"] % ALIGNED > 0) | (n["k"] % ALIGNED > 0))
        yield Group(kind, precision, work, seconds_of(same, lost), ~(out | thin), odd, thin)


def _single(op: str, stage: str, n: Mapping[str, Array]) -> Work | None:
    """Products of one layout, grouped products of one pass, or attention, as the step model counts them."""
    if op == "matmul" and stage == "forward":
        return matmul(n["m"], n["n"], n["k"], 2, stage)
    if op == "matmul":
        both = matmul(n["m"], n["n"], n["k"], 2, "backward")
        return Work(both.kind, both.flops / 2, both.bytes / 2, 1, both.products[stage == "weight" :][:1])
    if op == "grouped":
        return matmul(n["m"], n["n"], n["k"], 2, stage, n["batch"], 1)
    if op == "attention":
        return attention(n["batch"] * n["seq"], n["seq"], n["heads"] * n["qk_head_dim"], 2, stage, n["qk_head_dim"])
    return None


def _stream(kind: str, elements: Array) -> Work:
    """Kernels that read and write everything once, of 2 bytes; a cast reads 4 and writes 2."""
    passes = {"add.forward": 3, "cast.forward": 3, "gelu.forward": 2}[kind]
    return Work("add.forward", 0.0 * elements, passes * 2 * elements, 1)


def seconds_of(rows: Rows, lost: float) -> Array:
    """What was measured, without what two events around a call take themselves."""
    whole = np.array([float(row["time_us"]) * 1e-6 for row in rows])
    return np.maximum(whole - lost, 0.3 * whole)


def overhead(rows: Rows) -> float:
    """Seconds by which the smallest kernel between two events takes longer than behind others of its kind."""
    took = {row["stage"]: float(row["time_us"]) * 1e-6 for row in rows if row["op"] == "launch"}
    return max(0.0, took["alone"] - took["queued"]) if {"alone", "queued"} <= took.keys() else 0.0
