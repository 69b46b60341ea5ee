"""AdamW, its schedule, and one gradient norm for every kind of parameter."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conf.plan import Train


def optimizer(model: nn.Module, train: Train) -> torch.optim.AdamW:
    """AdamW in one fused kernel; weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.epsilon, fused=True)


def learning_rate(train: Train, step: int) -> float:
    """Rate of step 0, 1, …: linear warm-up, then cosine, warm-up–stable–decay (Hu et al. 2024), or constant."""
    if step < train.warmup:
        return train.learning_rate * (step + 1) / train.warmup
    if train.schedule == "constant" or train.steps is None:
        return train.learning_rate
    floor = train.learning_rate * train.final_rate
    span = train.steps - train.warmup
    done = (step - train.warmup) / max(1, span)
    if train.schedule == "cosine":
        return floor + (train.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * done))
    left = min(1.0, (1 - done) / train.decay) if train.decay else 1.0
    return floor + (train.learning_rate - floor) * left


@torch.no_grad()
def clip(model: nn.Module, largest: float, replicas: int = 1) -> Tensor:
    """Scale the gradients to a global norm of at most `largest`; returns the norm before.

    Works on each rank's own shards, so it is right for sharded and plain parameters alike: one sum of squares over all
    ranks, each of `replicas` copies counted once.
    """
    grads = gradients(model)
    squares = sum_of_squares(grads)
    if dist.is_initialized():
        dist.all_reduce(squares)
    norm = (squares / replicas).sqrt()
    shrink(grads, norm, largest)
    return norm


def gradients(model: nn.Module) -> list[Tensor]:
    """This rank's parts of the gradients."""
    return [local(p.grad) for p in model.parameters() if p.grad is not None]


def sum_of_squares(grads: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(grads)).square().sum()


def shrink(grads: list[Tensor], norm: Tensor, largest: float) -> None:
    torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
