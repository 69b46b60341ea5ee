"""Losses of fine-tuning and alignment: by hand, by their own laws, and beside trl's code."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from real import objectives
from real.loss import log_probabilities
from real.objectives import Sum, dpo, gae, group_advantages, grpo, moments, ppo, shaped, truncated, value, whitened

torch.manual_seed(0)
B, T, LONGEST = 8, 12, 16


def made(seed=0, grad=True):
    dice = torch.Generator().manual_seed(seed)
    logp = -torch.rand(B, T, generator=dice) * 3
    old = logp + 0.4 * torch.randn(B, T, generator=dice)
    ref = logp + 0.2 * torch.randn(B, T, generator=dice)
    mask = (torch.arange(T) < torch.randint(3, T + 1, (B, 1), generator=dice)).float()
    return logp.requires_grad_(grad), old, ref, mask, torch.randn(B, generator=dice)


# -- by hand


def test_advantages_by_hand():
    """Three tokens, gamma 0.9, lambda 0.5; the third sequence token is padding."""
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.4, 7.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[1.0, 1.0, 0.0]]), 0.9, 0.5)
    last = 1.0 - 0.4
    first = 0.9 * 0.4 - 0.5 + 0.45 * last
    torch.testing.assert_close(advantages, torch.tensor([[first, last, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[first + 0.5, 1.0, 0.0]]))


def test_without_a_critic_advantages_are_what_is_still_to_come():
    rewards, mask = torch.rand(B, T), torch.ones(B, T)
    advantages, returns = gae(rewards, torch.zeros(B, T), mask, 1.0, 1.0)
    torch.testing.assert_close(advantages, rewards.flip(1).cumsum(1).flip(1))
    torch.testing.assert_close(returns, advantages)


def test_what_stands_between_is_stepped_over():
    """A tool's answer between two generated stretches changes nothing."""
    rewards, values, mask = torch.rand(1, 6), torch.rand(1, 6), torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]])
    whole, keep = gae(rewards, values, mask, 0.9, 0.8)[0], mask[0] > 0
    torch.testing.assert_close(whole[:, keep], gae(rewards[:, keep], values[:, keep], torch.ones(1, 4), 0.9, 0.8)[0])


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), [
    (1.0, 2.0, -2.0, -2.0), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0), (1.5, -2.0, 3.0, 3.0), (0.5, -2.0, 1.6, 0.0),
])  # fmt: skip
def test_the_clip_by_hand(ratio, advantage, loss, slope):
    """Clip 0.2: the value and its derivative by the log-probability."""
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    found = ppo(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), 0.2).mean
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, abs=1e-6) and float(logp.grad) == pytest.approx(slope, abs=1e-6)


def test_the_values_clip_by_hand():
    """Old 1, clip 0.2: a value of 2 towards a return of 3 counts as 1.2, one of 2 towards 0 as itself."""
    told = value(torch.tensor([[2.0, 2.0]]), torch.ones(1, 2), torch.tensor([[3.0, 0.0]]), torch.ones(1, 2), 0.2)
    assert float(told.total) == pytest.approx(((1.2 - 3) ** 2 + 2**2) / 2, abs=1e-6) and float(told.count) == 2


def test_a_score_comes_at_the_last_token():
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    told = shaped(torch.tensor([2.0, 3.0, 4.0]), torch.full((3, 3), -1.0), torch.full((3, 3), -1.5), mask, 0.1)
    torch.testing.assert_close(told, torch.tensor([[-0.05, 1.95, 0.0], [0.0, -0.05, 2.95], [0.0, 0.0, 0.0]]))


def test_groups():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    told = group_advantages(rewards, 4)
    unit = 0.5 / (0.57735 + 1e-4)
    assert told[:4].tolist() == pytest.approx([unit, -unit, -unit, unit], rel=1e-4)
    assert told[4:].abs().max() == 0 and group_advantages(rewards, 4, scaled=False)[0] == 0.5
    spoiled = torch.tensor([1.0, float("nan"), 0.0, 1.0])
    kept = group_advantages(spoiled, 4)
    assert kept[1] == 0 and torch.equal(kept[[0, 2, 3]], group_advantages(spoiled[[0, 2, 3]], 3))


# -- laws


def test_at_ratio_one_the_gradient_is_the_policys():
    logp, _, _, mask, advantages = made()
    grpo(logp, logp.detach(), advantages, mask, 0.2, 0.2, "dapo").mean.backward()
    torch.testing.assert_close(logp.grad, -advantages.unsqueeze(1) * mask / mask.sum())


def test_the_kls_estimators():
    """k1 and k3 have the mean KL(p ‖ q) under p, k3 is never negative; k2 and k3 agree where p and q are near."""
    p, q = torch.randn(50).log_softmax(0), torch.randn(50).log_softmax(0)
    truth = float((p.exp() * (p - q)).sum())
    for kind in ("k1", "k3"):
        assert float((p.exp() * objectives.kl(p, q, kind)).sum()) == pytest.approx(truth, rel=1e-5)
    assert (objectives.kl(p, q) >= 0).all()
    torch.testing.assert_close(objectives.kl(p, p + 1e-3), objectives.kl(p, p + 1e-3, "k2"), rtol=2e-3, atol=0)


def test_a_corrected_penalty_has_the_kls_gradient():
    """Over all tokens of a distribution, weighted by the old one's: d/dθ Σ old ρ k3 = d KL(π ‖ ref)."""
    logits, old, ref = torch.randn(30).requires_grad_(), torch.randn(30).log_softmax(0), torch.randn(30).log_softmax(0)
    logp = logits.log_softmax(0)
    whole = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    sampled = (old.exp() * (logp - old).exp() * objectives.kl(logp, ref)).sum()
    torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], whole, rtol=1e-4, atol=1e-6)


def test_stale_samples_are_weighed_up_to_a_limit():
    """Decoupled: the proximal policy's ratio is clipped, the behaviour's only weighs; with both alike it is plain PPO."""
    logp, old, behaviour, mask, advantages = made()
    weights = truncated(old, behaviour, 2.0)
    assert weights.max() <= 2 and not weights.requires_grad
    each = advantages.unsqueeze(1).expand(B, T)
    plain = ppo(logp, old, each, mask, 0.2, truncated(old, old, 2.0)).total
    torch.testing.assert_close(plain, ppo(logp, old, each, mask, 0.2).total)
    torch.testing.assert_close(
        ppo(logp, old, each, mask, 0.2, weights).total, (objectives.surrogate(logp, old, each, 0.2, 0.2) * weights * mask).sum()
    )


LOSSES = {
    "sft": lambda logp, old, ref, mask, adv: objectives.sft(logp, mask),
    "ppo": lambda logp, old, ref, mask, adv: ppo(logp, old, adv.unsqueeze(1), mask, 0.2),
    "value": lambda logp, old, ref, mask, adv: value(logp, old, ref, mask, 0.2),
    "bradley_terry": lambda logp, old, ref, mask, adv: objectives.bradley_terry(logp.sum(1), old.sum(1)),
    **{f"dpo {kind}": lambda logp, old, ref, mask, adv, kind=kind: dpo(logp.sum(1), old.sum(1), ref.sum(1), old.sum(1), 0.1, kind)
       for kind in objectives.DPO_KINDS},
    **{f"grpo {kind}": lambda logp, old, ref, mask, adv, kind=kind: grpo(logp, old, adv, mask, 0.2, 0.28, kind, LONGEST, ref, 0.04)
       for kind in objectives.GRPO_KINDS},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_change_nothing(name, parts):
    """Sums and counts of uneven parts, divided once: loss and gradient within 1e-6."""
    batch = made()
    whole = LOSSES[name](*batch).mean
    slope = torch.autograd.grad(whole, batch[0])[0]
    told = [LOSSES[name](*pieces) for pieces in zip(*(tensor.chunk(parts) for tensor in batch), strict=True)]
    joined = Sum(torch.stack([one.total for one in told]).sum(), torch.stack([one.count for one in told]).sum()).mean
    torch.testing.assert_close(joined, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(joined, batch[0])[0], slope, rtol=1e-6, atol=1e-6)


def test_advantages_are_whitened_over_all_ranks():
    values, mask = torch.randn(B, T) * 3 + 5, made()[3]
    over = sum(moments(v, m) for v, m in zip(values.chunk(4), mask.chunk(4), strict=True))
    told = torch.cat([whitened(v, over) for v in values.chunk(4)])[mask > 0]
    assert float(told.mean()) == pytest.approx(0, abs=1e-6) and float(told.std()) == pytest.approx(1, abs=1e-5)


def test_log_probabilities_are_the_softmaxs():
    logits, tokens = torch.randn(2, 5, 7, dtype=torch.bfloat16), torch.randint(0, 7, (2, 5))
    told = log_probabilities(logits, tokens)
    torch.testing.assert_close(told, logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1))


# -- beside trl


def trainer(cls, **said):
    """An object of trl's trainer with nothing but what its loss reads."""
    here, same = object.__new__(cls), lambda x, **_: x
    here.accelerator = SimpleNamespace(device="cpu", num_processes=1, gather=same, gather_for_metrics=same, reduce=same)
    here.model, here._metrics, here._total_train_tokens = torch.nn.Identity().eval(), defaultdict(lambda: defaultdict(list)), 0
    here.__dict__.update(aux_loss_enabled=False, use_weighting=False, **said)
    return here


@pytest.mark.slow
@pytest.mark.parametrize("kind", objectives.DPO_KINDS)
def test_dpo_is_trls(kind):
    from trl import DPOTrainer

    logp, _, ref, mask, _ = made()
    args = SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False)
    told = trainer(DPOTrainer, ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl", beta=0.1, args=args,
                   loss_types=[kind], loss_weights=[1.0], ref_model=lambda **_: SimpleNamespace(log_probs=ref * mask))  # fmt: skip
    told.model.is_gradient_checkpointing = False
    inputs = {"input_ids": torch.zeros(B, T + 1, dtype=torch.long), "completion_mask": torch.cat((torch.zeros(B, 1), mask), 1).long()}
    model = lambda **_: SimpleNamespace(log_probs=logp * mask, entropy=mask, mean_logits=mask, is_top1=mask > 0)  # noqa: E731
    theirs = told._compute_loss(model, inputs, False)
    sums = [objectives.sequence(x, mask, mean=kind == "ipo").chunk(2) for x in (logp, ref)]
    ours = dpo(*sums[0], *sums[1], 0.1, kind).mean
    compare(theirs, ours, logp, tolerance=2e-6 if kind == "ipo" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("margin", [None, 0.3])
def test_the_rewards_loss_is_trls(margin):
    from trl import RewardTrainer

    rewards = torch.randn(B, 1).requires_grad_()
    told = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {} if margin is None else {"margin": torch.full((B // 2,), margin)}
    theirs = told.compute_loss(lambda **_: SimpleNamespace(logits=rewards), inputs)
    ours = objectives.bradley_terry(*rewards.squeeze(1).chunk(2), margin or 0.0).mean
    compare(theirs, ours, rewards)


@pytest.mark.slow
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("kind", objectives.GRPO_KINDS)
def test_grpo_is_trls(kind, stale, corrected):
    from trl import GRPOTrainer

    logp, old, ref, mask, advantages = made()
    weights = truncated(old, old + 0.3 * torch.randn(B, T), 2.0) if stale else None
    told = trainer(GRPOTrainer, beta=0.04, epsilon_low=0.2, epsilon_high=0.28, loss_type=kind, max_completion_length=LONGEST,
                   importance_sampling_level="token", off_policy_mask_threshold=None, top_entropy_quantile=1.0, use_vllm=stale,
                   vllm_importance_sampling_correction=stale, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
                   args=SimpleNamespace(use_bias_correction_kl=corrected, delta=None, steps_per_generation=1))  # fmt: skip
    told._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros(B, T), None)
    inputs = {"prompt_ids": torch.zeros(B, 2, dtype=torch.long), "prompt_mask": torch.ones(B, 2), "completion_mask": mask,
              "completion_ids": torch.zeros(B, T, dtype=torch.long), "advantages": advantages, "old_per_token_logps": old,
              "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(), "importance_sampling_ratio": weights}  # fmt: skip
    theirs = told._compute_loss(None, inputs)
    ours = grpo(logp, old, advantages, mask, 0.2, 0.28, kind, LONGEST, ref, 0.04, 1.0 if weights is None else weights, corrected).mean
    compare(theirs, ours, logp)


def compare(theirs, ours, by, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6)
    slopes = [torch.autograd.grad(loss, by, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)
