"""Rows of measured tables: what they name, and what is told of those that can be predicted."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from conf.plan import Plan
from conf.program import load
from sim.kernels import Device, rates

# Name of the part, as a pattern, and its group options; servers as their maker ships them. The first that matches holds.
PARTS = (
    ("GB300", "gb300", "gb300_nvl72"), ("GB200", "gb200", "gb200_nvl72"), ("GH200", "gh200", "dgx_h100"),
    ("B300", "b300", "dgx_b300"), ("P6-B200", "b200", "aws_p6"), ("B200", "b200", "dgx_b200"), ("H200", "h200_sxm", "dgx_h100"),
    ("H800", "h800", "deepseek_h800"), ("H100.*PCI", "h100_pcie", "dgx_h100"), ("H100.*96 ?GB", "h100_96", "dgx_h100"),
    ("H100", "h100_sxm", "dgx_h100"), ("A100.*40", "a100_40", "dgx_a100"), ("A100", "a100_80", "dgx_a100"),
    ("V100.*DGX-2", "v100_sxm", "dgx2_v100"), ("V100", "v100_sxm", "dgx_v100"), ("L40S", "l40s", "l40s_node"),
    ("A6000", "a6000", "one_gpu"), ("4090", "rtx4090", "one_gpu"),
    ("MI250", "mi250x", "mi250x_node"), ("MI325", "mi325x", "mi300x_node"), ("MI355", "mi355x", "mi300x_node"),
    ("MI300", "mi300x", "mi300x_node"), ("v5e", "tpu_v5e", "tpu_v5e_pod"), ("v5p", "tpu_v5p", "tpu_v5p_pod"),
    ("v6e|Trillium", "tpu_v6e", "tpu_v6e_pod"), ("TPU.*v4", "tpu_v4", "tpu_v4_pod"), ("TPU.*v3", "tpu_v3", "tpu_v3_pod"),
)  # fmt: skip


class Replayed(NamedTuple):
    """Predicted rows under the table's index (predicted, spread, ideal, class, kind, and memory where there is any), and the
    reasons of the others."""

    rows: pd.DataFrame
    failed: dict[Any, str]


class Unplayable(ValueError):
    """A row that says something no plan can say; the text is the reason."""


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as mappings."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def each(frame: pd.DataFrame, of: Callable[[Mapping[str, Any]], Any]) -> tuple[dict[Any, Any], dict[Any, str]]:
    found, failed = {}, {}
    for index, row in zip(frame.index, records(frame), strict=True):
        try:
            found[index] = of(row)
        except Unplayable as error:
            failed[index] = str(error)
    return found, failed


def tabled(index: Any, predicted: Any, spread: Any, ideal: Any, classes: Any, kinds: Any) -> pd.DataFrame:
    return pd.DataFrame({"predicted": predicted, "spread": spread, "ideal": ideal, "class": classes, "kind": kinds}, index=index)


def part_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """The options of gpu and cluster for a row."""
    for pattern, gpu, cluster in PARTS:
        if re.search(pattern, str(row["gpu"]), re.IGNORECASE):
            return gpu, cluster
    raise Unplayable(f"gpu={row['gpu']} is not in conf/gpu")


@cache
def base_of(gpu: str, cluster: str) -> Plan:
    return load(
        [f"gpu={gpu}", f"cluster={cluster}", "cluster.nodes=1", "cluster.spares=0", "train.global_batch=5040", "train.micro_batch=1"]
    )


def word(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None or pd.isna(value) else str(value)


def count(row: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of a row, which may be blank only where there is a default."""
    value = row.get(name)
    if value is None or pd.isna(value):
        if default is None:
            raise Unplayable(f"{name} is blank")
        return default
    try:
        number = int(float(value))
    except (TypeError, ValueError):
        raise Unplayable(f"{name}={value} is no number") from None
    if number < (1 if default is None else 0):
        raise Unplayable(f"{name}={value} must be above 0")
    return number


def device_of(plans: list[Plan], changes: Mapping[str, float] | None = None) -> Device:
    """The rates of plans, with some numbers of their gpus changed; each different one is worked out once."""
    keys = [(plan.gpu.name, plan.train.precision, plan.train.compile, plan.power.cap, plan.gpu.early) for plan in plans]
    distinct = dict(zip(keys, plans, strict=True))
    order = {key: place for place, key in enumerate(distinct)}
    changed = [plan.but(gpu=plan.gpu.but(**changes)) if changes else plan for plan in distinct.values()]
    return Device([rates(plan) for plan in changed]).take(np.array([order[key] for key in keys]))
