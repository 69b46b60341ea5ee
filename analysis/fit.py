"""The physical parameters of GPU families, fitted robustly to tables of published measurements.

    minimise  Σ ρ(log(predicted / published) / 0.1) × weight + Σ ((log value − log centre) / width)²

with ρ the soft L1 loss and as much weight for a large source as for one of FULL rows. The prior of a parameter is physical
(a data sheet's, a kernel benchmark's) and its width says how much a machine in training may differ. A parameter that no row
speaks of keeps its prior. Every source is then left out in turn and predicted with the parameters of the others, and so is
every fifth of a table of kernels or collectives (rows that repeat a key together).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from analysis import alone, replay
from analysis.compare import columns as aligned
from analysis.published import BAND, KINDS, read, recognise
from analysis.rows import device_of, records
from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from sim.kernels import Array
from sim.network import Network
from sim.parallel import predict

OPTIONS = {
    "tables": ("", "CSV files of measured steps, kernels and collectives, with commas"),
    "out": ("", "CSV file to write: family, parameter, value, standard error, whether fitted"),
}
FULL = 20.0
FOLDS = 5
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
    "grouped_efficiency": Prior((0.85, 0.85, 0.8, 0.65, 0.65), 0.15),  # of B200's table, and of what needs fewer tokens to fill
    "grouped_alone": Prior(0.85, 0.2),
    "early_gemm": Prior((1.0, 1.0, 0.9, 0.9, 0.9), 0.1),
    "burst": Prior(0.4, 0.5),  # the clock of a part below its power limit over that at it: 1.2 to 1.6
    "alone": Prior(1.03, 0.05),
    "attention_efficiency": Prior(0.75, 0.2),
    "attention_backward": Prior(0.65, 0.2),
    "eager_attention": Prior((0.7, 0.7, 0.5, 0.5, 0.5), 0.2),  # FlashAttention-2 on an H100: 0.35 of the peak, -3: 0.75 (Shah et al. 2024)
    "memory_efficiency": Prior(0.82, 0.08),
    "host_launch": Prior((45e-6, 45e-6, 45e-6, 30e-6, 30e-6), 0.4),
    "link_efficiency": Prior(0.80, 0.1),
    "link_start": Prior(30e-6, 0.3),
    "nvls": Prior((1e-3, 1e-3, 0.58, 0.58, 0.58), 0.15),  # 480 GB/s of bus bandwidth on eight H100; none before
    "nic_efficiency": Prior(0.80, 0.2),
    "slowdown": Prior(0.30, 0.5),
    "tensor_overlap": Prior((1e-3, 1e-3, 0.4, 0.4, 0.4), 0.3),  # overlapped in the code of Hopper and later
}
SHARES = ("link_efficiency", "nic_efficiency", "nvls")  # at most 1


class Rows(NamedTuple):
    """Measured rows of a table that are predicted together."""

    kind: str
    plans: list[Plan]
    numbers: Any  # columns of steps, operations of kernels, or kinds and bytes of collectives
    network: Network | None
    groups: Array
    parts: Array  # of a source, each of which weighs as much as a source of steps: operations of kernels, devices of collectives
    folds: Array  # one of FOLDS for every row, the same for rows that differ only in what was measured
    measured: Array
    table: str

    def of(self, which: Array) -> "Rows":
        """The rows where `which` holds."""
        index = np.flatnonzero(which)
        plans, network = [self.plans[i] for i in index], None
        if self.kind == "step_time" and plans:
            numbers, network = replay.arrays(plans, self.numbers.frozen[index])
        else:
            numbers = [self.numbers[i] for i in index] if plans else []
            network = Network(plans, device_of(plans)) if self.network is not None and plans else None
        kept = {name: getattr(self, name)[index] for name in ("groups", "parts", "folds", "measured")}
        return self._replace(plans=plans, numbers=numbers, network=network, **kept)

    def predicted(self, values: Mapping[str, float]) -> Array:
        """Seconds of every row with these parameters."""
        return self.told(values)[0]

    def told(self, values: Mapping[str, float]) -> tuple[Array, Array]:
        """Seconds of every row with these parameters, and the standard deviation of their logarithm."""
        device = device_of(self.plans, values)
        if self.network is None:
            return alone.alone(device, self.numbers), device["error"]
        network = self.network.under(device)
        if self.kind == "collectives":
            kinds, sizes = zip(*self.numbers, strict=True)
            return alone.together(network, list(kinds), np.array(sizes)), device["error"]
        steps = predict(self.numbers, device, network)
        return steps.step_time, steps.error


class Solved(NamedTuple):
    """Parameters of a family, the standard errors of their logarithms, and the names of those that rows speak of."""

    values: dict[str, float]
    errors: dict[str, float]
    fitted: list[str]


def fit(options: Mapping[str, str]) -> int:
    """Fit every family that the tables speak of, and print the parameters and the errors on rows left out.

    Raises Refused for tables of which no row can be fitted.
    """
    if not options["tables"]:
        raise Refused("tables= names no file; write foretold analysis fit tables=FILE,FILE")
    sets = [rows_of(Path(name)) for name in options["tables"].split(",")]
    found, left = [], list[pd.DataFrame]()
    for family, gpus in FAMILIES.items():
        mine = [rows.of(np.array([plan.gpu.name in gpus for plan in rows.plans])) for rows in sets]
        mine = [rows for rows in mine if rows.plans]
        if mine:
            best = solved(family, mine)
            found += [(family, name, best.values[name], best.errors[name], name in best.fitted) for name in PRIORS]
            left += [*_left_out(family, mine, best), *_folded(family, mine, best)]
    parameters = pd.DataFrame(found, columns=["family", "parameter", "value", "standard_error", "fitted"])
    lines = [(f, n, f"{v:.4g}", f"{e:.2f}" if known else "prior") for f, n, v, e, known in found]
    print("\n".join(aligned([("family", "parameter", "value", "± relative"), *lines])))
    print("\n".join(_told(pd.concat(left, ignore_index=True))))
    if options["out"]:
        write(Path(options["out"]), parameters.to_csv(index=False))
    return 0


def rows_of(path: Path) -> Rows:
    """The rows of a table that can be predicted.

    Raises Refused for a file that is no such table.
    """
    frame = read(path)
    name = recognise(frame, str(path))
    column = KINDS[name].measured
    measured = pd.to_numeric(frame[column], errors="coerce")
    frame, measured = frame[measured > 0], measured[measured > 0]
    folds = np.array([crc32(key.encode()) % FOLDS for key in _keys(frame, column)])
    groups, seconds, numbers, network = frame["group"].to_numpy(), measured.to_numpy(), list[Any](), None
    if name == "step_time":
        plans, frozen, index = replay.plans_of(frame)
        kept = frame.index.get_indexer(pd.Index(index))
        numbers, network = replay.arrays(plans, frozen)
        groups, folds, seconds = groups[kept], folds[kept], seconds[kept]
        parts = groups
    elif name == "collectives":
        told = [alone.collective(row) for row in records(frame)]
        plans, numbers = [plan for plan, _, _ in told], [(kind, size) for _, kind, size in told]
        network, groups, seconds = Network(plans, device_of(plans)), "collectives " + groups, seconds * 1e-6
        parts = groups + np.array([f", {plan.ranks}" for plan in plans])
    else:
        rows = records(frame)
        plans, numbers = [alone.kernel_plan(row) for row in rows], [alone.kernel(row) for row in rows]
        done = np.array([kernel.flops / (float(row["peak_tflops"]) * 1e12) for kernel, row in zip(numbers, rows, strict=True)])
        groups, seconds = "kernels " + groups, done / seconds
        parts = groups + " " + frame["op"].to_numpy()
    return Rows(name, plans, numbers, network, np.asarray(groups), np.asarray(parts), folds, np.asarray(seconds), path.stem)


def _keys(frame: pd.DataFrame, measured: str) -> list[str]:
    """What a row says besides its measurement and its number."""
    said = frame.drop(columns=[name for name in (measured, "id", "busbw_GBps", "time_us") if name in frame])
    return ["|".join(map(str, row)) for row in said.itertuples(index=False)]


def solved(family: str, sets: list[Rows], start: Mapping[str, float] | None = None) -> Solved:
    """The parameters of a family. One of which rows say less than a tenth of what its prior says keeps the prior."""
    centre = np.log(list(_prior(family).values()))
    width = np.array([prior.width for prior in PRIORS.values()])
    most = np.array([0.0 if name in SHARES else np.inf for name in PRIORS])
    weights = [_weights(rows.parts) for rows in sets]

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

    first = np.minimum(centre if start is None else np.log([start[name] for name in PRIORS]), most - 1e-6)
    free = np.flatnonzero(np.sum(slopes(first)[: -len(width)] ** 2, axis=0) * width**2 > 0.1)

    def whole(x: Array) -> Array:
        full = centre.copy()
        full[free] = x
        return full

    bounds = (np.full(len(free), -np.inf), most[free])

    def misses(x: Array) -> Array:
        return residuals(whole(x))

    def partial(x: Array) -> Array:
        return np.asarray(slopes(whole(x))[:, free])

    result = least_squares(misses, first[free], partial, bounds, xtol=1e-3, ftol=1e-3, max_nfev=12)
    slope, error = partial(result.x), width.copy()
    error[free] = np.sqrt(np.diag(np.linalg.inv(slope.T @ slope)))
    names = list(PRIORS)
    values = dict(zip(names, np.exp(whole(result.x)).tolist(), strict=True))
    return Solved(values, dict(zip(names, error.tolist(), strict=True)), [names[i] for i in free])


def _left_out(family: str, sets: list[Rows], best: Solved) -> Iterator[pd.DataFrame]:
    """The rows of every source predicted with the parameters of the others."""
    for group in sorted({str(group) for rows in sets for group in rows.groups}):
        out = [rows.groups == group for rows in sets]
        yield from _without(family, f"{family} {group}", "", sets, out, best)


def _folded(family: str, sets: list[Rows], best: Solved) -> Iterator[pd.DataFrame]:
    """Every fifth of a table of kernels or collectives predicted with the parameters of the other rows."""
    for mine in sets:
        for fold in range(FOLDS if mine.kind != "step_time" else 0):
            out = [(rows.folds == fold) & (rows is mine) for rows in sets]
            yield from _without(family, f"{family} {mine.table}, {FOLDS}-fold", f", {FOLDS}-fold", sets, out, best)


def _without(family: str, name: str, how: str, sets: list[Rows], out: list[Array], best: Solved) -> Iterator[pd.DataFrame]:
    """Errors of some rows with the parameters of the others, and the half widths of their bands."""
    others = [kept for rows, which in zip(sets, out, strict=True) if (kept := rows.of(np.logical_not(which))).plans]
    values = solved(family, others, best.values).values if others else _prior(family)
    for rows in (gone for rows, which in zip(sets, out, strict=True) if (gone := rows.of(which)).plans):
        mixed = [rows.kind == "step_time" and plan.model.moe.experts for plan in rows.plans]
        kinds = [f"{rows.table}{', mixtures' if some else ''}{how}" for some in mixed]
        seconds, deviation = rows.told(values)
        wide, error = BAND * deviation, seconds / rows.measured
        error = (1 / error if rows.kind == "kernel_efficiency" else error) - 1  # as tables tell them: of efficiencies, or of times
        yield pd.DataFrame({"name": name, "kind": kinds, "error": error, "wide": wide, "fitted": len(best.fitted)})


def _told(left: pd.DataFrame) -> Iterator[str]:
    """Errors on rows left out, of each source or table and together, beside the number of parameters fitted for a GPU family."""
    head = ("left out", "rows", "mean %", "median %", "95th pct", "bias %", "80% band", "fitted")
    parts = {str(name): part for name, part in left.groupby("name", sort=False)}
    parts |= {f"all of {kind}": part for kind, part in left.groupby("kind")}
    yield ""
    lines = []
    for name, part in parts.items():
        size, held = 100 * part["error"].abs(), np.log1p(part["error"]).abs() <= part["wide"]
        figures = [f"{figure:.1f}" for figure in (size.mean(), size.median(), size.quantile(0.95))]
        lines.append(
            (name, str(len(part)), *figures, f"{100 * part['error'].mean():+.1f}", f"{held.mean():.0%}", str(part["fitted"].max()))
        )
    yield from aligned([head, *lines])


def _prior(family: str) -> dict[str, float]:
    place = list(FAMILIES).index(family)
    return {name: prior.centre[place] if isinstance(prior.centre, tuple) else prior.centre for name, prior in PRIORS.items()}


def _weights(groups: Array) -> Array:
    """1 for rows of a source of at most FULL, less for each of a larger one."""
    sizes = pd.Series(groups).groupby(groups).transform("size").to_numpy()
    return np.asarray(np.minimum(1.0, np.sqrt(FULL / sizes)))
