"""Ladders of small runs: what they cost, what they are expected to tell, and that a law fitted to them is as far off as foretold."""

import json
import shlex

import numpy as np
import pandas as pd
import pytest

from analysis.design import derivatives, precision
from analysis.ladder import Ladder
from analysis.law import fit, optimum, predicted
from conf.program import load, main
from tests.test_scaling import TRUE


def grid(target, share, budgets=5, sizes=7, ratio=3.0, span=4.0):
    """(2, runs): budgets up to what the share allows, sizes around each one's best."""
    largest = target * share / sizes / sum(ratio**-i for i in range(budgets))
    rows = []
    for flop in (largest * ratio**-i for i in range(budgets)):
        rows += [(n, flop / 6 / n) for n in float(optimum(TRUE, flop).params) * np.geomspace(1 / span, span, sizes)]
    return np.array(rows).T


@pytest.mark.parametrize(("of", "noise", "size", "loss"), [
    ((1e22, 0.001), 0.002, 0.05, 0.010), ((1e22, 0.01), 0.002, 0.05, 0.0067), ((1e22, 0.1), 0.002, 0.05, 0.0040),
    ((1e22, 0.01), 0.005, 0.13, 0.017), ((1e22, 0.01, 5, 7, 3.0, 1.5), 0.002, 0.18, 0.012), ((1e22, 0.01, 3, 7, 6.0), 0.002, 0.08, 0.0095),
    ((1e24, 0.01), 0.002, 0.08, 0.0055),
])  # fmt: skip
def test_precision_is_that_of_simulated_fits(of, noise, size, loss):
    """The notes' table (section 8), made by fitting simulated ladders: half-widths of 80% bands."""
    told = precision(TRUE, grid(*of), of[0], noise)
    assert told["best_size"] == pytest.approx(size, rel=0.2) and told["loss"] == pytest.approx(loss, rel=0.15)


def test_derivatives_are_those_of_the_law():
    logs, params, tokens = np.log(TRUE), np.array([1e9, 2e10]), np.array([3e10, 1e11])
    for i in range(5):
        step = np.eye(5)[i] * 1e-6
        slope = (np.log(predicted(np.exp(logs + step), params, tokens)) - np.log(predicted(np.exp(logs - step), params, tokens))) / 2e-6
        np.testing.assert_allclose(derivatives(TRUE, params, tokens)[:, i], slope, rtol=1e-6)


@pytest.mark.slow
def test_fits_are_as_far_off_as_foretold():
    at = grid(1e22, 0.01)
    told, dice = precision(TRUE, at, 1e22, 0.003), np.random.default_rng(0)
    found = []
    for _ in range(200):
        loss = predicted(TRUE, *at) * np.exp(0.003 * dice.standard_normal(at.shape[1]))
        law = fit(
            Ladder.of(pd.DataFrame({"N": at[0], "D": at[1], "loss": loss})), 0.1, 0
        ).parameters  # least squares, as the forecast has it
        found.append(float(optimum(law, 1e22).params))
    low, high = np.quantile(np.log(found), [0.1, 0.9])
    assert (high - low) / 2 == pytest.approx(np.log1p(told["best_size"]), rel=0.2)


@pytest.fixture
def told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        assert main(["analysis", "design", "json=true", *words]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_runs_keep_within_their_share_and_are_plans(told):
    found = told("target=1e14 FLOP", "share=20%", "budgets=3", "sizes=5")
    assert found["spent"] <= 0.2e14 * 1.001 and len({run["params"] for run in found["runs"]}) >= 4
    for run in found["runs"]:
        plan = load(run["overrides"])
        assert plan.train.steps * plan.tokens_per_step == pytest.approx(run["tokens"], rel=0.02)


def test_the_next_run_tells_more_than_its_cost(told, tmp_path):
    at = grid(1e13, 1.0, 3, 5)
    frame = pd.DataFrame({"N": at[0], "D": at[1], "loss": predicted(TRUE, *at)})
    frame.to_csv(tmp_path / "runs.csv", index=False)
    before = precision(TRUE, at, 1e16, 0.005)
    found = told("target=1e16 FLOP", "share=1%", "data=runs.csv")
    assert len(found["runs"]) == 1 and found["spent"] <= 1e14 * 1.001
    assert found["loss"] < before["loss"]


def test_it_says_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["analysis", "design", "target=1e14 FLOP", "share=0.2", "budgets=3", "sizes=5", "data.limit=8 MB"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(lines) > 8 and all(line.startswith("foretold real") and "data.limit=8 MB" in shlex.split(line) for line in lines)


@pytest.mark.parametrize(("words", "line"), [
    ([], "target= names no compute"), (["target=1e22"], "has no unit"), (["target=-1 FLOP"], "must be more than 0"),
    (["target=1e22 FLOP", "data=empty.csv"], "0 runs are too few"), (["target=1e22 FLOP", "share=2"], "is no share between 0 and 1"),
    (["target=1e10 FLOP"], "too few for a law"), (["target=1e22 FLOP", "noise=loud"], "is no share"),
])  # fmt: skip
def test_bad_words_are_one_line(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("N,D,loss\n")
    assert main(["analysis", "design", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert line in error and "\n" not in error
