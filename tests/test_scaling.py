"""Scaling laws fitted: other people's fits reproduced, synthetic laws recovered, each known numerical trap with code that falls in."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from analysis import chinchilla
from analysis.chinchilla import Points, parameters, solve, starts
from analysis.contest import band, choose, rivals
from analysis.envelope import envelope
from analysis.forms import FORMS, fit_form, ridge
from analysis.isoflop import isoflop, minimum
from analysis.ladder import Ladder
from analysis.law import fit, optimum, predicted
from analysis.repeated import Repeated
from analysis.served import served
from conf.errors import Refused
from conf.program import main
from tests.conftest import SHARED

DATA = SHARED / "data" / "scaling"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason="needs the published fits in ../shared/data/scaling")
GOPHER = 5.76e23  # FLOP
TRUE = np.array([1.8172, 482.01, 2085.43, 0.3478, 0.3658])  # Besiroglu et al. 2024


def made(law=TRUE, noise=0.0, seed=0, sizes=7, budgets=5) -> Ladder:
    """Runs of a law along budgets, N and D a factor of four to either side of the best."""
    rows = []
    for flop in np.geomspace(1e18, 1e21, budgets):
        best = float(optimum(law, flop).params)
        rows += [(n, flop / 6 / n) for n in best * np.geomspace(1 / 4, 4, sizes)]
    params, tokens = np.array(rows).T
    dice = np.random.default_rng(seed)
    loss = predicted(law, params, tokens) * np.exp(noise * dice.standard_normal(len(params)))
    return Ladder.of(pd.DataFrame({"N": params, "D": tokens, "loss": loss}))


def epoch() -> Ladder:
    return Ladder.read(str(DATA / "epoch_chinchilla_fig4.csv")).without_worst(5)


# -- the law


def test_laws_are_recovered():
    """200 laws without noise, to 1e-8 (35 runs each)."""
    dice = np.random.default_rng(1)
    for _ in range(200):
        alpha, beta = dice.uniform(0.15, 0.8, 2)
        law = np.array([dice.uniform(0.3, 3), dice.uniform(0.1, 1) * 1e9**alpha, dice.uniform(0.1, 1) * 2e10**beta, alpha, beta])
        params, tokens = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e8, 1e10, 7), np.geomspace(2e9, 2e11, 5)))
        ladder = Ladder.of(pd.DataFrame({"N": params, "D": tokens, "loss": predicted(law, params, tokens)}))
        points = Points.of(ladder.params, ladder.tokens, ladder.loss)
        first = starts(points)[::9]
        thetas, objectives = solve(points, np.ones((len(first), len(ladder))), first)
        np.testing.assert_allclose(parameters(thetas[objectives.argmin()], points), law, rtol=1e-8)


def test_the_best_size_is_where_the_loss_is_least():
    best = optimum(TRUE, GOPHER)
    sizes = float(best.params) * np.geomspace(0.5, 2, 2001)
    assert sizes[predicted(TRUE, sizes, GOPHER / 6 / sizes).argmin()] == pytest.approx(float(best.params), rel=1e-3)
    assert float(best.params) == pytest.approx(72.4e9, rel=0.01) and 6 * float(best.params * best.tokens) == pytest.approx(GOPHER)


def test_weights_are_repeats():
    ladder = made(noise=0.005)
    twice = ladder.where(np.repeat(np.arange(len(ladder)), np.where(np.arange(len(ladder)) < 9, 2, 1)))
    heavy = Ladder.of(
        pd.DataFrame({"N": ladder.params, "D": ladder.tokens, "loss": ladder.loss, "weight": np.where(np.arange(35) < 9, 2, 1)})
    )
    np.testing.assert_allclose(fit(heavy, bootstrap=0).parameters, fit(twice, bootstrap=0).parameters, rtol=1e-6)


@needs_shared
def test_the_points_of_chinchillas_figure_4():
    """Besiroglu et al. 2024: their optimum, and its least absolute deviations, which their table 1 prints."""
    found = fit(epoch(), bootstrap=0)
    assert found.objective <= 1.018275e-3 and found.at_optimum >= 0.99  # 1.01827402e-3 with all digits of the points
    np.testing.assert_allclose(found.parameters, [1.81722, 477.83, 2143.4, 0.34731, 0.36717], rtol=1e-4)
    np.testing.assert_allclose(fit(epoch(), 1e-7, 0).parameters[1:], [482.01, 2085.43, 0.3478, 0.3658], rtol=5e-4)


@needs_shared
@pytest.mark.slow
def test_its_bootstrap():
    found = fit(epoch())
    np.testing.assert_allclose(found.samples.std(0)[[0, 3, 4]], [0.0257, 0.0154, 0.0206], rtol=0.1)
    np.testing.assert_allclose(found.samples.std(0)[1:3], [124.5, 1293], rtol=0.15)
    low, high = np.quantile(found.optimum(GOPHER)[1].params, [0.025, 0.975]) / 1e9
    assert low == pytest.approx(52, abs=3) and high == pytest.approx(114, abs=6)


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """95% of the intervals of alpha hold the true one, over 300 ladders (93 to 97% asked; 600 ladders: LOG.md, 2026-11-30)."""
    inside = 0
    for seed in range(300):
        samples = fit(made(noise=0.005, seed=seed, sizes=15, budgets=9), bootstrap=200, seed=seed).samples
        low, high = np.quantile(samples[:, 3], [0.025, 0.975])
        inside += low <= TRUE[3] <= high
    assert 0.93 <= inside / 300 <= 0.98


# -- other forms


@pytest.mark.parametrize("form", ["coupled", "kaplan"])
def test_other_forms_are_recovered(form):
    params, tokens = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e8, 1e10, 7), np.geomspace(2e9, 2e11, 6)))
    beta = 1.0 if form == "kaplan" else 0.6
    loss = 1.7 + (0.9 * (params / 1e9) ** -0.5 + 0.8 * (tokens / 2e10) ** -beta) ** 0.6
    found = fit_form(Ladder.of(pd.DataFrame({"N": params, "D": tokens, "loss": loss})), form)
    theta = dict(zip(FORMS[form].names, found.theta, strict=True))
    assert theta["gamma"] == pytest.approx(0.6, rel=1e-4) and np.exp(theta["e"]) == pytest.approx(1.7, rel=1e-5)
    np.testing.assert_allclose(found.loss(params * 10, tokens * 10), 1.7 + (0.9 * (params / 1e8) ** -0.5
                               + 0.8 * (tokens / 2e9) ** -beta) ** 0.6, rtol=1e-5)  # fmt: skip


def grid_of(loss, **columns) -> Ladder:
    return Ladder.of(pd.DataFrame({"N": WIDE[0], "D": WIDE[1], "loss": loss, **columns}))


WIDE = [grid.ravel() for grid in np.meshgrid(np.geomspace(1e8, 1e10, 7), np.geomspace(2e9, 2e11, 6))]


def test_one_exponent_is_the_law_of_over_training():
    """Gadre et al. 2024, equation 4, in their own terms: E + (a M^eta + b M^-eta) C^-eta."""
    ratio, flop = WIDE[1] / WIDE[0], 6 * WIDE[0] * WIDE[1]
    found = fit_form(grid_of(1.6 + (400 * ratio**0.12 + 500 * ratio**-0.12) * flop**-0.12), "tied")
    assert found.theta[3] == pytest.approx(2 * 0.12, rel=1e-5) and np.exp(found.theta[2]) == pytest.approx(1.6, rel=1e-5)


def test_experts_not_visited_count_in_part():
    total = WIDE[0] * np.array([1, 4, 16])[np.arange(42) % 3]
    loss = 1.7 + 0.9 * (WIDE[0] / 1e9) ** -0.35 * (total / WIDE[0]) ** -0.1 + 0.8 * (WIDE[1] / 2e10) ** -0.3
    ladder = grid_of(loss, total_params=total)
    found = fit_form(ladder, "mixture")
    np.testing.assert_allclose(found.theta[3:], [0.35, 0.3, 0.1], rtol=1e-4)
    np.testing.assert_allclose(found.of(ladder), loss, rtol=1e-6)
    assert (found.loss(*WIDE) >= loss - 1e-9).all()  # without spare experts the loss is higher


def test_what_repeated_tokens_are_worth_is_found():
    """Muennighoff's law with his own constants, of sixty runs on one to fifty passes."""
    dice = np.random.default_rng(0)
    params, unique = dice.uniform(1e8, 8e9, 60), dice.uniform(1e9, 3e10, 60)
    tokens = unique * dice.choice([1, 2, 4, 8, 16, 50], 60)
    frame = pd.DataFrame({"N": params, "D": tokens, "unique_tokens": unique, "loss": Repeated().loss(params, tokens, unique)})
    found = fit_form(Ladder.of(frame), "repeated")
    np.testing.assert_allclose(np.exp(found.theta[4:]), [Repeated().tokens_decay, Repeated().params_decay], rtol=1e-3)
    np.testing.assert_allclose(found.loss(params, tokens, unique=unique), frame["loss"], rtol=1e-6)


@needs_shared
def test_muennighoffs_ridge():
    """With his law held, pairs (R_D*, R_N*) from (47, 2.33) on fit his 182 runs better than the published (15.4, 5.31)."""
    ladder = Ladder.read(str(DATA / "muennighoff_fit182.csv"))
    law, x, y = Repeated(), np.log(ladder.params).mean(), np.log(ladder.tokens).mean()
    held = {"a": np.log(law.A) - law.alpha * x, "b": np.log(law.B) - law.alpha * y, "e": np.log(law.E), "alpha": law.alpha}
    rows = {row[0]: row[1:] for row in ridge(ladder, held=held)}
    assert rows[16.0][0] == pytest.approx(5.19, abs=0.01) and rows[16.0][1] == pytest.approx(0.015828, abs=1e-6)
    assert rows[128.0][1] < rows[64.0][1] < rows[32.0][1] < rows[16.0][1] < rows[8.0][1]


@needs_shared
@pytest.mark.parametrize(("data", "worst"), [("rpj", 0.005), ("rw_original", 0.01), ("c4_original", 0.06)])
def test_over_trained_runs_are_foretold_by_one_exponent(data, worst):
    """Gadre's 1.4 billion (over-trained) and 6.9 billion from runs of up to 411 million parameters: better than by two exponents."""
    frame = pd.read_csv(DATA / "gadre_overtraining.csv").rename(columns={"loss_c4_val": "loss"})
    frame = frame[frame["train_set"] == data]
    small, large = (Ladder.of(part.reset_index(drop=True)) for part in (frame[frame["params"] < 4.5e8], frame[frame["params"] > 4.5e8]))
    errors = {form: np.abs(fit_form(small, form).of(large) / large.loss - 1).max() for form in ("tied", "chinchilla")}
    assert errors["tied"] < worst and errors["tied"] < errors["chinchilla"]


@needs_shared
def test_routed_models_are_foretold_by_their_experts():
    """Clark's 1.3 billion with 1 to 512 experts from up to 368 million, trained on as many tokens (so without a term of tokens)."""
    frame = pd.read_csv(DATA / "scalebench_moe_scaling_law.csv")
    frame = pd.DataFrame({"params": frame["dense_parameter_count"], "tokens": 130e9 * (1 + 1e-6 * (np.arange(len(frame)) % 3)),
                          "total_params": frame["dense_parameter_count"] * frame["num_experts"], "loss": frame["loss_validation"],
                          "split": frame["split"]})  # fmt: skip
    small, large = (Ladder.of(frame[frame["split"] == name].reset_index(drop=True)) for name in ("train", "test"))
    found = fit_form(small, "mixture", held={"b": -50.0, "beta": 1.0})
    assert len(large) == 28 and np.abs(found.of(large) / large.loss - 1).mean() < 0.015


def test_other_countings_are_told(tmp_path, capsys):
    """Embeddings and the FLOP of the runs themselves, where columns hold them, beside the division that 6 N D gives."""
    ladder = made(noise=0.001)
    frame = pd.DataFrame({"params": ladder.params, "tokens": ladder.tokens, "loss": ladder.loss})
    frame["params_no_embed"], frame["flop"] = ladder.params - 60 * ladder.params**0.66, 7.2 * ladder.params * ladder.tokens
    frame.to_csv(tmp_path / "runs.csv", index=False)
    assert main(["analysis", "scaling", f"data={tmp_path / 'runs.csv'}", "bootstrap=0", "budget=1e22 FLOP", "json=true"]) == 0
    own, without, theirs = json.loads(capsys.readouterr().out)["counting"]
    assert theirs["params"] * theirs["tokens"] * 7.2 == pytest.approx(1e22) and theirs["exponent"] == own["exponent"]
    assert without["counted"].startswith("params_no_embed") and without["exponent"] > own["exponent"]


def test_the_search_finds_the_closed_form():
    ladder = made()
    found = fit_form(ladder, "chinchilla")
    best = found.optimum(GOPHER)
    assert best is not None and best[0] == pytest.approx(float(optimum(TRUE, GOPHER).params), rel=1e-5)


@needs_shared
@pytest.mark.slow
def test_farseers_largest_runs_are_foretold_by_a_form_that_the_smaller_ones_choose():
    frame = pd.read_csv(DATA / "scalebench_farseer_scaling_law.csv")[["N", "D", "loss", "split"]]
    train, test = (Ladder.of(frame[frame["split"] == name].reset_index(drop=True)) for name in ("train", "test"))
    found, errors = choose(train)
    assert np.abs(found.loss(test.params, test.tokens) / test.loss - 1).mean() <= 0.006 and errors["chinchilla"] > 0.02


@pytest.mark.slow
@needs_shared
def test_olmos_seven_billion_from_three():
    frame = pd.read_csv(DATA / "olmo_ladder_final.csv").assign(loss=lambda f: f["c4_loss"])
    large = frame["size"].isin(["7B", "13B"])
    found, _ = choose(Ladder.of(frame[~large][["params", "tokens", "loss"]].reset_index(drop=True)))
    run = frame[frame["size"] == "7B"].iloc[0]
    assert float(found.loss(np.array([run["params"]]), np.array([run["tokens"]]))[0]) == pytest.approx(run["loss"], rel=0.003)


@needs_shared
@pytest.mark.slow
def test_the_gemstones_published_fits_are_reached():
    """Twenty fits of mcleish7/gemstone-scaling-laws, at two deltas: none of theirs is lower."""
    fits, runs = pd.read_csv(DATA / "gemstones_published_fits.csv"), pd.read_csv(DATA / "gemstones_losses.csv")
    seen = 0
    for _, row in fits[fits["subset"].isin(runs["subset"].unique())].iterrows():
        frame = runs[runs["subset"] == row["subset"]]
        ladder = Ladder.of(pd.DataFrame({"N": frame["params_active_precise"], "D": frame["tokens"], "loss": frame["final_loss"]}))
        assert fit(ladder, float(row["delta"]), 0).objective <= row["loss"] * (1 + 1e-5), row["file"]
        seen += 1
    assert seen == 20


def held_out():
    """Ladders cut below their largest runs."""
    points = pd.read_csv(DATA / "epoch_chinchilla_fig4.csv").sort_values("loss").iloc[:-5]
    yield from ((points[points["flop"] <= c], points[points["flop"] > c]) for c in (3e20, 1e21))
    farseer = pd.read_csv(DATA / "scalebench_farseer_scaling_law.csv")[["N", "D", "loss", "split"]]
    yield farseer[farseer["split"] == "train"], farseer[farseer["split"] == "test"]
    olmo = pd.read_csv(DATA / "olmo_ladder_final.csv").assign(loss=lambda f: f["c4_loss"])[["size", "params", "tokens", "loss"]]
    yield from ((olmo[~olmo["size"].isin(large)], olmo[olmo["size"].isin(large)]) for large in (["3B", "7B", "13B"], ["7B", "13B"]))
    stones = (
        pd.read_csv(DATA / "gemstones_losses.csv")
        .query("subset == 'hot'")
        .rename(columns={"params_active_precise": "N", "final_loss": "loss"})
    )
    yield stones[stones["N"] < 6e8][["N", "tokens", "loss"]], stones[stones["N"] > 6e8][["N", "tokens", "loss"]]


@needs_shared
@pytest.mark.slow
def test_bands_cover_what_was_held_out():
    """Of 163 larger runs of six ladders at least 85% (asked), where a bootstrap of the law covers a third or less."""
    inside = total = 0
    for small, large in held_out():
        ladder, ahead = (Ladder.of(part.reset_index(drop=True)) for part in (small, large))
        found, errors = choose(ladder)
        low, high = band(ladder, found, errors[found.form], rivals(ladder, found, errors), ahead.params, ahead.tokens)
        assert np.isfinite(high).all()
        inside, total = inside + int(((low <= ahead.loss) & (ahead.loss <= high)).sum()), total + len(ahead)
    assert total == 163 and inside / total >= 0.85


# -- repeated tokens, and models that are used


@needs_shared
def test_muennighoffs_objective():
    frame = pd.read_csv(DATA / "muennighoff_fit182.csv")
    miss = np.log(Repeated().loss(frame["params"], frame["tokens"], frame["unique_tokens"])) - np.log(frame["loss"])
    huber = np.where(abs(miss) <= 1e-3, miss**2 / 2, 1e-3 * (abs(miss) - 0.5e-3))
    assert len(frame) == 182 and huber.sum() == pytest.approx(0.015825936570763588, abs=1e-6)


def test_tokens_that_come_again_are_worth_less():
    law = Repeated()
    assert float(law.loss(6.34e9, 242e9, 25e9)) == pytest.approx(2.2256440889984477, abs=1e-12)  # their README
    assert float(law.loss(8.67e9, 178e9, 25e9)) == pytest.approx(2.2269634075087867, abs=1e-12)
    once, epochs = law.loss(8.67e9, 178e9, 178e9), np.array([2, 4, 8, 16, 40])
    np.testing.assert_allclose(law.loss(8.67e9, 178e9, 178e9 / epochs) - once, [0.003, 0.015, 0.040, 0.089, 0.210], atol=6e-4)


def test_a_model_that_is_used_is_smaller_and_trained_for_longer():
    """The table of ../shared/notes/scaling.md, section 9; the first-order condition; no inference is the training optimum."""
    best = optimum(TRUE, 1e23)
    amounts = [0, 1e12, 1e13, 1e14]
    found = [served(TRUE, float(best.loss), amount) for amount in amounts]
    np.testing.assert_allclose([one.params for one in found], [29.4e9, 19.7e9, 11.4e9, 7.5e9], rtol=0.01)
    np.testing.assert_allclose([one.training / 1e23 for one in found], [1, 1.07, 1.66, 4.24], rtol=0.01)
    assert found[0].params == pytest.approx(float(best.params), rel=1e-9)
    _, A, B, alpha, beta = TRUE
    for one, amount in zip(found, amounts, strict=True):
        left = alpha * A * one.params**-alpha / (beta * B * one.tokens**-beta) / (1 + amount / (3 * one.tokens)) - 1
        assert abs(left) < 1e-8 and predicted(TRUE, one.params, one.tokens) == pytest.approx(float(best.loss), rel=1e-12)
    many = [served(TRUE, 2.1, amount) for amount in np.geomspace(1e9, 1e16, 60)]
    assert all(a.params > b.params and a.tokens < b.tokens for a, b in pairwise(many))
    with pytest.raises(Refused, match=r"irreducible loss 1\.817"):
        served(TRUE, 1.8, 0)


# -- the second approach


def test_a_parabola_is_found_by_both():
    x = np.linspace(17, 21, 9)
    for method in ("akima", "parabola"):
        found = minimum(x, 3 + 0.1 * (x - 19.13) ** 2, method)
        assert found is not None and found[0] == pytest.approx(19.13, abs=0.01) and found[1] == pytest.approx(3, abs=1e-4)
        assert minimum(x, 30 - x, method) is None  # the least is beyond the runs


@needs_shared
def test_porians_exponents():
    """Porian et al. 2024, from Kaplan's .83 to Chinchilla's .50 as one choice after the other is mended: all 15 in their intervals."""
    runs, published = pd.read_csv(DATA / "porian_isoflops.csv"), pd.read_csv(DATA / "porian_published_exponents.csv")
    keys = ["dataset", "hparams", "warmup", "decay", "param_count", "val"]
    told = published[published["fit"] == "basic"]
    for _, row in told.iterrows():
        frame = runs[(runs[keys] == row[keys]).all(axis=1)]
        ladder = Ladder.of(pd.DataFrame({"N": frame["n"], "D": frame["t"], "C": frame["flops"], "loss": frame["loss"]}))
        assert row["ci_lo"] <= isoflop(ladder).exponent <= row["ci_hi"], tuple(row[keys])
    assert len(told) == 15


# -- traps


def test_an_envelope_of_curves_has_the_laws_exponent():
    sizes, tokens = np.geomspace(1e7, 1e10, 60), np.geomspace(1e8, 1e12, 80)
    N, D = (grid.ravel() for grid in np.meshgrid(sizes, tokens))
    found = envelope(Ladder.of(pd.DataFrame({"N": N, "D": D, "loss": predicted(TRUE, N, D)})))
    inner = (found.params > sizes[3]) & (found.params < sizes[-4])
    slope = np.polyfit(np.log(found.flop[inner]), np.log(found.params[inner]), 1)[0]
    assert slope == pytest.approx(TRUE[4] / (TRUE[3] + TRUE[4]), abs=0.01)


@needs_shared
def test_the_envelope_of_the_gemstones():
    """0.566 with 6 N D and 1,500 budgets (notes of this project's own measurement); they publish 0.499 with their own count of FLOP."""
    frame = pd.read_csv(DATA / "gemstones_curves_hot.csv")
    frame = frame.rename(columns={"params_active_precise": "N", "final_loss": "loss", "run_name": "group"})
    assert envelope(Ladder.of(frame[["N", "tokens", "loss", "group"]])).exponent == pytest.approx(0.566, abs=0.02)


def test_residuals_dealt_anew_give_the_spread_of_fits():
    """The standard error of alpha by residuals is that over ladders made anew."""
    ladder = made(noise=0.003, seed=1)
    dealt = fit(ladder, bootstrap=400, by="residual").samples[:, 3].std()
    anew = np.std([fit(made(noise=0.003, seed=seed), bootstrap=0).parameters[3] for seed in range(60)])
    assert 0.65 < dealt / anew < 1.5


def naive(points: Points, scale: float, theta: np.ndarray, weights: np.ndarray | None = None, dtype: type = np.float64) -> np.ndarray:
    """Hoffmann's loss as it is usually written, by scipy's defaults, from coefficients that are not centred."""
    x, y, target = (np.asarray(values, dtype) for values in (points.x + points.means[0], points.y + points.means[1], points.loss))
    weights = np.ones(len(x)) if weights is None else weights

    def objective(theta: np.ndarray) -> float:
        a, b, e, alpha, beta = theta.astype(dtype)
        miss = np.logaddexp(np.logaddexp(a - alpha * x, b - beta * y), e) - target
        huber = np.where(abs(miss) <= 1e-3, miss**2 / 2, 1e-3 * (abs(miss) - 0.5e-3))
        return float((weights * huber).sum() * scale)

    return minimize(objective, theta, method="L-BFGS-B").x


HOFFMANN = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])  # of their source, unrounded


def a_of(theta: np.ndarray) -> float:
    return float(theta[4] / (theta[3] + theta[4]))


@needs_shared
def test_a_mean_instead_of_a_sum_stops_where_it_starts():
    ladder = epoch()
    points = Points.of(ladder.params, ladder.tokens, ladder.loss)
    stopped = naive(points, 1 / len(ladder), HOFFMANN)
    ours = fit(ladder, bootstrap=0).parameters
    assert abs(a_of(stopped) - a_of(HOFFMANN)) < 2e-3 and a_of(ours) == pytest.approx(0.5139, abs=1e-3)


@needs_shared
def test_default_tolerances_make_a_bootstrap_sure_of_itself():
    """The 80% width of a: .05 in truth, a few thousandths from a minimiser that starts near and stops at once."""
    ladder = epoch()
    points = Points.of(ladder.params, ladder.tokens, ladder.loss)
    dice = np.random.default_rng(0)
    weights = dice.multinomial(len(ladder), np.full(len(ladder), 1 / len(ladder)), 24).astype(float)
    false = np.quantile([a_of(naive(points, 1 / len(ladder), HOFFMANN, row)) for row in weights], [0.1, 0.9])
    samples = fit(ladder, bootstrap=500).samples
    low, high = np.quantile(samples[:, 4] / (samples[:, 3] + samples[:, 4]), [0.1, 0.9])
    assert 0.045 <= high - low <= 0.058 and false[1] - false[0] < 0.01


@needs_shared
def test_half_the_digits_are_too_few():
    ladder = epoch()
    points = Points.of(ladder.params, ladder.tokens, ladder.loss)
    stopped = naive(points, 1.0, HOFFMANN, dtype=np.float32)
    assert abs(a_of(stopped) - 0.5139) > 0.02
    theta = np.array([[1.0, 0.5, 0.6, 0.34, 0.36]])
    assert solve(points, np.ones((1, len(ladder))), theta)[0].dtype == np.float64


def test_tokens_times_parameters_do_not_overflow():
    frame = pd.DataFrame({"params": [405_000_000_000] * 2, "tokens": [15_600_000_000_000] * 2, "loss": [1.9, 1.9]})
    assert (6 * frame["params"] * frame["tokens"]).iloc[0] != 6 * 405e9 * 15.6e12  # pandas says nothing
    np.testing.assert_allclose(Ladder.of(frame).flop, 6 * 405e9 * 15.6e12)


def test_two_digits_of_an_exponent_move_the_best_size():
    whole = np.array([np.exp(0.5267228), np.exp(6.0073404), np.exp(6.0179186), 0.33917084, 0.2849083])
    printed = np.array([1.69, 406.4, 410.7, 0.34, 0.28])
    assert float(optimum(whole, GOPHER).params) == pytest.approx(40.4e9, rel=0.01)
    assert float(optimum(printed, GOPHER).params) == pytest.approx(32.2e9, rel=0.01)
    told = json.loads(json.dumps({"alpha": float(whole[3])}))
    assert told["alpha"] == whole[3]  # every digit survives


# -- the command


def write(path: Path, ladder: Ladder) -> Path:
    pd.DataFrame({"N": ladder.params, "D": ladder.tokens, "loss": ladder.loss}).to_csv(path, index=False)
    return path


def test_the_command_tells_all_as_numbers(tmp_path, capsys):
    path = write(tmp_path / "runs.csv", made(noise=0.002))
    assert main(["analysis", "scaling", f"data={path}", "bootstrap=100", "budget=1e22 FLOP, 1e23 FLOP", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["parameters"]) == list(told["standard_errors"]) == ["E", "A", "B", "alpha", "beta"]
    assert [best["flop"] for best in told["optimum"]] == [1e22, 1e23] and told["optimum"][0]["beyond_largest_run"] == pytest.approx(10)
    low, high = told["optimum"][0]["intervals"]["params"]
    assert low < told["optimum"][0]["params"] < high and told["optimum"][0]["determined"]
    assert told["conventions"]["tokenizer"] == "not said" and told["conventions"]["flop"] == "6 N D"


def test_a_ladder_of_one_ratio_does_not_divide_a_budget(tmp_path, capsys):
    """Twenty tokens a parameter everywhere: the loss is foretold, the division is not."""
    params = np.geomspace(1e8, 3e9, 24)
    loss = predicted(TRUE, params, 20 * params) * np.exp(0.004 * np.random.default_rng(0).standard_normal(24))
    path = tmp_path / "runs.csv"
    pd.DataFrame({"N": params, "D": 20 * params, "loss": loss}).to_csv(path, index=False)
    assert main(["analysis", "scaling", f"data={path}", "bootstrap=200", "budget=1e22 FLOP"]) == 0
    assert "do not determine how to divide a budget" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_that_real_made_are_a_ladder(tmp_path, monkeypatch, tiny, capfd):
    """A sweep executes every combination; one that is refused costs the others nothing; what was made is read back."""
    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny if not word.startswith(("train.steps", "model.layers"))]
    assert main(["real", "-m", *words, "model.layers=1,2", "train.steps=4,8,0"]) == 1
    assert "4 of 6 points are done; next: foretold analysis scaling data=runs" in capfd.readouterr().out
    ladder = Ladder.read("runs")
    assert (ladder.counts["params_no_embed"] < ladder.params - 512 * 2).all() and (ladder.total == ladder.params).all()
    assert len(ladder) == 4 and len(set(ladder.params)) == 2 and sorted(set(ladder.tokens)) == [4 * 8 * 32, 8 * 8 * 32]
    assert ladder.conventions["params_count"] == "all that a token visits" and "512" in ladder.conventions["tokenizer"]
    assert main(["analysis", "scaling", "data=runs"]) == 2
    assert "4 runs are too few" in capfd.readouterr().err


BAD = [
    ("N,D\n1e8,1e9\n", "has no column loss or L; it has N, D; rename the one that holds the loss at the end"),
    ("N,D,loss\n1e8,1e9,3\n1e8,1e9,nan\n", "loss is nan in row 2 of 2"),
    ("N,D,loss\n1e8,1e9,-3\n", "loss is -3 in row 1 of 1; a positive number is needed"),
    ("N,D,loss\n1e8,1e9,3\n2e8,1e9,2.9\n", "2 runs are too few: the form has 5 parameters and needs at least 6 runs"),
    ("N,D,loss\n" + "1e8,1e9,3\n" * 8, "params takes 1 values in these runs"),
    ("N,D,loss,total_params\n1e8,1e9,3,1e7\n", "total_params 1e+07 is less than params 1e+08 in row 1"),
    ("N,D,loss,loss_unit\n1e8,1e9,3,nat\n1e8,1e9,3,bit\n", "mixes loss_unit: bit, nat; nat or bit, a token or a byte must be the same"),
]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_bad_tables_are_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "runs.csv"
    path.write_text(content)
    assert main(["analysis", "scaling", f"data={path}"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.strip().count("\n") == 0


@pytest.mark.parametrize(("option", "words"), [
    ("budget=5e23", "has no unit; expected FLOP"), ("delta=none", "is no distance in ln loss"), ("by=size", "it is run, group or residual"),
    ("form=chinchila", "did you mean chinchilla?"), ("form=mixture", "need a column total_params that differs"),
    ("form=repeated", "need a column unique_tokens with fewer than tokens"), ("drop=-1", "is no whole number"),
    ("drop=99", "leaves none of the 35 runs"), ("budget=0 FLOP", "must be more than 0"), ("data=nowhere.csv", "does not exist"),
])  # fmt: skip
def test_bad_options_are_one_line(tmp_path, capsys, option, words):
    path = write(tmp_path / "runs.csv", made())
    assert main(["analysis", "scaling", f"data={path}", option]) == 2
    assert words in capsys.readouterr().err


def test_curvature_is_the_objectives():
    ladder = made(noise=0.0003)
    points = Points.of(ladder.params, ladder.tokens, ladder.loss)
    first = starts(points)
    thetas, objectives = solve(points, np.ones((len(first), len(ladder))), first)
    best, small = thetas[objectives.argmin()], 1e-5

    def objective(theta):
        return chinchilla._State(points, np.ones((1, len(ladder))), theta[None], 1e-3).objective[0] * 1e-3

    found = chinchilla.curvature(points, np.ones(len(ladder)), best)
    for i in range(5):
        step = np.eye(5)[i] * small
        second = (objective(best + step) - 2 * objective(best) + objective(best - step)) / small**2
        assert found[i, i] == pytest.approx(second, rel=1e-3)
