"""Cross-entropy of tokens, in fp32 nats; the vocabulary may be spread over tensor-parallel ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from real.collectives import Line

IGNORED = -100  # a target that does not count


def loss_sum(logits_BTV: Tensor, targets_BT: Tensor, tp: Line | None = None, z_loss: float = 0.0) -> Tensor:
    """Sum over the tokens whose target counts. With z_loss its gradient, not its value, has the term z (ln Z)² besides
    (PaLM, section 5)."""
    logits, targets = logits_BTV.float().flatten(0, 1), targets_BT.flatten()
    if tp is None and not z_loss:
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    return _CrossEntropy.apply(logits, targets, tp, z_loss).sum()  # type: ignore[no-any-return]


def log_probabilities(logits_BTV: Tensor, targets_BT: Tensor, tp: Line | None = None) -> Tensor:
    """Of each target, [B, T]; 0 where it does not count."""
    logits, targets = logits_BTV.float().flatten(0, 1), targets_BT.flatten()
    if tp is None:
        return -F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED).view_as(targets_BT)
    return -_CrossEntropy.apply(logits, targets, tp, 0.0).view_as(targets_BT)  # type: ignore[no-any-return]


class _CrossEntropy(Function):
    """Of each token [N]. Each rank holds the logits of its range of the vocabulary: a maximum, a sum and the target's logit are all
    that travels."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, tp: Line | None, z_loss: float) -> Tensor:
        largest = logits_NV.amax(-1)
        largest = tp.reduce(largest, "max") if tp else largest
        powers = torch.exp(logits_NV - largest.unsqueeze(-1))
        index = targets_N - (tp.rank if tp else 0) * logits_NV.shape[1]
        mine = (index >= 0) & (index < logits_NV.shape[1])
        index = index.where(mine, torch.zeros_like(index))
        target = logits_NV.gather(1, index.unsqueeze(1)).squeeze(1) * mine
        both = torch.stack((powers.sum(-1), target))
        total, target = (tp.reduce(both) if tp else both).unbind()
        log_z, counts = total.log() + largest, targets_N != IGNORED
        ctx.save_for_backward(powers / total.unsqueeze(-1), index, mine, log_z, counts)
        ctx.z_loss = z_loss
        return (log_z - target) * counts

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        share, index, mine, log_z, counts = ctx.saved_tensors
        slope = share * (1 + 2 * ctx.z_loss * log_z).unsqueeze(-1)
        slope.scatter_add_(1, index.unsqueeze(1), -mine.to(slope.dtype).unsqueeze(1))
        return slope * (grad_N * counts).unsqueeze(-1), None, None, None
