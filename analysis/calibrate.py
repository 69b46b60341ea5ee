"""Calibrate: raw measurements of a machine → a profile of few physical rates, which a plan names.

Each kind of operation is fitted alone with the simulator's own formula (sim.kernels), on logarithms of time, with a
robust loss, so that a shape hit by another process does not bend the rest. The plan's own step is never looked at.
"""

import csv
import json
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from conf.profile import Parameter, Profile, profile_yaml
from conf.program import from_yaml
from conf.record import read
from conf.units import show
from sim.kernels import COLLECTIVES, Device, Work, attention, given, matmul, moved
from sim.parallel import block_work, columns

if TYPE_CHECKING:
    from analysis.gpu import Score

OPTIONS = {
    "runs": ("runs", "folder of the records; the newest measurement in it is used"),
    "out": ("runs/profile.yaml", "file of the profile"),
    "json": ("false", "print the profile as JSON and nothing else"),
}
Rows = list[dict[str, str]]
GPU = "gpu.csv"  # what real/gpu.py measures


def calibrate(options: Mapping[str, str]) -> int:
    """Fit the newest measurement under `runs` and write the profile."""
    folder = newest(Path(options["runs"]))
    plan = from_yaml(folder / "plan.yaml")
    parameters, report = fit(plan, folder)
    held = held_out(plan, folder, parameters)
    name, machine = f"{plan.gpu.name}, {plan.ranks} ranks", f"{platform.machine()} {platform.system()}"
    profile = Profile(name, machine, datetime.now(UTC).date().isoformat(),
                      plan.train.precision, plan.ranks, parameters)  # fmt: skip
    out = Path(options["out"])
    write(out, profile_yaml(profile))
    if held:
        write(out.with_suffix(".gpu.yaml"), _blocks(plan, folder, profile))
    if options["json"] == "true":
        told = {"profile": str(out), "parameters": {n: vars(p) for n, p in parameters.items()}, "error_pct": report}
        print(json.dumps(told | ({"held_out": {name: score._asdict() for name, score in held.items()}} if held else {})))
        return 0
    print(f"{len(parameters)} rates of {profile.name}, from {folder}")
    for name, p in parameters.items():
        error = f"± {p.standard_error / p.value:.0%}" if p.standard_error and np.isfinite(p.value) else ""
        print(f"  {name:32} {show(p.value, p.unit):>14} {error}")
    print("\nmedian error of the fit on its own rows")
    for kind, value in report.items():
        print(f"  {kind:32} {value:5.1f} %")
    if held:
        print("\nerror on products that took no part in the fit" + 15 * " " + "rows   median     mean")
        for name, score in held.items():
            print(f"  {name:55} {score.rows:6} {score.median:7.1f} % {score.mean:6.1f} %")
        print(f"\nblocks for conf/gpu and conf/power: {out.with_suffix('.gpu.yaml')}")
    print(f"\nprofile: {out}\nnext: foretold sim profile={out}")
    return 0


def newest(runs: Path) -> Path:
    found = sorted((p.parent for p in runs.glob("*/measure/*.csv")), key=lambda p: p.stat().st_mtime)
    if not found:
        raise Refused(f"runs={runs} holds no measurement of a machine; make one with: foretold real only=kernels,network")
    return found[-1]


def table(path: Path) -> Rows:
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def fit(plan: Plan, folder: Path) -> tuple[dict[str, Parameter], dict[str, float]]:
    """All parameters that the record's tables determine, and the median error in percent of each fit."""
    if (folder / GPU).is_file():
        from analysis import gpu

        parameters, report = gpu.fit(plan, table(folder / GPU))
    else:
        parameters, report = _kernels(plan, table(folder / "kernels.csv"))
    for kind, rows in _by(table(folder / "network.csv"), "op").items():
        if kind in COLLECTIVES:
            ring = 2 if kind == "all_reduce" else 1
            hops = [1 if kind == "all_to_all" else ring * (int(r["ranks"]) - 1) for r in rows]
            share = [ring * (int(r["ranks"]) - 1) / int(r["ranks"]) * int(r["bytes"]) for r in rows]
        else:
            hops, share = [1 for _ in rows], [int(r["bytes"]) for r in rows]
        (latency, bandwidth), error = line(hops, share, [float(r["time_us"]) * 1e-6 for r in rows])
        parameters |= {f"{kind}.latency": _as(latency, "s"), f"{kind}.bandwidth": _inverse(bandwidth, "B/s")}
        report[kind] = error
    return parameters | _data(plan, folder), report


def held_out(plan: Plan, folder: Path, parameters: Mapping[str, Parameter]) -> Mapping[str, "Score"]:
    """Errors on what took no part in the fit: of a GPU, whose products have more forms than parameters."""
    if not (folder / GPU).is_file():
        return {}
    from analysis import gpu

    return gpu.held_out(plan, table(folder / GPU), parameters)


def _blocks(plan: Plan, folder: Path, profile: Profile) -> str:
    from analysis.parts import blocks

    return blocks(plan, profile.parameters, table(folder / GPU), profile.created)


def _by(rows: Rows, *names: str) -> dict[str, Rows]:
    groups: dict[str, Rows] = defaultdict(list)
    for row in rows:
        groups[".".join(row[name] for name in names)].append(row)
    return groups


def _kernels(plan: Plan, rows: Rows) -> tuple[dict[str, Parameter], dict[str, float]]:
    groups = _by(rows, "op", "stage")
    if not groups:
        return {}, {}
    launch = float(np.median([float(r["time_us"]) for r in groups.pop("launch.forward")])) * 1e-6
    groups.pop("launch.backward")
    parameters = {"launch": Parameter(launch, "s")}
    report: dict[str, float] = {}
    size = 2 if plan.train.half else 4
    parameters |= storage(groups, report)
    blocks = groups.pop("block.forward", []) + groups.pop("block.backward", [])
    updates = groups.pop("optimizer.step", [])
    if updates:
        tensors, numbers = [int(row["m"]) for row in updates], [int(row["k"]) for row in updates]
        (tensor, byte), report["optimizer"] = line(tensors, [8 * 4 * n for n in numbers], [float(r["time_us"]) * 1e-6 for r in updates])
        parameters |= {"optimizer_tensor": _as(tensor, "s"), "optimizer.step.bandwidth": _inverse(byte, "B/s")}
    for kind, same in groups.items():
        work = [_work(kind, row, size) for row in same]
        if not work[0].flops and not work[0].bytes:
            continue  # the gradient of a sum is the gradient itself: nothing moves
        seconds = np.array([float(row["time_us"]) * 1e-6 for row in same])
        base = np.array([w.launches * launch for w in work])
        (rate, bandwidth), report[kind] = roofline([w.flops for w in work], [w.bytes for w in work], base, seconds, plan.gpu.overlap)
        if work[0].flops:
            parameters[f"{kind}.rate"] = _inverse(rate, "FLOP/s")
        parameters[f"{kind}.bandwidth"] = _inverse(bandwidth, "B/s")
    if blocks:
        found, report["block"] = _composition(plan, parameters, blocks)
        parameters |= found
        parameters["jitter"] = Parameter(float(np.median([float(row["cv"]) for row in blocks])), "1")
    return parameters, report


def storage(groups: dict[str, Rows], report: dict[str, float]) -> dict[str, Parameter]:
    """Saves and loads of checkpoints, taken out of the groups: something by itself, something a tensor, something a byte."""
    found: dict[str, Parameter] = {}
    for kind, way in (("save", "write"), ("load", "read")):
        if rows := groups.pop(f"storage.{kind}", []):
            parts = [[1.0] * len(rows), [float(r["m"]) for r in rows], [float(r["bytes"]) for r in rows]]
            (start, tensor, byte), report[f"storage.{kind}"] = lines(parts, [float(r["time_us"]) * 1e-6 for r in rows])
            found |= {f"{kind}_start": _as(start, "s"), f"{kind}_tensor": _as(tensor, "s"), f"storage_{way}": _inverse(byte, "B/s")}
    return found


def _composition(plan: Plan, parameters: Mapping[str, Parameter], rows: Rows) -> tuple[dict[str, Parameter], float]:
    """Whole blocks against the sum of their operations' fitted times: a constant and a factor."""
    device, alone = Device([given(plan, parameters)]), []
    for row in rows:
        shape = {"model.hidden": "k", "model.heads": "heads", "model.kv_heads": "kv_heads", "model.ffn": "n"}
        shape |= {"train.micro_batch": "batch", "train.seq_len": "seq"}
        one = columns([plan.but(**{key: int(row[column]) for key, column in shape.items()}, **{"mesh.tp": 1, "mesh.cp": 1})])
        alone.append(sum(float(device.seconds(work)[0]) for work in block_work(one, row["stage"])))
    (glue, factor), error = line([1.0] * len(rows), alone, [float(row["time_us"]) * 1e-6 for row in rows])
    return {"glue": _as(glue, "s"), "composition": _as(factor, "1")}, error


def _work(kind: str, row: Mapping[str, str], size: float) -> Work:
    """The simulator's own account of a measured operation."""
    op, stage = kind.split(".")
    n = {
        name: float(value)
        for name, value in row.items()
        if name in ("batch", "m", "n", "k", "seq", "heads", "kv_heads", "qk_head_dim") and value
    }
    if op == "matmul":
        return matmul(n["m"], n["n"], n["k"], size, stage)
    if op == "attention":
        return attention(n["batch"] * n["seq"], n["seq"], n["heads"] * n["qk_head_dim"], size, stage)
    if op == "loss":
        return moved(op, n["m"] * n["n"], 4.0, stage)
    return moved(op, n["m"] * n["k"], size, stage)


Estimate = tuple[float, float]  # value and standard error of a time per unit


def roofline(flops: Iterable[float], traffic: Iterable[float], base: NDArray[Any], seconds: NDArray[Any],
             overlap: float) -> tuple[tuple[Estimate, Estimate], float]:  # fmt: skip
    """Seconds per FLOP and per byte that explain the times best, and the median error in percent."""
    from scipy.optimize import least_squares

    f, b = np.array(list(flops)), np.array(list(traffic))
    start = np.log([0.5 * np.median(seconds / np.maximum(f, 1)), 0.5 * np.median(seconds / b)])
    free = f.max() > 0

    def predicted(x: NDArray[Any]) -> NDArray[Any]:
        arithmetic, memory = (f * np.exp(x[0]) if free else 0 * f), b * np.exp(x[-1])
        return np.asarray(base + arithmetic + memory - overlap * np.minimum(arithmetic, memory))

    def misses(x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.log(predicted(x) / seconds))

    x0 = start if free else start[1:]
    best = least_squares(misses, x0, loss="soft_l1", f_scale=0.1, bounds=(x0 - 7, x0 + 7))
    spread = _spread(best, len(seconds))
    values = [(float(np.exp(x)), float(np.exp(x) * s)) for x, s in zip(best.x, spread, strict=True)]
    error = float(np.median(np.abs(np.expm1(misses(best.x)))) * 100)
    return (values[0], values[-1]), error


def line(hops: Iterable[float], share: Iterable[float], seconds: Iterable[float]) -> tuple[tuple[Estimate, Estimate], float]:
    """Seconds a hop and a byte of a collective."""
    (hop, byte), error = lines([list(hops), list(share)], seconds)
    return (hop, byte), error


def lines(parts: Sequence[Sequence[float]], seconds: Iterable[float], base: Sequence[float] | float = 0.0) -> tuple[list[Estimate], float]:
    """What one of each part takes, the parts together with what is known making the times; and the median error in percent."""
    from scipy.optimize import least_squares

    units, t = np.array(parts, float), np.array(list(seconds), float)
    first = max(t.min() / units[0].max(), 1e-9)
    start = np.log([first, *((t / unit)[np.argmax(unit)] / (len(units) - 1) for unit in units[1:])])

    def misses(x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(np.log((np.asarray(base) + np.exp(x) @ units) / t))

    best = least_squares(misses, start, loss="soft_l1", f_scale=0.1)
    spread = _spread(best, len(t))
    found = [(float(np.exp(x)), float(np.exp(x) * s)) for x, s in zip(best.x, spread, strict=True)]
    return found, float(np.median(np.abs(np.expm1(misses(best.x)))) * 100)


def _spread(best: Any, rows: int) -> NDArray[Any]:
    """Standard errors of the parameters: inverse curvature times the variance left over."""
    covariance = np.linalg.pinv(best.jac.T @ best.jac)
    return np.asarray(np.sqrt(np.diag(covariance) * 2 * best.cost / max(1, rows - len(best.x))))


def _as(estimate: Estimate, unit: str) -> Parameter:
    return Parameter(estimate[0], unit, estimate[1])


def _inverse(estimate: Estimate, unit: str) -> Parameter:
    value, error = estimate
    return Parameter(1 / value, unit, error / value**2)


def _data(plan: Plan, folder: Path) -> dict[str, Parameter]:
    """Rates of the data stages and of starting, where the measurement ran them."""
    rows = read(folder, "ledger")
    told = {f"{row['stage']}.{row['quantity']}": row["value"] for row in rows}
    ends = {row["stage"]: json.loads(row["detail"]) for row in read(folder, "events") if row["event"] == "end"}
    cores = min(plan.cluster.gpus_per_node, plan.cluster.cores_per_node)
    busy = {stage: min(cores, detail.get("tasks", cores)) for stage, detail in ends.items()}
    found: dict[str, float] = {}
    start = {stage: _start(folder / stage) for stage in ("extract", "dedup", "tokens") if f"{stage}.seconds" in told}
    spent = {stage: told[f"{stage}.seconds"] - seconds for stage, seconds in start.items()}
    if "extract" in spent:
        found["extract_rate"] = told.get("extract.read", told["extract.bytes"]) / max(spent["extract"], 1e-3) / busy["extract"]
    if searched := told.get("dedup.substring_seconds", 0.0):
        spent["dedup"] -= searched
        found["substring_rate"] = told["dedup.read"] * (1 - told["dedup.removed_fraction"]) / searched / busy["dedup"]
    if "dedup" in spent and "extract.bytes" in told:
        found["dedup_rate"] = told.get("dedup.read", told["extract.bytes"]) / max(spent["dedup"], 1e-3) / busy["dedup"]
    if "tokens" in spent:
        training = told["tokens.tokenizer_seconds"]
        found["train_rate"] = min(plan.tokenizer.sample, told["tokens.bytes"]) / training / plan.cluster.cores_per_node
        found["encode_rate"] = told["tokens.bytes"] / max(spent["tokens"] - training, 1e-3) / busy["tokens"]
    parameters = {name: Parameter(value, "B/s") for name, value in found.items()}
    parameters |= {f"{'encode' if stage == 'tokens' else stage}_start": Parameter(seconds, "s") for stage, seconds in start.items()}
    for name, stage, share in (("init", "measure", 1), ("workers", "run", plan.ranks)):
        starts = [row["value"] / share for row in rows if row["quantity"] == "init" and row["stage"] == stage]
        parameters |= {name: Parameter(float(np.mean(starts)), "s")} if starts else {}
    return parameters


def _start(stage: Path) -> float:
    """Seconds by which a worker's first tasks in a stage are longer than later ones, the parts of the stage together."""
    return sum(float(json.loads(path.read_text())["facts"].get("start_seconds", 0.0)) for path in stage.rglob("manifest.json"))
