"""Calibration: rates come back out of the times that they explain, and a measured machine predicts itself."""

import csv
from pathlib import Path

import numpy as np
import pytest

from analysis.calibrate import fit, line
from conf.plan import Plan
from conf.profile import read_profile
from conf.program import load, to_yaml
from sim.kernels import attention, matmul, moved
from sim.parallel import steps

RATE, BANDWIDTH, LAUNCH = 80e9, 8e9, 4e-6
COLUMNS = ("op", "stage", "cv", "batch", "m", "n", "k", "seq", "heads", "kv_heads", "qk_head_dim", "bytes", "time_us")


def seconds(work, noise: float) -> float:
    return (work.launches * LAUNCH + work.flops / RATE + work.bytes / BANDWIDTH) * noise


def write(path: Path, rows: list[dict[str, object]], columns: tuple[str, ...]) -> None:
    with path.open("w") as out:
        table = csv.DictWriter(out, columns)
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def plan() -> Plan:
    return load(["data.path=null", "data.tokens=1000000"])


@pytest.fixture
def measured(tmp_path: Path, plan: Plan) -> Path:
    """A machine that obeys the formula, with 3% of noise and one call in twenty hit by another process."""
    dice = np.random.default_rng(0)
    rows: list[dict[str, object]] = [{"op": "launch", "stage": s, "m": 1, "k": 1, "time_us": LAUNCH * 1e6} for s in ("forward", "backward")]

    def add(shape: dict[str, int], work) -> None:
        op, stage = work.kind.split(".")
        noise = float(np.exp(0.03 * dice.standard_normal())) * (3.0 if dice.random() < 0.05 else 1.0)
        rows.append({"op": op, "stage": stage, "time_us": seconds(work, noise) * 1e6} | shape)

    for stage in ("forward", "backward"):
        for m in (256, 1024, 4096):
            for n, k in ((64, 192), (512, 192), (2048, 224), (384, 1024)):
                add({"m": m, "n": n, "k": k}, matmul(m, n, k, 4, stage))
        for batch, seq, heads in ((8, 128, 4), (4, 256, 6), (2, 512, 8), (1, 2048, 4)):
            shape = {"batch": batch, "seq": seq, "heads": heads, "kv_heads": heads, "qk_head_dim": 32}
            add(shape, attention(batch * seq, seq, heads * 32, 4, stage))
        for m in (256, 1024, 4096, 16384):
            add({"m": m, "k": 512}, moved("norm", m * 512, 4, stage))
    write(tmp_path / "kernels.csv", rows, COLUMNS)
    sizes = [4096, 65536, 1 << 20, 8 << 20]
    network = [{"op": "all_gather", "ranks": 2, "bytes": s, "time_us": (3e-4 + s / 2 / 7e8) * 1e6} for s in sizes]
    write(tmp_path / "network.csv", network, ("op", "ranks", "bytes", "time_us"))
    (tmp_path / "plan.yaml").write_text(to_yaml(plan))
    return tmp_path


def test_known_rates_come_back(measured: Path, plan: Plan) -> None:
    parameters, report = fit(plan, measured)
    for kind in ("matmul.forward", "matmul.backward"):
        assert parameters[f"{kind}.rate"].value == pytest.approx(RATE, rel=0.1)  # outliers only make slower
        assert report[kind] < 8
    for name in ("norm.forward.bandwidth", "norm.backward.bandwidth"):
        assert parameters[name].value == pytest.approx(BANDWIDTH, rel=0.08)
    assert parameters["all_gather.latency"].value == pytest.approx(3e-4, rel=1e-3)
    assert parameters["all_gather.bandwidth"].value == pytest.approx(7e8, rel=1e-3)
    assert parameters["launch"].value == pytest.approx(LAUNCH)
    assert all(p.standard_error >= 0 for p in parameters.values())


def test_a_line_is_found_exactly() -> None:
    (hop, byte), error = line([1, 1, 2, 2], [1e3, 1e6, 1e4, 1e7], [1e-4 + 1e-6, 1e-4 + 1e-3, 2e-4 + 1e-5, 2e-4 + 1e-2])
    assert hop[0] == pytest.approx(1e-4, rel=1e-6) and byte[0] == pytest.approx(1e-9, rel=1e-6) and error < 1e-3


@pytest.mark.slow
def test_a_machine_measures_itself(foretold, tmp_path: Path) -> None:
    """Two minutes at most: real operations, real collectives, a profile that a plan can name."""
    status, _, err = foretold("real", "only=kernels,network", "cluster.gpus_per_node=2")
    assert status == 0, err
    status, out, err = foretold("analysis", "calibrate")
    assert status == 0 and "matmul.forward.rate" in out, err
    found = read_profile(tmp_path / "runs" / "profile.yaml").parameters
    assert 1e9 < found["matmul.forward.rate"].value < 1e12 and 0.5 < found["composition"].value < 2
    assert {"all_gather.latency", "reduce_scatter.bandwidth", "shard_unit.latency", "jitter", "storage_write", "init"} <= found.keys()
    predicted = steps([load([f"profile={tmp_path / 'runs' / 'profile.yaml'}"])])
    assert 0.01 < float(predicted.step_time[0]) < 2
    parts = predicted.compute + predicted.communication + predicted.bubble + predicted.optimizer
    assert float(parts[0]) == pytest.approx(float(predicted.step_time[0]))
