"""The physical parameters of GPU families, fitted robustly to tables of published measurements.

    minimise  Σ ρ(log(predicted / published) / 0.1) × weight + Σ ((log value − log centre) / width)²

with ρ the soft L1 loss and as much weight for a large source as for one of FULL rows. The prior of a parameter is physical
(a data sheet's, a kernel benchmark's) and its width says how much a machine in training may differ. A parameter that no row
speaks of keeps its prior. Every source is then left out in turn and predicted with the parameters of the others.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from analysis import replay
from analysis.compare import columns as aligned
from analysis.published import BAND, KINDS, read, recognise
from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from sim.kernels import Array, Device, Product, Work, rates
from sim.network import Network
from sim.parallel import predict

OPTIONS = {
    "tables": ("", "CSV files of measured steps and kernels, with commas"),
    "out": ("", "CSV file to write: family, parameter, value, standard error"),
}
FULL = 20.0
NOISE = 0.1  # log of a usual error, beyond which the loss grows linearly
FAMILIES = {
    "volta": ("v100-sxm",), "ampere": ("a100-40", "a100-80"), "hopper": ("h100-sxm", "h100-pcie", "h800", "h200-sxm"),
    "blackwell": ("b200", "b300"), "grace-blackwell": ("gb200", "gb300"),
}  # fmt: skip


class Prior(NamedTuple):
    """Centre, for all families or one each in the order of FAMILIES, and the width of its logarithm."""

    centre: float | tuple[float, ...]
    width: float


PRIORS = {
    "gemm_efficiency": Prior((0.74, 0.80, 0.76, 0.50, 0.66), 0.08),  # a little below the largest measured product; B200's of a table
    "narrow_efficiency": Prior(0.70, 0.12),  # largest measured fp8 product of an H100: 0.71 of the peak
    "gemm_depth": Prior(130.0, 0.5),
    "gemm_half": Prior(7.0, 0.5),
    "grouped_efficiency": Prior((0.85, 0.85, 0.8, 0.65, 0.65), 0.15),  # of B200's table, and of what needs fewer tokens to fill
    "early_gemm": Prior((1.0, 1.0, 0.9, 0.9, 0.9), 0.1),
    "attention_efficiency": Prior(0.75, 0.2),
    "attention_backward": Prior(0.65, 0.2),
    "eager_attention": Prior((0.7, 0.7, 0.5, 0.5, 0.5), 0.2),  # FlashAttention-2 on an H100: 0.35 of the peak, -3: 0.75 (Shah et al. 2024)
    "memory_efficiency": Prior(0.82, 0.08),
    "host_launch": Prior((45e-6, 45e-6, 45e-6, 30e-6, 30e-6), 0.4),
    "link_efficiency": Prior(0.80, 0.1),
    "nic_efficiency": Prior(0.80, 0.2),
    "slowdown": Prior(0.30, 0.5),
    "tensor_overlap": Prior((1e-3, 1e-3, 0.4, 0.4, 0.4), 0.3),  # overlapped in the code of Hopper and later
}


class Rows(NamedTuple):
    """Measured rows of one kind that are predicted together."""

    plans: list[Plan]
    numbers: Any  # columns of steps, or the works of kernels by kind with their places
    network: Network | None
    groups: Array
    measured: Array
    table: str

    def of(self, which: Array) -> "Rows":
        """The rows where `which` holds."""
        index = np.flatnonzero(which)
        plans = [self.plans[i] for i in index]
        if not plans:
            return Rows([], None, None, self.groups[index], self.measured[index], self.table)
        if self.network is None:
            return Rows(plans, [self.numbers[i] for i in index], None, self.groups[index], self.measured[index], self.table)
        return _steps(plans, self.numbers.frozen[index], self.groups[index], self.measured[index], self.table)

    def predicted(self, values: Mapping[str, float]) -> Array:
        """Seconds of every row with these parameters."""
        return self.told(values)[0]

    def told(self, values: Mapping[str, float]) -> tuple[Array, Array]:
        """Seconds of every row with these parameters, and the standard deviation of their logarithm."""
        keys = [(plan.gpu.name, plan.train.precision, plan.train.compile, plan.power.cap, plan.gpu.early) for plan in self.plans]
        distinct = dict(zip(keys, self.plans, strict=True))
        order = {key: place for place, key in enumerate(distinct)}
        device = Device([rates(plan.but(gpu=plan.gpu.but(**values))) for plan in distinct.values()])
        device = device.take(np.array([order[key] for key in keys]))
        if self.network is None:
            return _kernel_seconds(device, self.numbers), device["error"]
        network = copy(self.network)
        network.nic = network.nic / network.device["nic"] * device["nic"]
        network.device = device
        steps = predict(self.numbers, device, network)
        return steps.step_time, steps.error


def fit(options: Mapping[str, str]) -> int:
    """Fit every family that the tables speak of, and print the parameters and the errors on sources left out.

    Raises Refused for tables that hold neither steps nor kernels.
    """
    if not options["tables"]:
        raise Refused("tables= names no file; write foretold analysis fit tables=FILE,FILE")
    sets = [rows_of(Path(name)) for name in options["tables"].split(",")]
    found, left = [], list[pd.DataFrame]()
    for family, gpus in FAMILIES.items():
        mine = [rows.of(np.array([plan.gpu.name in gpus for plan in rows.plans])) for rows in sets]
        mine = [rows for rows in mine if rows.plans]
        if mine:
            values, errors = solved(family, mine)
            found += [(family, name, values[name], errors[name]) for name in PRIORS]
            left.append(_left_out(family, mine, values))
    parameters = pd.DataFrame(found, columns=["family", "parameter", "value", "standard_error"])
    print("\n".join(aligned([("family", "parameter", "value", "± relative"), *((f, n, f"{v:.4g}", f"{e:.2f}") for f, n, v, e in found)])))
    print("\n".join(_told(pd.concat(left, ignore_index=True))))
    if options["out"]:
        write(Path(options["out"]), parameters.to_csv(index=False))
    return 0


def rows_of(path: Path) -> Rows:
    """The rows of a table that can be predicted.

    Raises Refused for a table of neither steps nor kernels.
    """
    frame = read(path)
    name = recognise(frame, str(path))
    measured = pd.to_numeric(frame[KINDS[name].measured], errors="coerce")
    frame, measured = frame[measured > 0], measured[measured > 0]
    if name == "step_time":
        plans, frozen, index = replay.plans_of(frame)
        return _steps(plans, frozen, frame["group"][index].to_numpy(), measured[index].to_numpy(), path.stem)
    if name != "kernel_efficiency":
        raise Refused(f"tables={path} is a table of {name}; fit takes step_time and kernel_efficiency")
    plans, works, seconds = [], [], []
    for row, share in zip(replay.records(frame), measured, strict=True):
        flops, work = replay.kernel(row)
        plans.append(replay.kernel_plan(row))
        works.append(work)
        seconds.append(flops / (share * float(row["peak_tflops"]) * 1e12))
    return Rows(plans, works, None, np.array([f"kernels {gpu}" for gpu in frame["gpu"]]), np.array(seconds), path.stem)


def solved(family: str, sets: list[Rows], start: Mapping[str, float] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """The parameters of a family, and the standard errors of their logarithms."""
    place = list(FAMILIES).index(family)
    centre = np.log([prior.centre[place] if isinstance(prior.centre, tuple) else prior.centre for prior in PRIORS.values()])
    width = np.array([prior.width for prior in PRIORS.values()])
    weights = [_weights(rows.groups) for rows in sets]

    def residuals(x: Array) -> Array:
        values = dict(zip(PRIORS, np.exp(x).tolist(), strict=True))
        parts = []
        for rows, weight in zip(sets, weights, strict=True):
            error = np.log(rows.predicted(values) / rows.measured) / NOISE
            parts.append(np.sign(error) * np.sqrt(2 * (np.sqrt(1 + error**2) - 1)) * weight)
        return np.concatenate([*parts, (x - centre) / width])

    def slopes(x: Array) -> Array:  # steps of 1%, wide enough to see past the stairs that waves of tiles make
        here, step = residuals(x), 0.01
        return np.stack([(residuals(x - step * side) - here) / -step for side in np.eye(len(x))], axis=1)

    first = centre if start is None else np.log([start[name] for name in PRIORS])
    most = np.array([0.0 if name in ("link_efficiency", "nic_efficiency") else np.inf for name in PRIORS])
    bounds = (np.full(len(most), -np.inf), most)
    result = least_squares(residuals, np.minimum(first, most - 1e-6), slopes, bounds, xtol=1e-3, ftol=1e-3, max_nfev=12)
    slope = slopes(result.x)
    error = np.sqrt(np.diag(np.linalg.inv(slope.T @ slope)))
    return dict(zip(PRIORS, np.exp(result.x).tolist(), strict=True)), dict(zip(PRIORS, error.tolist(), strict=True))


def _left_out(family: str, sets: list[Rows], start: Mapping[str, float]) -> pd.DataFrame:
    """Every row predicted with the parameters of the other sources: family, source, kind, error, and the band's half width."""
    told = []
    for group in sorted({str(group) for rows in sets for group in rows.groups}):
        others = [kept for rows in sets if (kept := rows.of(rows.groups != group)).plans]
        values, _ = solved(family, others, start) if others else (_prior(family), {})
        for rows in (out for rows in sets if (out := rows.of(rows.groups == group)).plans):
            experts = [rows.network is not None and plan.model.moe.experts for plan in rows.plans]
            kinds = [f"{rows.table}{', mixtures' if some else ''}" for some in experts]
            seconds, deviation = rows.told(values)
            wide, error = BAND * deviation, seconds / rows.measured - 1
            told.append(pd.DataFrame({"family": family, "source": group, "kind": kinds, "error": error, "wide": wide}))
    return pd.concat(told)


def _told(left: pd.DataFrame) -> Iterator[str]:
    """Errors on sources left out, each and together."""
    head = ("left out", "rows", "mean %", "median %", "95th pct", "bias %", "80% band")
    parts = {f"{family} {source}": part for (family, source), part in left.groupby(["family", "source"], sort=False)}
    parts |= {f"all of {kind}": part for kind, part in left.groupby("kind")}
    yield ""
    lines = []
    for name, part in parts.items():
        size, held = 100 * part["error"].abs(), np.log1p(part["error"]).abs() <= part["wide"]
        figures = [f"{figure:.1f}" for figure in (size.mean(), size.median(), size.quantile(0.95))]
        lines.append((name, str(len(part)), *figures, f"{100 * part['error'].mean():+.1f}", f"{held.mean():.0%}"))
    yield from aligned([head, *lines])


def _prior(family: str) -> dict[str, float]:
    place = list(FAMILIES).index(family)
    return {name: prior.centre[place] if isinstance(prior.centre, tuple) else prior.centre for name, prior in PRIORS.items()}


def _weights(groups: Array) -> Array:
    """1 for rows of a source of at most FULL, less for each of a larger one."""
    sizes = pd.Series(groups).groupby(groups).transform("size").to_numpy()
    return np.asarray(np.minimum(1.0, np.sqrt(FULL / sizes)))


def _steps(plans: list[Plan], frozen: Array, groups: Any, measured: Any, table: str) -> Rows:
    p, network = replay.arrays(plans, frozen)
    return Rows(plans, p, network, np.asarray(groups), np.asarray(measured), table)


def _kernel_seconds(device: Device, works: list[Work]) -> Array:
    """Seconds of single operations, those of a kind together."""
    seconds = np.empty(len(works))
    for kind in {work.kind for work in works}:
        index = np.array([place for place, work in enumerate(works) if work.kind == kind])
        mine = [works[place] for place in index]

        def each(name: str, objects: list[Any]) -> Array:
            return np.array([float(getattr(thing, name)) for thing in objects])

        flops, size, launches = (each(name, mine) for name in ("flops", "bytes", "launches"))
        if mine[0].products:
            products = [work.products[0] for work in mine]
            stacked = Product(*(each(name, products) for name in ("m", "n", "k", "matrices")))
            work = Work(kind, flops, size, launches, (stacked,))
        else:
            work = Work(kind, flops, size, launches, chain=each("chain", mine))
        seconds[index] = device.take(index).seconds(work)
    return seconds
