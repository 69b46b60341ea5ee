"""Pre-training on every rank: steps, evaluations, checkpoints, and their record.

A resumed run is bit-equal to an unbroken one: weights, moments and the data cursor are in the checkpoint, the schedule
and the order of the data are functions of the step, and nothing else is random.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from real.data import Batches, Order, Tokens, refuse_small, token_bytes
from real.memory import Gauge
from real.model import Decoder, initialise, loss_sum
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


class Trainer:
    """Model, optimizer and data of one rank."""

    def __init__(self, plan: Plan, tokens: Tokens, timeline: Timeline) -> None:
        self.plan, self.timeline, self.device = plan, timeline, device(plan)
        self.mesh = parallel.device_mesh(plan)
        self.dp_rank = rank()
        with torch.device("meta"):
            model = Decoder(plan.model, recompute=plan.train.recompute == "full")
        if self.mesh is not None:
            parallel.shard(model, plan, self.mesh, timeline)
        model.to_empty(device=self.device)
        model.tie()
        initialise(model, plan.seed)
        self.model = model
        self.optimizer = optim.optimizer(model, plan.train)
        self.batches = Batches(tokens, plan, self.dp_rank)

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step; returns the mean loss a token over all ranks and the gradient norm."""
        plan, enter = self.plan, self.timeline.enter
        rate = optim.learning_rate(plan.train, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        told = torch.zeros((), device=self.device)
        batches = self.batches.micro_batches(step)
        for micro in range(plan.accumulation):
            enter("data")
            inputs, targets = (t.to(self.device, non_blocking=True) for t in next(batches))
            enter("compute")
            parallel.synchronise(self.model, last=micro == plan.accumulation - 1)
            with parallel.autocast(plan):
                logits = self.model(inputs)
            loss = loss_sum(logits, targets) / plan.tokens_per_step
            del logits
            loss.backward()
            told += loss.detach()
        enter("optimizer")
        norm = optim.clip(self.model, plan.train.clip, plan.mesh.dp_replicate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        enter("communication")
        return float(parallel.total(told)), float(norm)

    @torch.no_grad()
    def evaluate(self, windows: list[np.ndarray]) -> float:
        """Mean loss a token of these windows, which the ranks share."""
        self.model.eval()
        mine = windows[self.dp_rank :: self.plan.dp]
        told = torch.zeros((), device=self.device, dtype=torch.float64)
        for start in range(0, len(mine), self.plan.train.micro_batch):
            batch = torch.from_numpy(np.stack(mine[start : start + self.plan.train.micro_batch])).to(self.device)
            with parallel.autocast(self.plan):
                logits = self.model(batch[:, :-1])
            told += loss_sum(logits, batch[:, 1:])
        self.model.train()
        return float(parallel.total(told)) / (len(windows) * self.plan.train.seq_len)


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
            _evaluate(plan, trainer, held_out, record, step, progress, start.folder)
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


def _splits(plan: Plan, folder: Path) -> tuple[Tokens, list[np.ndarray]]:
    tokens = Tokens(folder, "train", plan.train.seq_len)
    refuse_small(tokens, plan, "train")
    if not plan.train.evaluate_sequences:
        return tokens, []
    rest = Tokens(folder, "held_out", plan.train.seq_len)
    refuse_small(rest, plan, "held_out")
    order = Order(len(rest), plan.seed)
    count = max(plan.dp, min(plan.train.evaluate_sequences, len(rest)) // plan.dp * plan.dp)
    return tokens, [rest.window(order[i]) for i in range(count)]


def _resume(plan: Plan, trainer: Trainer, folder: Path, record: Record) -> int:
    """Load the newest checkpoint of this plan, if there is one; returns the steps it holds."""
    found = checkpoint.newest(folder, plan)
    if found is None:
        return 0
    path, step, passed_over = found
    with trainer.timeline.during("load"):
        checkpoint.load(path, trainer.model, trainer.optimizer)
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


def _evaluate(plan: Plan, trainer: Trainer, windows: list[np.ndarray], record: Record, step: int, progress: Any, run: Path) -> None:
    trainer.timeline.enter("evaluate")
    loss = trainer.evaluate(windows)
    if rank() == 0:
        record.observe(STAGE, "held_out_loss", loss, step)
        record.observe(STAGE, "held_out_bits_per_byte", loss * nats_to_bits_per_byte(windows, run / "tokens"), step)
        record.event(STAGE, "evaluate", step, loss=loss)
        progress.say(f"held-out loss {loss:.4f} nat a token after step {step}")
    book(record, trainer.timeline, None)


def nats_to_bits_per_byte(windows: list[np.ndarray], folder: Path) -> float:
    """Bits a byte for one nat a token: tokens / (ln 2 × bytes that the target tokens stand for)."""
    sizes = token_bytes(folder)
    targets = np.concatenate([window[1:] for window in windows])
    return len(targets) / (math.log(2) * float(sizes[targets].sum()))


def _save(plan: Plan, trainer: Trainer, folder: Path, record: Record, step: int) -> None:
    trainer.timeline.enter("checkpoint")
    size = checkpoint.save(folder, plan, trainer.model, trainer.optimizer, step)
    book(record, trainer.timeline, None)
    if rank() == 0:
        record.observe(STAGE, "checkpoint_bytes", size, step)
        record.event(STAGE, "checkpoint", step, bytes=size)


def _finish(plan: Plan, trainer: Trainer, record: Record, step: int, tokens: Tokens, held_out: list[np.ndarray],
            peak: float, joules: float | None, start: Start) -> None:  # fmt: skip
    record.observe(STAGE, "peak_memory", peak, step)
    if rank() == 0:
        record.observe(STAGE, "parameters", sum(p.numel() for p in trainer.model.parameters()), step)
        if joules is not None:
            record.observe(STAGE, "energy", joules, step)
        if held_out and step * plan.tokens_per_step <= BASELINE_TOKENS:
            trainer.timeline.enter("evaluate")
            loss = bigram.held_out_loss(_seen(plan, tokens, step), held_out, plan.model.vocab)
            record.observe(STAGE, "bigram_bits_per_byte", loss * nats_to_bits_per_byte(held_out, start.folder / "tokens"), step)
    trainer.timeline.enter("idle")
    if dist.is_initialized():
        dist.barrier()
    book(record, trainer.timeline, None)
    record.event(STAGE, "end", step)
    record.flush()


def _seen(plan: Plan, tokens: Tokens, steps: int) -> Iterator[np.ndarray]:
    order = Order(len(tokens), plan.seed)
    return (tokens.window(order[i]) for i in range(steps * plan.train.global_batch))
