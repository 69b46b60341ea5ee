"""The options of the plan: every file loads, every number has a source, and what several files say agrees."""

import csv
from calendar import monthrange
from datetime import date
from typing import Any

import pytest
import yaml

from conf.node import build, leaves
from conf.schema import HERE, choices, comments, groups, rows
from tests.conftest import SHARED

OPTIONS = [(group, option) for group in groups() for option in choices(group)]
SOURCED = [(group, option) for group, option in OPTIONS if group in ("gpu", "cluster", "power", "price", "failures", "grid")]
PARTS = {  # option of gpu: row of hardware.csv
    "v100_sxm": "V100-SXM2-32GB",
    "a100_40": "A100-SXM-40GB",
    "a100_80": "A100-SXM-80GB",
    "h100_pcie": "H100-PCIe-80GB",
    "h100_sxm": "H100-SXM-80GB",
    "h800": "H800-SXM-80GB",
    "h200_sxm": "H200-SXM-141GB",
    "b200": "B200-SXM-180GB",
    "gb200": "GB200-NVL72 (per GPU)",
    "b300": "B300-SXM-288GB",
    "gb300": "GB300-NVL72 (per GPU)",
    "mi300x": "MI300X",
    "tpu_v4": "TPUv4",
}
COLUMNS = {  # key of gpu: column of hardware.csv and its unit
    "fp32_peak": ("tf32_dense_tflops", 1e12),
    "bf16_peak": ("bf16_dense_tflops", 1e12),
    "fp16_peak": ("fp16_dense_tflops", 1e12),
    "fp8_peak": ("fp8_dense_tflops", 1e12),
    "memory_bandwidth": ("mem_bw_GBps", 1e9),
    "link_bandwidth": ("nvlink_GBps_per_dir_per_gpu", 8e9),
    "max_power": ("max_power_W", 1.0),
}


def read(group: str, option: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((HERE / group / f"{option}.yaml").read_text())
    return values


def node(group: str, option: str) -> Any:
    problems: list[str] = []
    built = build(groups()[group], read(group, option), group, problems)
    assert problems == []
    return built


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_loads(group: str, option: str) -> None:
    assert node(group, option) is not None


@pytest.mark.parametrize(("group", "option"), SOURCED)
def test_every_number_has_a_source(group: str, option: str) -> None:
    notes, source = comments(HERE / group / f"{option}.yaml"), read(group, option)["source"]
    numbers = [key for key, value, _ in leaves(node(group, option)) if not isinstance(value, str | None)]
    assert [key for key in numbers if not (notes.get(key) or source)] == []
    assert [row.name for row in rows(group, option) if row.default is not None and not row.source] == []


@pytest.mark.parametrize("option", choices("gpu"))
def test_every_device_has_a_price_and_embodied_carbon(option: str) -> None:
    price, name = node("price", "surveys_2026_06"), node("gpu", option).name
    assert name in price.gpu_hours
    assert price.embodied[name] > 0


@pytest.mark.parametrize("option", choices("price"))
def test_prices_are_dated_and_ordered(option: str) -> None:
    price = node("price", option)
    assert date.fromisoformat(price.as_of)
    assert [name for name, offer in price.gpu_hours.items() if not 0 < offer.low <= offer.mid <= offer.high] == []
    assert price.gpu_hours.keys() == price.embodied.keys()


@pytest.mark.parametrize("option", [o for o in choices("grid") if read("grid", o)["profile"]])
def test_a_profile_is_12_by_24_around_1(option: str) -> None:
    grid = node("grid", option)
    assert [len(hours) for hours in grid.profile] == [24] * 12
    days = [monthrange(grid.year, month)[1] for month in range(1, 13)]
    mean = sum(d * sum(hours) / 24 for d, hours in zip(days, grid.profile, strict=True)) / sum(days)
    assert mean == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("option", PARTS)
def test_devices_agree_with_the_table_of_hardware(option: str) -> None:
    path = SHARED / "validation" / "hardware.csv"
    if not path.exists():
        pytest.skip("../shared/validation/hardware.csv is not here")
    with path.open() as text:
        row = next(row for row in csv.DictReader(text) if row["gpu"] == PARTS[option])
    gpu = node("gpu", option)
    off = {
        key: (getattr(gpu, key), row[column])
        for key, (column, unit) in COLUMNS.items()
        if row[column] and getattr(gpu, key) != pytest.approx(float(row[column]) * unit, rel=0.03)
    }
    assert off == {}
