"""Networks of the alignment on the trainers' mesh: a policy, its reference, a critic or a reward model, and how they are taught.

Sequences are rows that are padded on the right, so that nothing needs a mask: what a token sees lies before it. Every data-parallel rank
works on its share of a step's rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conf.plan import Plan
from real import checkpoint, optim, parallel
from real.adapters import Adapted, load_base
from real.cluster import device
from real.loss import IGNORED, log_probabilities
from real.objectives import Sum
from real.timeline import Timeline
from real.trainer import filled

EVEN = 8  # rows are padded to a multiple of so many tokens, and of the tensor-parallel ranks


@dataclass(frozen=True)
class Rows:
    """Sequences: tokens [N, T + 1], which of the targets [N, T] count, and numbers of their own, [N] or [N, T]."""

    tokens: Tensor
    mask: Tensor
    beside: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, name: str) -> Tensor:
        return self.beside[name]

    def __contains__(self, name: str) -> bool:
        return name in self.beside

    def take(self, rows: slice) -> "Rows":
        return Rows(self.tokens[rows], self.mask[rows], {name: value[rows] for name, value in self.beside.items()})

    def split(self, size: int) -> Iterator["Rows"]:
        """Micro-batches of so many rows."""
        return (self.take(slice(start, start + size)) for start in range(0, len(self), size))

    def beside_them(self, **values: Tensor) -> "Rows":
        return Rows(self.tokens, self.mask, self.beside | values)

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.tokens.to(device), self.mask.to(device), {name: value.to(device) for name, value in self.beside.items()})


def rows_of(tokens: Sequence[Sequence[int] | np.ndarray], learned: Sequence[np.ndarray], even: int) -> Rows:
    """Sequences of different lengths as rows, of which each token is an input; `learned` says which are to be predicted."""
    width = max(map(len, tokens))
    width += -width % even
    both, mask = np.zeros((len(tokens), width + 1), np.int64), np.zeros((len(tokens), width), np.float32)
    for row, (ids, wanted) in enumerate(zip(tokens, learned, strict=True)):
        both[row, : len(ids)] = ids
        mask[row, : len(ids) - 1] = wanted[1:]
    return Rows(torch.from_numpy(both), torch.from_numpy(mask))


class Network:
    """A model on the trainers' mesh; without an optimizer it is frozen. With `judge` it gives a number a token."""

    def __init__(self, plan: Plan, axes: parallel.Axes | None, timeline: Timeline, base: Path | None, *, adapters: bool = False,
                 judge: bool = False, rate: float | None = None) -> None:  # fmt: skip
        self.plan, self.axes, self.timeline, self.device = plan, axes, timeline, device(plan)
        self.tp = axes.tp if axes else None
        self.parts = filled(plan, axes, timeline, [None], adapters, judge)
        self.model = self.parts[0]
        if base is not None:
            load_base(base, plan, self.parts, self.tp.rank if self.tp else 0)
        self.rate = rate
        self.optimizer = optim.Optimizer(self.parts, plan.train) if rate is not None else None
        if self.optimizer is None:
            self.model.requires_grad_(False).eval()

    @property
    def even(self) -> int:
        return EVEN * (self.tp.size if self.tp else 1)

    def mine(self, rows: Rows) -> Rows:
        """This data-parallel rank's share, on its device."""
        share = len(rows) // self.plan.dp
        first = (self.axes.dp_rank if self.axes else 0) * share
        return rows.take(slice(first, first + share)).to(self.device)

    def logp(self, rows: Rows, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the targets that count, [N, T], 0 elsewhere."""
        targets = rows.tokens[:, 1:].masked_fill(rows.mask == 0, IGNORED)
        logits = self.model(rows.tokens[:, :-1].contiguous())
        return log_probabilities(logits / temperature if temperature != 1.0 else logits, targets, self.tp)

    def values(self, rows: Rows) -> Tensor:
        """The number that it gives each token that predicts a target, [N, T]."""
        return self.model(rows.tokens[:, :-1].contiguous()).float().squeeze(-1)

    @torch.no_grad()
    def asked(self, what: Callable[[Rows], Tensor], rows: Rows, state: str) -> Tensor:
        """`logp` or `values` of rows, without gradients, micro-batch by micro-batch."""
        self.model.eval()
        with self.timeline.during(state):
            told = torch.cat([what(micro) for micro in rows.split(self.plan.train.micro_batch)])
        self.model.train(self.optimizer is not None)
        return told

    def everyone(self, mine: Tensor, rows: Rows) -> Tensor:
        """Every data-parallel rank's answers, as those of all rows."""
        if self.axes is None:
            return mine.cpu()
        whole = mine.new_zeros((len(rows), *mine.shape[1:]))
        whole[self.axes.dp_rank * len(mine) :][: len(mine)] = mine
        with self.timeline.during("communication"):
            return (parallel.total(whole) / (self.tp.size if self.tp else 1)).cpu()

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """The base without its adapters."""
        adapted = [module for module in self.model.modules() if isinstance(module, Adapted)]
        for module in adapted:
            module.active = False
        yield
        for module in adapted:
            module.active = True

    def learn(self, rows: Rows, loss: Callable[[Rows], Sum], count: float, step: int, whole: float = 1.0) -> tuple[float, float]:
        """One optimizer step on this rank's rows; returns the mean loss over all ranks, and the gradient's norm.

        `loss` gives sums, `count` is what they are divided by over all ranks. `whole` is the share of the loss that is this
        tensor-parallel rank's: 1 where each holds a part of the logits, 1 / tp of what each computes alike.
        """
        assert self.optimizer is not None and self.rate is not None
        told = torch.zeros((), device=self.device)
        self.timeline.enter("compute")
        size = self.plan.train.micro_batch
        for number, micro in enumerate(rows.split(size), 1):
            parallel.synchronise(self.model, last=number * size >= len(rows))
            total = loss(micro).total / count
            (total * whole).backward()
            told += total.detach()
        self.timeline.enter("optimizer")
        norm = optim.clip(self.optimizer.named, self.plan.train.clip)
        self.optimizer.step(self.rate / self.plan.train.learning_rate * optim.learning_rate(self.plan.train, step))
        self.optimizer.zero_grad()
        return self.total(told), float(norm)

    def judged(self) -> float:
        """The share of a loss on `values` that is this rank's."""
        return 1.0 / (self.tp.size if self.tp else 1)

    def total(self, value: Tensor) -> float:
        """The sum over data-parallel ranks; tensor-parallel ones hold the same."""
        with self.timeline.during("communication"):
            return float(parallel.total(value.clone())) / (self.tp.size if self.tp else 1)

    def state(self, prefix: str = "") -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        assert self.optimizer is not None
        return {prefix + name: tensor for name, tensor in checkpoint.state(self.parts, self.optimizer).items()}

    def load(self, path: Path, step: int, prefix: str = "") -> None:
        assert self.optimizer is not None
        checkpoint.load(path, self.parts, self.optimizer, step, prefix)
