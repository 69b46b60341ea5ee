"""What trains: this rank's parts of the model, their optimizer and their data, for any mesh."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from conf.plan import Plan
from real import optim, parallel
from real.adapters import adapt, fill
from real.cluster import device
from real.data import Batch, Batches, Blend, Order, Streams, Tokens, batch_of, token_bytes
from real.initial import drawn, initialise
from real.loss import IGNORED, loss_sum
from real.model import Decoder
from real.moe import balance, weigh
from real.pipeline import Pipeline, layers_of, share_tied, stages_of
from real.timeline import Timeline


@dataclass(frozen=True)
class HeldOut:
    """The sequences that evaluations read."""

    tokens: Tokens
    windows: list[int]
    folder: Path  # of the tokens

    @cached_property
    def sequences(self) -> list[np.ndarray]:
        return [self.tokens.window(i) for i in self.windows]

    def bits_per_byte(self, nats: float) -> float:
        """From nats a token: tokens / (ln 2 × bytes that the target tokens stand for)."""
        sizes = token_bytes(self.folder)
        targets = np.concatenate([window[1:] for window in self.sequences])
        return nats * len(targets) / (math.log(2) * float(sizes[targets].sum()))


def laid_out(plan: Plan, axes: parallel.Axes | None, timeline: Timeline, stage: int | None, adapters: bool = False,
             judge: bool = False) -> Decoder:  # fmt: skip
    """The whole model, or one stage of it, on its mesh, without storage; with `adapters` frozen but for those of the plan, as a `judge`
    with a number a token for logits."""
    with torch.device("meta"):
        if stage is None:
            model = Decoder(plan.model, plan.train.recompute, share=plan.train.recompute_share)
        else:
            first, last = stage == 0, stage == plan.mesh.pp * plan.mesh.vpp - 1
            model = Decoder(plan.model, plan.train.recompute, layers_of(plan, stage), first, last, plan.train.recompute_share)
        if judge:
            model.judge()
        if adapters:
            adapt(model, plan)
    if axes is not None:
        parallel.apply(model, plan, axes, timeline)
    elif plan.train.compile:
        parallel.compile_blocks(model)
    return model


def filled(plan: Plan, axes: parallel.Axes | None, timeline: Timeline, stages: Sequence[int | None],
           adapters: bool = False, judge: bool = False) -> list[Decoder]:  # fmt: skip
    """This rank's parts of the model with their initial weights."""
    parts = [laid_out(plan, axes, timeline, stage, adapters, judge) for stage in stages]
    for part in parts:
        part.to_empty(device=device(plan))
        part.tie()
        initialise(part, plan.seed)
        fill(part, partial(drawn, seed=plan.seed, layers=plan.model.layers), axes.at["tp"] if axes else 0)
    return parts


class Trainer:
    """This rank's parts of the model, their optimizer and their data."""

    def __init__(self, plan: Plan, tokens: Streams | Tokens, timeline: Timeline, order: Order | Blend | None = None,
                 adapters: bool = False) -> None:  # fmt: skip
        self.plan, self.timeline, self.device, self.tokens = plan, timeline, device(plan), tokens
        self.axes = parallel.Axes(plan, timeline) if dist.is_initialized() else None
        self.tp = self.axes.tp if self.axes else None
        self.pipeline: Pipeline | None = None
        stages = stages_of(plan, self.axes.pp.rank) if self.axes and self.axes.pp else [None]
        self.adapters, self.parts = adapters, filled(plan, self.axes, timeline, stages, adapters)
        if self.axes and self.axes.pp:
            self.pipeline = Pipeline(self.parts, plan, self.axes.pp, self.device, timeline, self._loss)
        self.optimizer = optim.Optimizer(self.parts, plan.train)
        self.twice = {"embed_tokens.weight"} if plan.model.tied and self.pipeline else set[str]()  # what two stages hold
        self.batches = Batches(tokens, order or Order(len(tokens), plan.seed), plan, self.axes.dp_rank if self.axes else 0)
        self.targets = 1.0  # that count in this step, over all ranks
        self.agree: Callable[[torch.Tensor], bool] | None = None  # of replicas that restart alone

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """This rank's part of the mean loss a token."""
        return loss_sum(logits, targets, self.tp, self.plan.train.z_loss) / self.targets

    def _share(self, batch: Batch) -> Batch:
        """What a context-parallel rank holds of sequences."""
        if self.axes is None or self.axes.cp is None:
            return batch
        return batch.take(self.parts[0].spread(batch.inputs.shape[1] // self.axes.cp.size))

    def step(self, step: int, wish: bool = False, judge: Callable[[float, float], float] | None = None) -> tuple[float, float, bool] | None:
        """One optimizer step; returns the mean loss a token over all ranks, the gradient norm, and whether any rank has the wish.

        A judge sees both numbers first and says the factor of the learning rate; 0 drops the step, which then leaves no trace. None:
        another replica has fallen, and the step is to be done again.
        """
        plan, enter = self.plan, self.timeline.enter
        enter("data")
        batch = self.batches.step(step)
        self.targets = float(self._counted(batch, step))
        for part in self.parts:
            weigh(part, plan.batch(step))
        batch = self._share(batch).to(self.device)
        told = self._forward_backward(batch)
        enter("communication")
        share_tied(self.parts, plan, self.axes.pp if self.axes else None)
        if self.agree and not self.agree(told):
            self.optimizer.zero_grad()
            return None
        enter("optimizer")
        norm, factor = optim.clip(self.optimizer.named, plan.train.clip, self.twice), 1.0
        if judge:
            loss, wished = self._summed(told, wish)
            factor = judge(loss, float(norm))
            enter("optimizer")
        if factor:
            self.optimizer.step(factor * optim.learning_rate(plan.train, step))
        self.optimizer.zero_grad()
        for part in self.parts if not self.adapters else ():
            balance(part, self.axes.stage if self.axes else None, counts=factor > 0)
        if not judge:  # later, so that a GPU is not waited for before the update is launched
            loss, wished = self._summed(told, wish)
        return loss, float(norm), wished

    def _summed(self, told: torch.Tensor, wish: bool) -> tuple[float, bool]:
        """The loss over all ranks, and whether any has the wish."""
        self.timeline.enter("communication")
        loss, wishes = parallel.total(torch.stack((told, torch.full_like(told, float(wish))))).tolist()
        return loss / self.plan.mesh.tp, wishes > 0

    def _counted(self, batch: Batch, step: int) -> int:
        """Targets of the step that count."""
        plan = self.plan
        if batch.documents is None:
            return plan.batch(step) * plan.train.seq_len
        mine = (batch.targets != IGNORED).sum().to(self.device)
        return int(parallel.total(mine)) * plan.dp // plan.ranks

    def _forward_backward(self, batch: Batch) -> torch.Tensor:
        """The step's gradients; returns this rank's part of the loss."""
        if self.pipeline:
            return self.pipeline.step(batch.inputs, batch.targets, batch.documents)
        told, size = torch.zeros((), device=self.device), self.plan.train.micro_batch
        self.timeline.enter("compute")
        for number, micro in enumerate(batch.split(size), 1):
            parallel.synchronise(self.parts[0], last=number * size == len(batch.inputs))
            loss = self._loss(self.parts[0](micro.inputs, micro.documents), micro.targets)
            loss.backward()
            told += loss.detach()
        return told

    @torch.no_grad()
    def evaluate(self, held_out: HeldOut) -> float:
        """Mean loss a token of these sequences, which the data-parallel ranks share."""
        plan, windows, tokens = self.plan, held_out.windows, held_out.tokens
        for part in self.parts:
            part.eval()
        mine, size = windows[self.batches.dp_rank :: plan.dp], plan.train.micro_batch
        told = torch.zeros(2, device=self.device, dtype=torch.float64)  # loss, targets
        for start in range(0, len(mine), size):
            self.timeline.enter("evaluate")
            batch = self._share(batch_of(tokens, mine[start : start + size], plan.train.document_mask)).to(self.device)
            run = self.pipeline.forward if self.pipeline else self.parts[0]
            logits = run(batch.inputs, batch.documents)
            if logits is not None:
                told += torch.stack((loss_sum(logits, batch.targets, self.tp), (batch.targets != IGNORED).sum()))
        for part in self.parts:
            part.train()
        loss, counted = parallel.total(told).tolist()
        return loss / counted
