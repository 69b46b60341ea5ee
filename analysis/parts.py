"""The block of a GPU's file in conf/gpu that a calibration gives, with where each number comes from, and that of its near relative.

Where two parts have the same processor, their fractions of peaks and bandwidths are the same; what differs (memory, its bandwidth, the
limits) stays as the relative's own file has it. The relative itself was not measured, and the block says so.
"""

from collections.abc import Mapping

from analysis.calibrate import Rows
from analysis.tiles import LEAST
from conf.plan import Plan
from conf.profile import Parameter
from conf.units import show

RELATIVES = {"h200-sxm": "h100-sxm"}  # the same processor with other memory
# Of this trainer, its host and this part: tables have those of others.
OWN = ("host_launch", "decode_host", "decode_block", "decode_keys", "snapshot", "idle_power", "eager_attention")


def blocks(plan: Plan, parameters: Mapping[str, Parameter], rows: Rows, day: str) -> str:
    """YAML: of each part the numbers of its table, and the shares of conf/power."""
    name, how = plan.gpu.name, f"measured on one {plan.gpu.name}, fitted on {day}"
    found = _table(plan, parameters)
    power = {key.removeprefix("power."): p for key, p in parameters.items() if key.startswith("power.")}
    lines = [f"# foretold analysis calibrate: {len([row for row in rows if row['time_us']])} operations {how}"]
    lines += [f"{name}:", *_lines(found | _idle(parameters), how), *_ranges(rows, how)]
    if relative := RELATIVES.get(name):
        lines += [f"{relative}:  # not measured: the same processor, whose shares of its own peaks and bandwidth these are"]
        lines += _lines(found, f"{how}, the same processor")
    return "\n".join([*lines, *(["power:", *_lines(power, how)] if power else [])]) + "\n"


def _table(plan: Plan, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Numbers of the device's table. The best attention kernel that was measured is the table's, and torch's is a share of it."""
    found = {name: p for name, p in parameters.items() if name in plan.gpu.__dataclass_fields__ and name not in OWN}
    if {"cudnn.attention_efficiency", "cudnn.attention_backward"} <= parameters.keys():
        shares = [parameters[name].value / parameters[f"cudnn.{name}"].value for name in ("attention_efficiency", "attention_backward")]
        share = (shares[0] * shares[1] ** 2.5) ** (1 / 3.5)  # weighed by their arithmetic
        error = abs(shares[0] - shares[1]) / 2
        found |= {name: parameters[f"cudnn.{name}"] for name in ("attention_efficiency", "attention_backward")}
        found["eager_attention"] = Parameter(min(1.0, share), "1", error)
    return found


def _idle(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    return {"idle_power": parameters["idle_power"]} if "idle_power" in parameters else {}


def _lines(found: Mapping[str, Parameter], how: str) -> list[str]:
    lines = []
    for name, p in found.items():
        error = f", ± {p.standard_error / p.value:.1%}" if p.standard_error and p.value else ""
        number = f"{p.value:.3g}" if p.unit == "1" else show(p.value, p.unit)
        lines.append(f"  {name + ': ' + number:28}  # {how}{error}")
    return lines


def _ranges(rows: Rows, how: str) -> list[str]:
    """Least and most of what was measured and fitted, by the names that sim.kernels.beyond asks for."""
    sizes: dict[str, list[int]] = {}
    for row in (row for row in rows if row["time_us"]):
        if row["op"] == "matmul" and min(int(row[name]) for name in "mnk") >= LEAST:
            for name in "mnk":
                sizes.setdefault(name, []).append(int(row[name]))
        if row["op"] == "grouped":
            sizes.setdefault("expert", []).append(int(row["m"]) // int(row["batch"]))
        if row["op"] == "attention":
            sizes.setdefault("seq", []).append(int(row["seq"]))
            sizes.setdefault("head", []).append(int(row["qk_head_dim"]))
    text = ", ".join(f"{name}: [{min(found)}, {max(found)}]" for name, found in sizes.items())
    return [f"  calibrated: {{{text}}}  # {how}"] if sizes else []
