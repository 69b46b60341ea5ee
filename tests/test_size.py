"""How big, how long, how much: limits that bind, the join of the law with what sim foretells, and a plan that is taken as it is."""

import json
import math

import pytest

from analysis.shapes import aspect, shapes
from analysis.sizing import Limits, effective, tokens_for
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


def test_more_time_is_a_lower_loss_at_a_rising_price(told):
    frontier = told("deadline=20 d")["frontier"]
    losses, prices = ([point[name] for point in frontier] for name in ("loss", "cost_per_percent"))
    assert losses == sorted(losses, reverse=True) and prices == sorted(prices)


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
    assert not (tmp_path / "size.yaml").exists()


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
