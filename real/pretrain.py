"""Pre-training on every rank: steps, evaluations, checkpoints, and their record.

A resumed run is bit-equal to an unbroken one: weights, moments and the data cursor are in the checkpoint, the schedule
and the order of the data are functions of the step, and nothing else is random.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from conf.errors import Refused
from conf.plan import Plan
from conf.record import Record
from real import bigram, checkpoint, optim, parallel
from real.cluster import device, rank
from real.data import Batch, Batches, Order, Tokens, batch_of, refuse_small, token_bytes
from real.initial import initialise
from real.loss import IGNORED, loss_sum
from real.memory import Gauge
from real.model import Decoder
from real.moe import balance
from real.pipeline import Pipeline, layers_of, share_tied, stages_of
from real.power import meter
from real.progress import Progress
from real.timeline import Timeline

STAGE = "pretrain"
BASELINE_TOKENS = 50_000_000  # above this the bigram would need more memory than a laptop has


@dataclass(frozen=True)
class Start:
    """What the launcher tells the ranks."""

    folder: Path  # of the record
    epoch: float  # wall-clock time (Unix) at which the run's clock showed zero
    launched: float  # the run's clock when the ranks were started
    furthest: int  # steps that an earlier attempt had done
    predicted: float | None  # the simulator's step time [s]


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


class Trainer:
    """This rank's parts of the model, their optimizer and their data."""

    def __init__(self, plan: Plan, tokens: Tokens, timeline: Timeline) -> None:
        self.plan, self.timeline, self.device, self.tokens = plan, timeline, device(plan), tokens
        self.axes = parallel.Axes(plan, timeline) if dist.is_initialized() else None
        self.tp = self.axes.tp if self.axes else None
        self.pipeline: Pipeline | None = None
        if self.axes and self.axes.pp:
            self.parts = [self._part(number) for number in stages_of(plan, self.axes.pp.rank)]
            self.pipeline = Pipeline(self.parts, plan, self.axes.pp, self.device, timeline, self._loss)
        else:
            self.parts = [self._part()]
        self.optimizer = optim.Optimizer(self.parts, plan.train)
        self.twice = {"embed_tokens.weight"} if plan.model.tied and self.pipeline else set[str]()  # what two stages hold
        self.batches = Batches(tokens, plan, self.axes.dp_rank if self.axes else 0)
        self.targets = 1.0  # that count in this step, over all ranks

    def _part(self, stage: int | None = None) -> Decoder:
        """The whole model, or one stage of it, sharded and filled."""
        plan = self.plan
        with torch.device("meta"):
            if stage is None:
                model = Decoder(plan.model, plan.train.recompute)
            else:
                ends = {"first": stage == 0, "last": stage == plan.mesh.pp * plan.mesh.vpp - 1}
                model = Decoder(plan.model, plan.train.recompute, layers_of(plan, stage), **ends)
        if self.axes is not None:
            parallel.apply(model, plan, self.axes, self.timeline)
        elif plan.train.compile:
            parallel.compile_blocks(model)
        model.to_empty(device=self.device)
        model.tie()
        initialise(model, plan.seed)
        return model

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """This rank's part of the mean loss a token."""
        return loss_sum(logits, targets, self.tp, self.plan.train.z_loss) / self.targets

    def _share(self, batch: Batch) -> Batch:
        """What a context-parallel rank holds of sequences."""
        if self.axes is None or self.axes.cp is None:
            return batch
        return batch.take(self.parts[0].spread(batch.inputs.shape[1] // self.axes.cp.size))

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step; returns the mean loss a token over all ranks and the gradient norm."""
        plan, enter = self.plan, self.timeline.enter
        enter("data")
        batch = self.batches.step(step)
        self.targets = float(self._counted(batch))
        batch = self._share(batch).to(self.device)
        told = self._forward_backward(batch)
        enter("communication")
        share_tied(self.parts, plan, self.axes.pp if self.axes else None)
        enter("optimizer")
        norm = optim.clip(self.optimizer.named, plan.train.clip, self.twice)
        self.optimizer.step(optim.learning_rate(plan.train, step))
        self.optimizer.zero_grad()
        for part in self.parts:
            balance(part, self.axes.stage if self.axes else None)
        enter("communication")
        return float(parallel.total(told)) / plan.mesh.tp, float(norm)

    def _counted(self, batch: Batch) -> int:
        """Targets of the step that count."""
        plan = self.plan
        if batch.documents is None:
            return plan.tokens_per_step
        mine = (batch.targets != IGNORED).sum().to(self.device)
        return int(parallel.total(mine)) * plan.dp // plan.ranks

    def _forward_backward(self, batch: Batch) -> torch.Tensor:
        """The step's gradients; returns this rank's part of the loss."""
        if self.pipeline:
            return self.pipeline.step(batch.inputs, batch.targets, batch.documents)
        told, count = torch.zeros((), device=self.device), self.plan.accumulation
        self.timeline.enter("compute")
        for number, micro in enumerate(batch.split(self.plan.train.micro_batch)):
            parallel.synchronise(self.parts[0], last=number == count - 1)
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
            batch = self._share(batch_of(tokens, mine[start : start + size], plan.train.document_mask)).to(self.device)
            run = self.pipeline.forward if self.pipeline else self.parts[0]
            logits = run(batch.inputs, batch.documents)
            if logits is not None:
                told += torch.stack((loss_sum(logits, batch.targets, self.tp), (batch.targets != IGNORED).sum()))
        for part in self.parts:
            part.train()
        loss, counted = parallel.total(told).tolist()
        return loss / counted


def pretrain(plan: Plan, start: Start) -> None:
    """The whole stage on one rank."""
    record = Record(start.folder, rank(), began=time.time() - start.epoch)
    timeline, power = Timeline(plan.gpu.kind == "cuda"), meter(plan.gpu.kind)
    gauge = Gauge(plan.gpu.kind == "cuda")
    record.observe(STAGE, "init", max(0.0, record.now() - start.launched), at=record.now())
    tokens, held_out = _splits(plan, start.folder / "tokens")
    trainer = Trainer(plan, tokens, timeline)
    folder = start.folder / "checkpoints"
    first = _resume(plan, trainer, folder, record)
    if first >= (plan.train.steps or math.inf):
        return
    progress = Progress(plan, start.predicted, first) if rank() == 0 else None
    book(record, timeline, None)
    step, over = first, False
    while not over:
        loss, norm = trainer.step(step)
        step += 1
        seconds = book(record, timeline, step, replay=step <= start.furthest)
        tell(plan, record, step, seconds, loss, norm)
        if not math.isfinite(loss):
            cure = f"lower train.learning_rate={plan.train.learning_rate} or train.clip={plan.train.clip}"
            raise Refused(f"the loss of step {step} is {loss}: training diverged; {cure}")
        if progress:
            progress.step(step, loss, seconds)
        over = _over(plan, step, record.now() - start.launched)
        if held_out and _due(step, plan.train.evaluate_every, over):
            _evaluate(plan, trainer, held_out, record, step, progress)
        if _due(step, plan.checkpoint.every, over):
            _save(plan, trainer, folder, record, step)
        record.flush()
    _finish(plan, trainer, record, step, tokens, held_out, gauge.peak(), power.joules(), start)
    if progress:
        progress.close()


def tell(plan: Plan, record: Record, step: int, seconds: float, loss: float, norm: float) -> None:
    record.observe(STAGE, "step_time", seconds, step)
    if rank() == 0:
        record.observe(STAGE, "loss", loss, step)
        record.observe(STAGE, "gradient_norm", norm, step)
        record.observe(STAGE, "learning_rate", optim.learning_rate(plan.train, step - 1), step)


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _over(plan: Plan, step: int, elapsed: float) -> bool:
    if plan.train.steps is not None and step >= plan.train.steps:
        return True
    if plan.train.stop_after is None:
        return False
    verdict = torch.tensor([float(elapsed >= plan.train.stop_after)])
    return bool(parallel.total(verdict).item() > 0)  # one verdict for all: clocks differ


def _splits(plan: Plan, folder: Path) -> tuple[Tokens, HeldOut | None]:
    tokens = Tokens(folder, "train", plan.train.seq_len)
    refuse_small(tokens, plan, "train")
    if not plan.train.evaluate_sequences:
        return tokens, None
    rest = Tokens(folder, "held_out", plan.train.seq_len)
    refuse_small(rest, plan, "held_out")
    order = Order(len(rest), plan.seed)
    count = max(plan.dp, min(plan.train.evaluate_sequences, len(rest)) // plan.dp * plan.dp)
    return tokens, HeldOut(rest, [order[i] for i in range(count)], folder)


def _resume(plan: Plan, trainer: Trainer, folder: Path, record: Record) -> int:
    """Load the newest checkpoint of this plan, if there is one; returns the steps it holds."""
    found = checkpoint.newest(folder, plan)
    if found is None:
        return 0
    path, step, passed_over = found
    with trainer.timeline.during("load"):
        checkpoint.load(path, trainer.parts, trainer.optimizer, step)
    record.event(STAGE, "restart", step, checkpoint=path.name, passed_over=passed_over)
    if rank() == 0:
        for reason in passed_over:
            print(f"passed over: {reason}", flush=True)
        print(f"resumed from {path.name}", flush=True)
    return step


def book(record: Record, timeline: Timeline, step: int | None, replay: bool = False) -> float:
    """Write the states since the last call; returns the seconds between the two."""
    seconds, states = timeline.close()
    for state, value in states.items():
        record.observe(STAGE, "replay" if replay and step is not None else state, value, step)
    if step is not None:
        _bars(record, seconds, states, step)
    return seconds


def _bars(record: Record, seconds: float, states: dict[str, float], step: int) -> None:
    start = record.now() - seconds
    record.span(f"step {step}", start, start + seconds, STAGE, step)
    for state, value in states.items():
        record.span(state, start, start + value, STAGE, step)
        start += value


def _evaluate(plan: Plan, trainer: Trainer, held_out: HeldOut, record: Record, step: int, progress: Any) -> None:
    trainer.timeline.enter("evaluate")
    loss = trainer.evaluate(held_out)
    if rank() == 0:
        record.observe(STAGE, "held_out_loss", loss, step)
        record.observe(STAGE, "held_out_bits_per_byte", held_out.bits_per_byte(loss), step)
        record.event(STAGE, "evaluate", step, loss=loss)
        progress.say(f"held-out loss {loss:.4f} nat a token after step {step}")
    book(record, trainer.timeline, None)


def _save(plan: Plan, trainer: Trainer, folder: Path, record: Record, step: int) -> None:
    trainer.timeline.enter("checkpoint")
    size = checkpoint.save(folder, plan, trainer.parts, trainer.optimizer, step)
    book(record, trainer.timeline, None)
    if rank() == 0:
        record.observe(STAGE, "checkpoint_bytes", size, step)
        record.event(STAGE, "checkpoint", step, bytes=size)


def _finish(plan: Plan, trainer: Trainer, record: Record, step: int, tokens: Tokens, held_out: HeldOut | None,
            peak: float, joules: float | None, start: Start) -> None:  # fmt: skip
    record.observe(STAGE, "peak_memory", peak, step)
    count = optim.count(trainer.optimizer.named, trainer.twice)
    if rank() == 0:
        record.observe(STAGE, "parameters", count, step)
        if joules is not None:
            record.observe(STAGE, "energy", joules, step)
        if held_out and step * plan.tokens_per_step <= BASELINE_TOKENS:
            trainer.timeline.enter("evaluate")
            loss = bigram.held_out_loss(_seen(plan, tokens, step), held_out.sequences, plan.model.vocab)
            record.observe(STAGE, "bigram_bits_per_byte", held_out.bits_per_byte(loss), step)
    trainer.timeline.enter("idle")
    if dist.is_initialized():
        dist.barrier()
    book(record, trainer.timeline, None)
    record.event(STAGE, "end", step)
    record.flush()


def _seen(plan: Plan, tokens: Tokens, steps: int) -> Iterator[np.ndarray]:
    order = Order(len(tokens), plan.seed)
    return (tokens.window(order[i]) for i in range(steps * plan.train.global_batch))
