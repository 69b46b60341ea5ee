"""Optimizers, their schedule, and one gradient norm for every kind of parameter.

AdamW works on each rank's own shards: its arithmetic is element by element, so nothing is lost, and plain tensors cost a
quarter of DTensor's time. Muon needs whole matrices and gathers them.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from conf.errors import Refused
from conf.plan import Train
from real.initial import canonical
from real.model import Decoder
from real.muon import Muon


class Optimizer:
    """What updates the parameters of a rank's parts of the model."""

    def __init__(self, parts: Sequence[Decoder], train: Train) -> None:
        self.named = [(canonical(part, name), p) for part in parts for name, p in part.named_parameters() if p.requires_grad]
        muon = {name for name, p in self.named if train.optimizer == "muon" and _is_hidden(name, p)}
        self.whole = [p for name, p in self.named if name in muon]
        self.shards = [(p, nn.Parameter(local(p.detach()))) for name, p in self.named if name not in muon]
        groups = [
            {"params": [s for p, s in self.shards if (p.dim() > 1) == matrices], "weight_decay": train.weight_decay * matrices}
            for matrices in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        self.parts: list[torch.optim.Optimizer] = [_adam(groups, train)] if groups else []
        if self.whole:
            self.parts.append(Muon(self.whole, train.learning_rate, momentum=train.beta2, weight_decay=train.weight_decay))

    def step(self, rate: float) -> None:
        for p, shard in self.shards:
            shard.grad = None if p.grad is None else local(p.grad)
        self._advance(rate)

    def _advance(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao compiles its step, in which a number would be a constant
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            part.step()

    def zero_grad(self) -> None:
        for p, shard in self.shards:
            p.grad = shard.grad = None
        for p in self.whole:
            p.grad = None

    def state(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name, parameter and state of each parameter; the state's tensors are this rank's, or DTensors."""
        held = dict(zip((id(p) for p, _ in self.shards), (s for _, s in self.shards), strict=True))
        for name, p in self.named:
            key = held.get(id(p), p)
            for part in self.parts:
                if key in part.state:
                    yield name, p, part.state[key]

    def begin(self) -> None:
        """Make the state exist, all zeros, so that a checkpoint can be read into it."""
        for _, shard in self.shards:
            shard.grad = torch.zeros_like(shard)
        for p in self.whole:
            p.grad = torch.zeros_like(p)
        self._advance(0.0)
        self.zero_grad()


def _is_hidden(name: str, parameter: Tensor) -> bool:
    """Matrices inside the blocks: those that Muon is for (Jordan et al. 2024)."""
    return parameter.dim() == 2 and not name.startswith(("embed", "lm_head"))


def _adam(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.epsilon}
    if train.optimizer != "adamw8bit":
        return torch.optim.AdamW(groups, **common, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise Refused("train.optimizer=adamw8bit needs torchao; install it with: pip install 'foretold[adam8bit]'") from error
    out: torch.optim.Optimizer = AdamW8bit(groups, **common)
    return out


def learning_rate(train: Train, step: int) -> float:
    """Rate of step 0, 1, …: linear warm-up, then cosine, linear, warm-up–stable–decay (Hu et al. 2024), or constant."""
    if step < train.warmup:
        return train.learning_rate * (step + 1) / train.warmup
    if train.schedule == "constant" or train.steps is None:
        return train.learning_rate
    floor = train.learning_rate * train.final_rate
    span = train.steps - train.warmup
    done = (step - train.warmup) / max(1, span)
    if train.schedule == "cosine":
        return floor + (train.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if train.schedule == "linear":
        return floor + (train.learning_rate - floor) * (1 - done)
    left = min(1.0, (1 - done) / train.decay) if train.decay else 1.0
    return floor + (train.learning_rate - floor) * left


@torch.no_grad()
def clip(parameters: Iterable[tuple[str, Tensor]], largest: float, twice: Collection[str] = ()) -> Tensor:
    """Scale the gradients to a global norm of at most `largest`; returns the norm before.

    Works on each rank's own shards, so it is right for sharded, plain, expert and pipeline parameters alike: one sum of
    squares over all ranks, in which every element counts once, however many ranks hold a copy of it; `twice` names what
    two pipeline stages hold.
    """
    copies = defaultdict[float, list[Tensor]](list)
    for name, p in parameters:
        if p.grad is not None:
            copies[_copies(p) * (1 + (name in twice))].append(local(p.grad))
    grads = [g for several in copies.values() for g in several]
    squares = sum((sum_of_squares(several) / count for count, several in copies.items()), torch.zeros((), device=grads[0].device))
    if dist.is_initialized():
        dist.all_reduce(squares)
    norm = squares.sqrt()
    shrink(grads, norm, largest)
    return norm


def count(parameters: Sequence[tuple[str, Tensor]], twice: Collection[str] = ()) -> int:
    """Parameters over all ranks, each counted once."""
    mine = sum(local(p).numel() / (_copies(p) * (1 + (name in twice))) for name, p in parameters)
    total = torch.tensor(mine, dtype=torch.float64)
    if dist.is_initialized():
        total = total.to(parameters[0][1].device)
        dist.all_reduce(total)
    return round(float(total))


def _copies(parameter: Tensor) -> float:
    """Ranks of the parameter's mesh that hold the same part of it."""
    if not isinstance(parameter, DTensor):
        return 1.0
    return math.prod(parameter.device_mesh.size(i) for i, p in enumerate(parameter.placements) if isinstance(p, Replicate))


def sum_of_squares(grads: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(grads)).square().sum()


def shrink(grads: list[Tensor], norm: Tensor, largest: float) -> None:
    torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
