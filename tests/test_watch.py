"""What watches a run, on series of which the truth is known: real spikes, stationary noise, slow ranks, turned bits."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conf.plan import Spikes
from real.heartbeat import Pulse
from real.integrity import checksum
from real.stability import Judge
from real.straggler import Scores

BLOOM = Path(__file__).parents[2] / "shared" / "data" / "failures" / "bloom_176b_loss_spike.csv"


def warm(judge: Judge, dice: np.random.Generator, steps: int = 128) -> Judge:
    """Accepted steps like BLOOM's before its spike."""
    for _ in range(steps):
        judge.accept(dice.normal(2.2, 0.02), dice.normal(0.24, 0.02))
    return judge


@pytest.mark.skipif(not BLOOM.is_file(), reason="the curve of BLOOM's spike is in ../shared, which is not here")
def test_the_spike_of_bloom_is_seen_four_steps_before_its_peak():
    """At iteration 31215, by the gradient norm; the loss peaks at 31219. All of it is flagged, for none of it enters the window."""
    curve = pd.read_csv(BLOOM)
    judge = warm(Judge(Spikes()), np.random.default_rng(0))
    flags = {int(row.iteration): judge.verdict(row.lm_loss, row.grad_norm) for row in curve.itertuples()}
    first = min(iteration for iteration, why in flags.items() if why)
    assert first == 31215 and "gradient norm" in flags[31215]
    peak = int(curve.iteration[curve.lm_loss.idxmax()])
    assert peak == 31219 and all(flags[iteration] for iteration in range(31215, peak + 1))


def test_after_a_nan_the_next_step_counts():
    judge = warm(Judge(Spikes()), np.random.default_rng(1))
    told = [judge.verdict(*pair) for pair in ((2.2, 0.24), (float("nan"), 0.24), (2.2, float("inf")), (2.21, 0.25))]
    assert [why is None for why in told] == [True, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "lognormal"])
def test_stationary_noise_raises_no_alarm(noise):
    """At most one in 1e5 steps; here none in 3e5 of normal noise, or of gradient norms whose logarithm is."""
    dice, judge, alarms, steps = np.random.default_rng(2), Judge(Spikes()), 0, 300_000
    norms = dice.normal(1.0, 0.1, steps) if noise == "normal" else dice.lognormal(0.0, 0.3, steps)
    for loss, norm in zip(dice.normal(2.0, 0.05, steps).tolist(), norms.tolist(), strict=True):
        alarms += judge.verdict(loss, norm) is not None
    assert alarms <= steps / 1e5


def test_a_level_that_rises_for_good_is_flagged_for_good():
    """The window is frozen while all is flagged: what does not come back is for the budget to end."""
    judge = warm(Judge(Spikes()), np.random.default_rng(3))
    assert all(judge.verdict(4.0, 0.24) for _ in range(500))


def test_a_slow_rank_is_found_in_20_steps_and_noise_is_not():
    """Twice as slow from step 100 on, with 5% noise; and 10,000 steps of noise alone."""
    dice = np.random.default_rng(4)
    scores, found = Scores(8), {}
    for step in range(200):
        work = 0.1 * dice.normal(1.0, 0.05, 8)
        work[5] *= 1 + (step >= 100)
        found |= {slow.rank: (step, slow.score, slow.cost) for slow in scores.look(work.tolist(), float(work.max()) + 0.02)}
    ((rank, (step, score, cost)),) = found.items()
    assert rank == 5 and step < 120 and score == pytest.approx(2.0, abs=0.3) and cost == pytest.approx(0.1 / 0.12, rel=0.4)
    quiet = Scores(8)
    assert not any(quiet.look((0.1 * dice.normal(1.0, 0.05, 8)).tolist(), 0.12) for _ in range(10_000))


def test_stages_of_a_pipeline_are_not_held_against_each_other():
    scores = Scores(4, stages=2)
    assert not any(scores.look([0.1, 0.1, 0.3, 0.3], 0.4) for _ in range(100))
    found = [slow.rank for _ in range(100) for slow in scores.look([0.1, 0.1, 0.3, 0.7], 0.8)]
    assert found == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_turned_bit_changes_the_checksum(dtype):
    weights = [torch.randn(7, 5).to(dtype), torch.randn(3).to(dtype)]
    before, whole = checksum(weights), torch.int32 if dtype == torch.float32 else torch.int16
    for tensor in weights:
        bits = tensor.view(-1).view(whole)
        for place in range(bits.numel()):
            for bit in range(8 * tensor.element_size() - 1):
                bits[place] ^= 1 << bit
                assert checksum(weights) != before
                bits[place] ^= 1 << bit
    assert checksum(weights) == before


def test_a_pulse_tells_what_was_beaten():
    pulse = Pulse(3)
    pulse.beat(1, "communication")
    pulse.stepped(1, 7, 0.5)
    pulse.order(2, flip=1.0, slow=3.0)
    assert (pulse[1].state, pulse[1].step, pulse[1].work, pulse[1].beats, pulse[0].beats) == ("communication", 7, 0.5, 1, 0)
    assert (pulse.take(2, "flip"), pulse.take(2, "flip"), pulse.take(2, "slow")) == (1.0, 0.0, 3.0)
    assert not pulse.stop
    pulse.ask_to_stop()
    assert pulse.stop
