"""Sweeps: points, one table, bad points passed over, launchers, and the closed form against simulated lives."""

import json

import numpy as np
import pandas as pd
import pytest

from conf.errors import Refused
from conf.program import load
from conf.sweep import deal, expand
from sim.expect import expected, useful
from sim.life import live
from sim.pace import pace, paces
from sim.summary import run

FAILING = ["experiment=olmo2_7b", "train.steps=2000000", "failures=cloud_immature", "cluster.spares=64", "checkpoint.every=5000"]


def test_points_are_every_combination():
    assert expand(["a=1,2", "b=range(0,6,2)", "c=x"]) == [[f"a={a}", f"b={b}", "c=x"] for a in (1, 2) for b in (0, 2, 4)]
    with pytest.raises(Refused, match="extraneous input"):
        expand(["a=1,2)"])


@pytest.mark.parametrize("how", [[], ["fast=true"], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]])
def test_a_bad_point_is_one_line_and_the_others_go_on(foretold, how):
    status, out, err = foretold(
        "sim", "-m", "experiment=olmo2_7b", "train.steps=2000", "cluster.nodes=64,100,128", "grid=france,nowhere", *how
    )
    assert status == 1 and "Traceback" not in err
    assert "4 of 6 points were passed over:" in out
    assert "cluster.nodes=64, grid=nowhere and 2 more: grid=nowhere is no grid" in out
    assert "cluster.nodes=100, grid=france: train.global_batch=1024 is no multiple" in out
    (line,) = (line for line in out.splitlines() if line.startswith("table: "))
    frame = pd.read_parquet(line.removeprefix("table: "))
    assert list(frame["cluster.nodes"]) == [64, 64, 100, 100, 128, 128] and frame["problem"].notna().sum() == 4
    good = frame[frame["problem"].isna()]
    assert good["pretrain.step_time"].is_monotonic_decreasing
    assert list(good["plan"]) == [
        load(["experiment=olmo2_7b", "train.steps=2000", f"cluster.nodes={n}", "grid=france"]).id for n in (64, 128)
    ]


def test_the_figure_is_drawn(foretold, tmp_path):
    assert foretold("sim", "-m", "experiment=olmo2_7b", "cluster.nodes=32,64,128", "grid=france,us_pjm", "fast=true")[0] == 0
    assert foretold("analysis", "sweep", "out=picture.png")[0] == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = foretold("analysis", "sweep", "table=nothing.parquet")
    assert status == 2 and err.startswith("foretold analysis: table=nothing.parquet is no table of a sweep")


def test_json_holds_the_points(foretold):
    status, out, _ = foretold("sim", "-m", "experiment=olmo2_7b", "grid.intensity='10 gCO2e/kWh','20 gCO2e/kWh'", "fast=true", "json=true")
    told = json.loads(out)["points"]
    assert status == 0 and len(told) == 2
    assert told[1]["run.carbon_location"] == pytest.approx(2 * told[0]["run.carbon_location"])


def test_launchers_that_are_not_there_are_refused():
    with pytest.raises(Refused, match="is no launcher; did you mean joblib"):
        deal([["a=1"]], print, ["hydra/launcher=joblob"], "nowhere")


def test_the_fast_step_is_the_step():
    plans = [load(["experiment=olmo2_7b", f"cluster.nodes={n}"]) for n in (32, 64, 128)]
    assert paces(plans) == [pace(plan) for plan in plans]


def test_closed_form_is_the_mean_of_lives():
    """Within four standard errors and 1%: what it leaves out (failures while coming up) is smaller than that here."""
    plan = load(FAILING)
    step = pace(plan)
    lives = [run(live(plan, seed, step)) for seed in range(12)]
    told = expected(plan, step)
    for name, slack in (("ettr", 0.01), ("energy", 0.01), ("gpu_hours", 0.01), ("interruptions", 0.05)):
        values = np.array([life[name] for life in lives])
        off = abs(values.mean() - told[f"run.{name}"])
        assert off < slack * told[f"run.{name}"] + 4 * values.std(ddof=1) / len(values) ** 0.5, (name, values.mean(), told[f"run.{name}"])
    assert np.mean([life["interruptions"] for life in lives]) > 5
    assert told["run.ettr"] < 0.99


def test_useful_time_has_its_limits():
    assert useful(0.0, 900, 100, 300) == 0.9
    assert useful(1.0, 900, 0, 300) == 0.0
    assert useful(1e-9, 900, 6, 300) == pytest.approx(900 / 906, rel=1e-5)
