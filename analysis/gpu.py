"""A GPU's measured operations → the numbers of its table in conf/gpu, with their standard errors.

Products, attention and streaming kernels are fitted together (tiles.py), all else kind by kind: launches, the trainer's eager kernels,
the optimizer, copies, checkpoints, power.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from analysis.calibrate import Rows, _as, _by, _inverse, _work, line, lines, roofline, storage
from analysis.tiles import Flags, groups_of, overhead, predicted, seconds_of, solved
from conf.plan import Mla, Moe, Plan
from conf.profile import Parameter
from sim.kernels import KINDS, Array, Device, given
from sim.parallel import block_work, calls, columns
from sim.rollout import cached, weights


class Score(NamedTuple):
    rows: int
    median: float  # of |predicted / measured - 1| in percent
    mean: float


def fit(plan: Plan, rows: Rows) -> tuple[dict[str, Parameter], dict[str, float]]:
    """The parameters of which the rows speak, and the median error in percent of each kind on the rows that it was fitted to."""
    rows = [row for row in rows if row["time_us"]]
    parameters = _launches(plan, rows)
    base = {"launch": parameters["launch"]} if "launch" in parameters else {}
    groups = list(groups_of(rows))
    found = solved(plan, groups, base)
    report = {same.kind: _median(same.seconds, predicted(plan, same, found | base), same.kept) for same in groups if same.kept.any()}
    moved, others = _moved(plan, rows, found | base)
    parameters |= found | moved | _chosen(plan, rows, found | base) | _updates(rows, report) | _copies(rows) | _power(plan, rows)
    parameters |= _decoded(plan, rows, found | base, report)
    parameters |= storage(_by(rows, "op", "stage"), report)
    if "attention_efficiency" in found:
        parameters["eager_attention"] = Parameter(1.0, "1")  # the trainer's own kernel was measured: no other is slower than it
    return parameters, report | others


def held_out(plan: Plan, rows: Rows, parameters: Mapping[str, Parameter]) -> dict[str, Score]:
    """Errors on the products that took no part in the fit, by precision, layout and alignment, on those that are too thin for it, and on
    whole blocks, of which none did."""
    parts: dict[str, list[Array]] = {}
    rows = [row for row in rows if row["time_us"]]
    for row in (row for row in rows if row["op"] == "block"):
        p, own = _block(plan, row)
        device = Device([given(own, parameters)])
        told = sum(float(device.seconds(work)[0]) for work in block_work(p, row["stage"]))
        parts.setdefault(f"block, {row['stage']}", []).append(np.abs(told / seconds_of([row], overhead(rows)) - 1))
    for group in groups_of(rows):
        if group.kind.startswith("matmul"):
            error = np.abs(predicted(plan, group, parameters) / group.seconds - 1)
            held = ~group.kept & ~group.thin
            for name, which in (("all", held), (group.precision, held), (group.kind.split(".")[1], held), ("odd", held & group.odd),
                                ("thin, in no part", group.thin)):  # fmt: skip
                parts.setdefault(name, []).append(error[which])
    whole = {name: np.concatenate(errors) * 100 for name, errors in parts.items()}
    return {name: Score(len(e), float(np.median(e)), float(np.mean(e))) for name, e in sorted(whole.items()) if len(e)}


def _launches(plan: Plan, rows: Rows) -> dict[str, Parameter]:
    """The gap between kernels, and the host's time for each kernel that the step model counts in a block."""
    found = {}
    for row in rows:
        if (row["op"], row["stage"]) == ("launch", "queued"):
            seconds = float(row["time_us"]) * 1e-6
            found["launch"] = Parameter(seconds, "s", seconds * float(row["cv"] or 0))
    each = [float(row["time_us"]) * 1e-6 / _counted(plan, row) for row in rows if row["op"] == "host"]
    if each:
        found["host_launch"] = Parameter(float(np.mean(each)), "s", float(np.std(each) / max(1, len(each) - 1) ** 0.5))
    return found


def _counted(plan: Plan, row: Mapping[str, str]) -> float:
    """Kernels of a block's pass as the step model counts them."""
    p, _ = _block(plan, row)
    return float(np.ravel(calls(p, block_work(p, row["stage"])))[0])


def _block(plan: Plan, row: Mapping[str, str]) -> tuple[Any, Plan]:
    """The plan of a measured block, in eager code, and its columns."""
    sizes = {"hidden": int(row["k"]), "heads": int(row["heads"]), "kv_heads": int(row["kv_heads"]), "ffn": int(row["n"]), "layers": 1}
    model = plan.model.but(moe=Moe(), mla=Mla(), head=None, gated=True, positions="rope", layer_norm=False, qk_norm=False, mtp=0, **sizes)
    own = {"compile": False, "precision": "bf16", "micro_batch": int(row["batch"]), "seq_len": int(row["seq"])}
    one = plan.but(model=model, **{f"train.{name}": value for name, value in own.items()}, **{"mesh.tp": 1, "mesh.cp": 1})
    return columns([one]), one


def _moved(plan: Plan, rows: Rows, found: Mapping[str, Parameter]) -> tuple[dict[str, Parameter], dict[str, float]]:
    """Bandwidths of the trainer's eager kernels, each kind by itself: the passes over memory that the step model counts, in their time."""
    launch, lost = found["launch"].value if "launch" in found else plan.gpu.launch, overhead(rows)
    parameters, report = {}, {}
    for kind, same in _by(rows, "op", "stage").items():
        if kind not in KINDS or kind.startswith(("matmul", "attention", "optimizer")):
            continue
        work = [_work(kind, row, 2.0) for row in same]
        size = [float(w.bytes) for w in work]
        if not any(size):
            continue
        base = np.array([w.launches * launch for w in work])
        (_, bandwidth), report[kind] = roofline([0.0] * len(size), size, base, seconds_of(same, lost), 0.0)
        parameters[f"{kind}.bandwidth"] = _inverse(bandwidth, "B/s")
    return parameters, report


def _chosen(plan: Plan, rows: Rows, found: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """What the rate of cuDNN's attention is of a large product's: for the table, since the trainer leaves the choice to torch."""
    parameters = {}
    for name, stage in (("attention_efficiency", "forward"), ("attention_backward", "backward")):
        same = [row for row in rows if (row["op"], row["stage"], row["how"]) == ("attention", stage, "cudnn")]
        if same and name in found:
            plain = next(groups_of([row | {"how": ""} for row in same]))
            ratio = predicted(plan, plain, found) / seconds_of(same, overhead(rows))
            value = found[name].value * float(np.median(ratio))
            parameters[f"cudnn.{name}"] = Parameter(value, "1", value * float(np.std(np.log(ratio))) / len(same) ** 0.5)
    return parameters


def _updates(rows: Rows, report: dict[str, float]) -> dict[str, Parameter]:
    """Clipping and AdamW: something for a tensor, and eight passes over its numbers in fp32."""
    same = [row for row in rows if row["op"] == "optimizer"]
    if len(same) < 2:
        return {}
    tensors, size = [int(row["m"]) for row in same], [8 * 4 * int(row["k"]) for row in same]
    (tensor, byte), report["optimizer"] = line(tensors, size, [float(row["time_us"]) * 1e-6 for row in same])
    return {"optimizer_tensor": _as(tensor, "s"), "optimizer.step.bandwidth": _inverse(byte, "B/s")}


def _decoded(plan: Plan, rows: Rows, found: Mapping[str, Parameter], report: dict[str, float]) -> dict[str, Parameter]:
    """The host's time of a decode step and in each of its blocks, and the rate at which keys and values are read: what a step takes
    beyond its weights (sim/rollout.py)."""
    same, device = [row for row in rows if row["op"] == "decode"], Device([given(plan, found)])
    if len(same) < 6:
        return {}
    beyond, parts = [], []
    for row in same:
        one, count = _served(plan, row), float(row["batch"])
        beyond.append(float(weights(one, device, np.array([count]))[0]))
        parts.append([1.0, float(row["m"]), count * float(row["seq"]) * cached(one) / float(device["bandwidth.attention.forward"][0])])
    (host, block, read), report["decode"] = lines(list(zip(*parts, strict=True)), [float(r["time_us"]) * 1e-6 for r in same], beyond)
    return {"decode_host": _as(host, "s"), "decode_block": _as(block, "s"), "decode_keys": _inverse(read, "1")}


SERVED = {"layers": "m", "hidden": "k", "heads": "heads", "kv_heads": "kv_heads", "ffn": "n"}


def _served(plan: Plan, row: Mapping[str, str]) -> Plan:
    """The plan of a measured decode step."""
    sizes = {
        "layers": int(row["m"]),
        "hidden": int(row["k"]),
        "heads": int(row["heads"]),
        "kv_heads": int(row["kv_heads"]),
        "ffn": int(row["n"]),
    }
    return plan.but(model=plan.model.but(moe=Moe(), mla=Mla(), head=None, **sizes), **{"train.precision": "bf16", "align.engine_tp": 1})


def _copies(rows: Rows) -> dict[str, Parameter]:
    """Rates of the largest copy of each kind; a checkpoint beside the training takes the state aside into pageable memory."""
    largest: dict[str, tuple[float, float, float]] = {}
    for row in rows:
        if row["op"] == "copy":
            size, seconds, name = float(row["bytes"]), float(row["time_us"]) * 1e-6, f"{row['stage']}.{row['how']}"
            largest[name] = max(largest.get(name, (0.0, 0.0, 0.0)), (size, size / seconds, float(row["cv"] or 0)))
    found = {name: Parameter(rate, "B/s", rate * cv) for name, (_, rate, cv) in largest.items()}
    return found | ({"snapshot": found["to_host.pageable"]} if "to_host.pageable" in found else {})


def _power(plan: Plan, rows: Rows) -> dict[str, Parameter]:
    """Watts of the idle device, and of each phase as a share of the way from there to its limit."""
    watts = {row["stage"]: float(row["watts"]) for row in rows if row["op"] == "power" and row["watts"]}
    if "idle" not in watts:
        return {}
    room = plan.gpu.max_power - watts["idle"]
    phases = {"products": "compute", "copies": "memory", "spinning": "hang", "waiting": "bubble"}
    shares = {f"power.{key}": (watts[phase] - watts["idle"]) / room for phase, key in phases.items() if phase in watts}
    return {"idle_power": Parameter(watts["idle"], "W")} | {
        name: Parameter(max(0.0, share if name == "power.compute" else min(1.0, share)), "1") for name, share in shares.items()
    }


def _median(measured: Array, told: Array, which: Flags) -> float:
    return float(np.median(np.abs(told / measured - 1)[which]) * 100)
