"""How big, how long, how much: limits that bind, the join of the law with what sim foretells, and a plan that is taken as it is."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from analysis.known import Known
from analysis.ladder import Ladder
from analysis.law import predicted
from analysis.shapes import aspect, shapes
from analysis.sizing import Limits, effective, tokens_for
from conf.arithmetic import active_parameters
from conf.program import from_yaml, load, main
from tests.test_scaling import TRUE

H100 = ["analysis", "size", "cluster=h100_1k", "json=true"]


@pytest.fixture
def told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        assert main([*H100, *words]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_shapes_have_the_proportions_of_published_models():
    found = shapes(load(["model=llama3_8b"]).model)
    sizes = [shape.params for shape in found]
    assert sizes == sorted(sizes) and len([s for s in sizes if 1e9 < s < 4e11]) >= 30
    assert any(abs(shape.params / 8.03e9 - 1) < 0.03 and shape.model.hidden == 4096 and shape.model.layers == 32 for shape in found)
    for shape in found:
        assert shape.model.hidden % shape.model.heads == 0 and shape.model.heads % shape.model.kv_heads == 0
        assert 1 / 1.31 < shape.model.hidden / shape.model.layers / aspect(shape.model.hidden) < 1.31


def test_two_million_dollars(told, tmp_path):
    """The issue's own question; the money binds, and what the plan is foretold to cost is what was given."""
    found = told("budget=2 MUSD", "deadline=60 d")
    best, rows = found["best"], found["candidates"]
    assert len(rows) >= 40 and len({json.dumps(row["mesh"]) for row in rows}) > 5
    assert best["cost"] == pytest.approx(2e6) and best["seconds"] < 60 * 86400
    assert best["loss"] == min(row["loss"] for row in rows) and best["device_hours"] == pytest.approx(best["seconds"] * 1024 / 3600)
    flop = 6 * best["params"] * best["tokens"]
    assert flop / best["seconds"] / 1024 / 989e12 == pytest.approx(
        best["mfu"] * best["ettr"], rel=0.12
    )  # attention counts in MFU, not in 6 N D
    assert found["alike"][0] <= best["params"] <= found["alike"][1]
    plan = from_yaml(tmp_path / "size.yaml")
    assert plan.train.steps * plan.tokens_per_step == pytest.approx(best["tokens"], rel=1e-4) and plan.mesh.tp == best["mesh"]["tp"]
    assert main(["sim", "plan=size.yaml", "json=true", "runs=out"]) == 0


@pytest.mark.slow
def test_more_time_is_a_lower_loss_at_a_rising_price(told):
    frontier = told("deadline=20 d")["frontier"]
    losses, prices = ([point[name] for point in frontier] for name in ("loss", "cost_per_percent"))
    assert losses == sorted(losses, reverse=True) and prices == sorted(prices)


@pytest.mark.slow
def test_a_loss_is_reached_at_least_cost_and_use_makes_models_smaller(told):
    cheap = told("target_loss=1.95", "deadline=90 d")["best"]
    assert cheap["loss"] == pytest.approx(1.95)
    busy = told("target_loss=1.95", "deadline=90 d", "inference_tokens=1e13 token")["best"]
    assert busy["inference_cost"] > 0 and busy["loss"] == pytest.approx(1.95) and busy["cost"] >= cheap["cost"]


def test_repeated_tokens():
    """Tokens beyond those that there are count for less; the tokens for a loss are found again."""
    limits = Limits(math.inf, math.inf, math.inf, 0.0, 1e11, 2.1)
    free = tokens_for(TRUE, 2e10, Limits(math.inf, math.inf, math.inf, 0.0, math.inf, 2.1))
    bound = tokens_for(TRUE, 2e10, limits)
    assert bound > free > 1e11 and effective(bound, 1e11) == pytest.approx(free)
    assert tokens_for(TRUE, 1e9, limits) == math.inf


def test_a_users_runs_give_the_law_its_bands_and_a_page(told, tmp_path):
    """The band of a law widens beyond its runs; the page shows what the command told."""
    sizes, tokens = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e8, 3e9, 6), np.geomspace(5e9, 1e11, 6)))
    losses = predicted(TRUE, sizes, tokens) * np.exp(np.random.default_rng(0).normal(0, 0.003, sizes.size))
    pd.DataFrame({"params": sizes, "tokens": tokens, "loss": losses}).to_csv(tmp_path / "runs.csv", index=False)
    found = told("budget=1 MUSD", "law=runs.csv", "development=50%")
    best, known = found["best"], found["known"]
    assert known["loss"][0] < best["loss"] < known["loss"][1] and known["params"][0] <= best["params"] <= known["params"][1]
    assert known["beyond_largest_run"] == pytest.approx(best["params"] * best["tokens"] / 3e20)
    assert known["step"]["loss"][0] < best["loss"] < known["step"]["loss"][1]
    assert found["project"]["cost"] == pytest.approx(2 * best["cost"])
    law = Known.of(Ladder.read(str(tmp_path / "runs.csv")))
    near, far = (np.subtract(*reversed(law.loss(np.array([n]), np.array([d])))) for n, d in ((1e9, 3e10), (1e11, 1e12)))
    assert 0 < near < far
    page = (tmp_path / "size.html").read_text()
    assert all(name in page for name in ("What the law says beyond its runs", "Loss of each size", "Operational carbon", "dp_shard"))
    assert page.count("<svg") == 6 and f"{best['loss']:.4f}" in page


@pytest.mark.slow
def test_mixtures_of_experts_and_a_base_that_exists(told, tmp_path):
    """A mixture's law stands between its visited and all its parameters; a base that exists is trained on, at a price."""
    like = load(["model=mixtral_8x7b"]).model
    found = [shape for shape in shapes(like) if shape.model.hidden == 4096 and shape.model.layers == 32]
    assert found[0].params == pytest.approx(active_parameters(like), rel=0.01) and found[0].model.moe.ffn == like.moe.ffn
    made = told("budget=1 MUSD", "model=mixtral_8x7b", "model.vocab=128256", "existing=llama3_70b", "existing_tokens=1e11 token")
    best, base = made["best"], made["existing"]
    assert best["total_params"] > 2 * best["params"] and best["loss_of_total"] < best["loss"]
    assert main(["sim", "plan=size.yaml", "json=true", "runs=out"]) == 0
    law = np.array(list(made["law"].values()))
    assert base["loss"] == pytest.approx(float(predicted(law, 70.55e9, 1e11)), rel=1e-4)
    assert float(predicted(law, 70.55e9, 1e11 + base["more_tokens"])) == pytest.approx(best["loss"], rel=1e-4)
    assert base["cost"] == pytest.approx(base["finetune"]["cost"] * base["more_tokens"] / 1e9)


H, FIVE = "cluster=h100_1k", "deadline=5 d"
BAD = [
    ([H, "budget=2"], "is no amount of money"),
    ([H, "budget=-1 MUSD"], "must be more than 0"),
    ([H, "deadline=5"], "has no unit"),
    ([H, "deadline=1 s"], "not 100 steps, which take"),
    ([H, "target_loss=1.8"], "irreducible loss 1.817"),
    ([H, "target_loss=low"], "is no number"),
    ([H, "target_loss=nan"], "is no number"),
    ([H, "target_loss=1.85", "deadline=10 d"], "no size reaches a loss of 1.85 within the limits"),
    ([H, "seed=1"], "nothing limits the run"),
    ([H, FIVE, "development=1"], "is no share between 0 and 1"),
    ([H, FIVE, "out=page.html"], "it ends in .yaml"),
    ([H, FIVE, "existing_tokens=1e12 token"], "is said of no model"),
    ([H, FIVE, "existing=llama3_8b"], "existing_tokens="),
    ([H, FIVE, "existing=lama", "existing_tokens=1e12 token"], "lama"),
    ([H, FIVE, "law=none.csv"], "does not exist"),
    ([H, FIVE, "law=none.json"], "does not exist"),
    ([H, FIVE, "clutser=x"], "clutser"),
    (["cluster=mi300x_node", FIVE], "does not say its device"),
]


@pytest.mark.parametrize(("words", "line"), BAD)
def test_bad_limits_are_one_line(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    assert main(["analysis", "size", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert line in error and error.count("\n") == 0
    assert not (tmp_path / "size.yaml").exists() and not (tmp_path / "size.html").exists()


@pytest.mark.slow
def test_the_plan_of_a_laptop_is_executed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["analysis", "size", "deadline=5 min", "data.limit=3 MB"]) == 0
    assert main(["sim", "plan=size.yaml"]) == 0
    capsys.readouterr()
    assert (
        main(["real", "plan=size.yaml", "train.steps=30", "train.warmup=3", "train.evaluate_every=0", "checkpoint.every=0", "json=true"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["quantities"]["pretrain.step_time"]["value"] > 0
