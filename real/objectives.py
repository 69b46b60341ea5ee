"""What fine-tuning and alignment minimise: pure functions of log-probabilities and masks.

Every loss comes as a sum and what it is divided by, apart: ranks and micro-batches add both, and divide once, by the global count, so the
loss is the same on any mesh. Shapes in names: B sequences, T tokens. Masks are 1 where a token was generated (or is to be learned) and 0
elsewhere; log-probabilities are natural logarithms, in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DPO_KINDS = ("sigmoid", "ipo", "hinge")
GRPO_KINDS = ("grpo", "dapo", "dr_grpo")
STEADY = 1e-4  # added to a group's standard deviation


class Sum(NamedTuple):
    """A loss before it is divided."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count.clamp(min=1)


def sequence(logp_BT: Tensor, mask_BT: Tensor, mean: bool = False) -> Tensor:
    """Log-probability of each whole completion [B], or its mean a token."""
    total = (logp_BT * mask_BT).sum(-1)
    return total / mask_BT.sum(-1).clamp(min=1) if mean else total


def sft(logp_BT: Tensor, mask_BT: Tensor) -> Sum:
    """Cross-entropy of the tokens to be learned."""
    return Sum(-(logp_BT * mask_BT).sum(), mask_BT.sum())


# -- preferences


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | float = 0.0) -> Sum:
    """−ln σ(r_chosen − r_rejected − margin) (Ouyang et al. 2022, equation 1; margin: Llama 2, section 3.2.2)."""
    return Sum(-F.logsigmoid(chosen_B - rejected_B - margin_B).sum(), _count(chosen_B))


def dpo(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, beta: float, kind: str = "sigmoid") -> Sum:
    """Of the log-probabilities of whole completions under policy and reference; means a token for ipo.

    sigmoid: −ln σ(β h), h the policy's log-ratio of chosen to rejected less the reference's (Rafailov et al. 2023, equation 7);
    ipo: (h − 1 / 2β)² (Azar et al. 2023, equation 17); hinge: max(0, 1 − β h) (Zhao et al. 2023, SLiC).
    """
    h = chosen_B - rejected_B - (ref_chosen_B - ref_rejected_B)
    each = {"sigmoid": lambda: -F.logsigmoid(beta * h), "ipo": (h - 1 / (2 * beta)).square, "hinge": lambda: F.relu(1 - beta * h)}
    return Sum(each[kind]().sum(), _count(chosen_B))


# -- rewards and advantages


def kl(logp_BT: Tensor, ref_BT: Tensor, kind: str = "k3") -> Tensor:
    """Estimators of KL(policy ‖ reference) of each token drawn from the policy (Schulman 2020, Approximating KL divergence)."""
    ratio = ref_BT - logp_BT
    return {"k1": lambda: -ratio, "k2": lambda: ratio.square() / 2, "k3": lambda: torch.expm1(ratio) - ratio}[kind]()


def shaped(score_B: Tensor, logp_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor, coefficient: float) -> Tensor:
    """Rewards of tokens: the score at the last one, less coefficient × k1 at each (Ziegler et al. 2019, equation 2)."""
    last = mask_BT.shape[1] - 1 - mask_BT.flip(1).argmax(1)
    rewards = -coefficient * kl(logp_BT, ref_BT, "k1") * mask_BT
    return rewards.scatter_add(1, last.unsqueeze(1), (score_B * mask_BT.any(1)).to(rewards.dtype).unsqueeze(1))


def steered(coefficient: float, measured: float, target: float, samples: int, horizon: int) -> float:
    """The KL coefficient after so many samples: raised where the measured KL is above the target, by at most a fifth each horizon
    (Ziegler et al. 2019, section 2.2).

    >>> steered(0.1, 12.0, 6.0, 100, 1000)
    0.10200000000000001
    """
    return coefficient * (1 + min(max(measured / target - 1, -0.2), 0.2) * samples / horizon)


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [B, T] each: A_t = δ_t + γ λ A_(t+1), δ_t = r_t + γ V_(t+1) − V_t (Schulman et al. 2016, equation 16).

    After the last token of the mask the value is 0; what stands between masked tokens (a tool's answer) is stepped over.
    """
    after = advantage = torch.zeros_like(values_BT[:, 0])
    advantages = torch.zeros_like(values_BT)
    for t in reversed(range(values_BT.shape[1])):
        here = mask_BT[:, t] > 0
        now = rewards_BT[:, t] + gamma * after - values_BT[:, t] + gamma * lam * advantage
        advantage, after = torch.where(here, now, advantage), torch.where(here, values_BT[:, t], after)
        advantages[:, t] = torch.where(here, now, advantages[:, t])
    return advantages, (advantages + values_BT) * (mask_BT > 0)


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of what the mask holds, [3] in fp64, to be added over ranks before `whitened`."""
    values, mask = values.double(), mask.double()
    return torch.stack((mask.sum(), (values * mask).sum(), (values.square() * mask).sum()))


def whitened(values: Tensor, over: Tensor) -> Tensor:
    """With mean 0 and (unbiased) variance 1 over everything that `over` (of `moments`) has seen."""
    count, total, squares = over.tolist()
    mean = total / max(count, 1)
    variance = max(squares / max(count, 1) - mean**2, 0.0) * count / max(count - 1, 1)
    return (values - mean) / (variance + 1e-8) ** 0.5


def group_advantages(rewards_B: Tensor, group: int, scaled: bool = True) -> Tensor:
    """Each reward less its group's mean, over the group's standard deviation where scaled (Shao et al. 2024, section 4.1.2); not scaled is
    Dr. GRPO (Liu et al. 2025). Consecutive rewards make a group; one that is no number is left out, with no advantage."""
    rewards = rewards_B.view(-1, group)
    sound = rewards.isfinite()
    counted = sound.sum(1, keepdim=True)
    centred = torch.where(sound, rewards, 0.0)
    centred = torch.where(sound, centred - centred.sum(1, keepdim=True) / counted.clamp(min=1), 0.0)
    if scaled:
        centred = centred / ((centred.square().sum(1, keepdim=True) / (counted - 1).clamp(min=1)).sqrt() + STEADY)
    return centred.flatten()


# -- policies and values


def truncated(proximal_BT: Tensor, behaviour_BT: Tensor, most: float) -> Tensor:
    """Weights min(π_proximal / π_behaviour, most) of tokens that another policy drew, without gradient.

    An older policy: decoupled PPO (Hilton et al. 2022, equation 3; AReaL, Fu et al. 2025, equation 5). The generator's arithmetic:
    truncated importance sampling (Yao et al. 2025).
    """
    return (proximal_BT - behaviour_BT).exp().clamp(max=most).detach()


def surrogate(logp_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, low: float, high: float) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) of each token, ρ = π / π_old (Schulman et al. 2017, equation 7; DAPO: two ends)."""
    ratio = (logp_BT - old_BT).exp()
    return -torch.minimum(ratio * advantages_BT, ratio.clamp(1 - low, 1 + high) * advantages_BT)


def clipped(logp_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, low: float, high: float) -> Sum:
    """Tokens whose gradient the clip has stopped."""
    ratio = (logp_BT - old_BT).exp()
    stopped = ((ratio > 1 + high) & (advantages_BT > 0)) | ((ratio < 1 - low) & (advantages_BT < 0))
    return Sum((stopped * mask_BT).sum(), mask_BT.sum())


def ppo(logp_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, clip: float, weights_BT: Tensor | float = 1.0) -> Sum:
    """PPO's policy loss a token; `weights` as of `truncated` for samples that are not of `old`."""
    return Sum((surrogate(logp_BT, old_BT, advantages_BT, clip, clip) * weights_BT * mask_BT).sum(), mask_BT.sum())


def value(values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float) -> Sum:
    """½ max((V − R)², (V_clipped − R)²) a token, V_clipped within ±clip of the old value (Schulman et al.'s code; Ouyang et al. 2022)."""
    near = old_BT + (values_BT - old_BT).clamp(-clip, clip)
    worst = torch.maximum((values_BT - returns_BT).square(), (near - returns_BT).square())
    return Sum((worst * mask_BT).sum() / 2, mask_BT.sum())


def grpo(logp_BT: Tensor, old_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor, low: float, high: float, kind: str = "grpo",
         longest: int = 0, ref_BT: Tensor | None = None, beta: float = 0.0, weights_BT: Tensor | float = 1.0,
         corrected: bool = False) -> Sum:  # fmt: skip
    """Group-relative policy loss with a penalty β k3 of the reference.

    grpo: mean over sequences of each one's mean a token (Shao et al. 2024, equation 3); dapo: mean over all tokens (Yu et al. 2025,
    equation 8); dr_grpo: sum over tokens by sequences × `longest`, the most tokens there may be: length is worth nothing (Liu et al. 2025).
    `corrected` weighs the penalty by ρ, which makes its gradient that of the KL.
    """
    each = surrogate(logp_BT, old_BT, advantages_B.unsqueeze(1), low, high) * weights_BT
    if ref_BT is not None and beta:
        each = each + beta * kl(logp_BT, ref_BT) * ((logp_BT - old_BT).exp() if corrected else 1.0)
    lengths = mask_BT.sum(-1)
    if kind == "grpo":
        return Sum(((each * mask_BT).sum(-1) / lengths.clamp(min=1)).sum(), _count(lengths))
    return Sum((each * mask_BT).sum(), lengths.sum() if kind == "dapo" else _count(lengths) * longest)


def _count(values_B: Tensor) -> Tensor:
    return torch.tensor(float(len(values_B)), device=values_B.device)
