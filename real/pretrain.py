"""Pre-training on every rank: steps, evaluations, checkpoints, and their record.

A resumed run is bit-equal to an unbroken one: weights, moments and the data cursor are in the checkpoint, the schedule
and the order of the data are functions of the step, and nothing else is random.
"""

import math
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from conf.errors import Refused
from conf.plan import Plan
from conf.record import Record
from conf.units import show
from real import bigram, checkpoint, huggingface, optim, parallel
from real.cluster import rank
from real.data import Order, Tokens, refuse_small, training
from real.failures import Injector
from real.heartbeat import Pulse, clock
from real.memory import Gauge
from real.power import meter
from real.progress import Progress
from real.timeline import Timeline
from real.trainer import HeldOut, Trainer

STAGE = "pretrain"
WORK = ("data", "compute", "optimizer")  # states in which a rank waits for no other
EMPTY = ("CUDA out of memory", "can't allocate memory", "Cannot allocate memory")  # how devices say that memory has run out
BASELINE_TOKENS = 50_000_000  # above this the bigram would need more memory than a laptop has


@dataclass(frozen=True)
class Start:
    """What the launcher tells the ranks."""

    folder: Path  # of the record
    epoch: float  # moment of real.heartbeat.clock at which the run's clock showed zero
    launched: float  # the run's clock when the ranks were started
    furthest: int  # steps that an earlier attempt had done
    predicted: dict[str, float]  # the simulator's step time [s] and peak memory [B], where it was asked
    source: Path | None = None  # a checkpoint, or a Hugging Face model, to start from
    traced: tuple[int, int] | None = None  # first and last step that torch's profiler watches
    pulse: Pulse | None = None  # where the launcher looks for heartbeats
    whole: Plan | None = None  # the plan of which this is a smaller mesh


def pretrain(plan: Plan, start: Start) -> bool:
    """The whole stage on one rank; returns whether it is done, and was not asked to stop before.

    Raises Refused when memory runs out: what was foretold, what there is, and what would help.
    """
    try:
        return _pretrain(plan, start)
    except (RuntimeError, MemoryError) as error:
        if not any(sign in str(error) for sign in EMPTY) and not isinstance(error, MemoryError):
            raise
        raise Refused(_too_large(plan, start, str(error))) from error


def _too_large(plan: Plan, start: Start, error: str) -> str:
    asked = re.search(r"allocate (\d[\d.]* ?\w+)", error)
    wanted = f"asking for {asked[1]} more" if asked else "asking for more"
    told = start.predicted.get("peak_memory")
    foretold = f"{show(told, 'B')} were foretold" if told else "nothing was foretold (foretold sim does)"
    train = plan.train
    cures = [f"train.micro_batch={train.micro_batch // 2}"] if train.micro_batch > 1 else ["a larger mesh.tp, mesh.pp or mesh.cp"]
    cures += [f"train.recompute={'full' if train.recompute == 'selective' else 'selective'}"] if train.recompute != "full" else []
    return f"rank {rank()} ran out of memory {wanted}: {foretold}, gpu.memory={show(plan.gpu.memory, 'B')}; set {' or '.join(cures)}"


def _pretrain(plan: Plan, start: Start) -> bool:
    record = Record(start.folder, rank(), began=clock(plan) - start.epoch)
    pulse, whole = start.pulse or _alone(plan), start.whole or plan
    injector = Injector(whole, record, rank(), pulse, start.folder)

    def changed(state: str) -> None:
        pulse.beat(rank(), state)
        injector.at(state)

    timeline, power = Timeline(plan.gpu.kind == "cuda", changed), meter(plan.gpu.kind)
    gauge = Gauge(plan.gpu.kind == "cuda")
    record.observe(STAGE, "init", max(0.0, record.now() - start.launched), at=record.now())
    tokens, order = training(start.folder / "tokens", plan)
    held_out = _held_out(plan, start.folder / "tokens")
    trainer = Trainer(plan, tokens, timeline, order)
    injector.attach(trainer.parts, trainer.optimizer.named)
    writer = checkpoint.Writer(start.folder / "checkpoints", whole, injector.at)
    first = _resume(whole, trainer, start, record)
    if first >= (plan.train.steps or math.inf):
        return True
    progress = Progress(plan, start.predicted.get("step_time"), first) if rank() == 0 else None
    book(record, timeline, None)
    step, over, wish = first, False, False
    profiler = _profiler(plan.gpu.kind == "cuda") if start.traced else None
    while not over and not wish:
        injector.begin(step + 1)
        if profiler and start.traced and step + 1 == start.traced[0]:
            profiler.start()
        loss, norm, wish = trainer.step(step, pulse.stop)
        if profiler and start.traced and step + 1 == start.traced[1]:
            profiler.stop()
            profiler.export_chrome_trace(str(start.folder / f"profile.rank{rank()}.json.gz"))
        step += 1
        seconds, states = book(record, timeline, step, replay=step <= start.furthest)
        pulse.stepped(rank(), step, sum(states.get(state, 0.0) for state in WORK))
        tell(plan, record, step, seconds, loss, norm)
        if not math.isfinite(loss):
            cure = f"lower train.learning_rate={plan.train.learning_rate} or train.clip={plan.train.clip}"
            raise Refused(f"the loss of step {step} is {loss}: training diverged; {cure}")
        if progress:
            progress.step(step, loss, seconds)
        over = _over(plan, step, record.now() - start.launched)
        if held_out and _due(step, plan.train.evaluate_every, over):
            _evaluate(plan, trainer, held_out, record, step, progress)
        if _due(step, plan.checkpoint.every, over or wish):
            _save(trainer, writer, record, step)
        _saved(record, writer.poll())
        record.flush()
    trainer.timeline.enter("checkpoint")
    _saved(record, writer.finish())
    book(record, trainer.timeline, None)
    if over:
        _finish(plan, trainer, record, step, held_out, gauge, power.joules())
    record.flush()
    if progress:
        progress.close()
    return over


def _alone(plan: Plan) -> Pulse:
    """Under torchrun nobody listens to the heart, and a rank hears the signals itself."""
    pulse = Pulse(plan.ranks)
    for which in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(which, lambda *_: pulse.ask_to_stop())
    return pulse


def _profiler(cuda: bool) -> torch.profiler.profile:
    """Torch's own, which sees every operator and kernel."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    return torch.profiler.profile(activities=kinds, record_shapes=True)


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


def _held_out(plan: Plan, folder: Path) -> HeldOut | None:
    if not plan.train.evaluate_sequences:
        return None
    rest = Tokens(folder, "held_out", plan.train.seq_len)
    refuse_small(rest, plan, "held_out")
    order = Order(len(rest), plan.seed)
    count = max(plan.dp, min(plan.train.evaluate_sequences, len(rest)) // plan.dp * plan.dp)
    return HeldOut(rest, [order[i] for i in range(count)], folder)


def _resume(plan: Plan, trainer: Trainer, start: Start, record: Record) -> int:
    """Load the newest checkpoint of this plan, else what the run is to start from; returns the steps that it holds."""
    found = _led(lambda: checkpoint.newest(start.folder / "checkpoints", plan) or _elsewhere(plan, start.source))
    if found is None:
        return 0
    path, step, passed_over = found
    with trainer.timeline.during("load"):
        if path.name.startswith("step-"):
            checkpoint.load(path, trainer.parts, trainer.optimizer, step)
        else:
            huggingface.load(path, plan.model, trainer.parts)
    record.event(STAGE, "restart", step, checkpoint=path.name, passed_over=passed_over)
    if rank() == 0:
        for reason in passed_over:
            print(f"passed over: {reason}", flush=True)
        print(f"resumed from {path.name}" if path.parent.parent == start.folder else f"started from {path}", flush=True)
    return step


def _elsewhere(plan: Plan, source: Path | None) -> tuple[Path, int, list[str]] | None:
    """What another run, or another program, has left."""
    if source is None:
        return None
    if (source / "config.json").is_file():
        huggingface.refuse_other(source, plan.model)
        return source, 0, []
    path, manifest = checkpoint.find(source)
    step = plan.step_of(manifest["samples"])
    if step is None:
        have = f"{path} has seen {manifest['samples']} sequences"
        raise Refused(f"{have}, inside a step of train.global_batch={plan.train.global_batch}; set a batch that divides them")
    return path, step, []


def _led(work: Callable[[], Any]) -> Any:
    """What the first rank finds, on every rank; what it refuses, all refuse."""
    told: list[Any] = [None]
    if rank() == 0:
        try:
            told = [work()]
        except Refused as refused:
            told = [refused]
    if dist.is_initialized():
        dist.broadcast_object_list(told, 0)
    if isinstance(told[0], Refused):
        raise told[0]
    return told[0]


def book(record: Record, timeline: Timeline, step: int | None, replay: bool = False) -> tuple[float, dict[str, float]]:
    """Write the states since the last call; returns the seconds between the two, and how they divide."""
    seconds, states = timeline.close()
    for state, value in states.items():
        record.observe(STAGE, "replay" if replay and step is not None else state, value, step)
    if step is not None:
        _bars(record, seconds, states, step)
    return seconds, states


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


def _save(trainer: Trainer, writer: checkpoint.Writer, record: Record, step: int) -> None:
    trainer.timeline.enter("checkpoint")
    _saved(record, writer.save(checkpoint.state(trainer.parts, trainer.optimizer), step))
    book(record, trainer.timeline, None)


def _saved(record: Record, safe: list[tuple[int, int]]) -> None:
    if rank() == 0:
        for step, size in safe:
            record.observe(STAGE, "checkpoint_bytes", size, step)
            record.event(STAGE, "checkpoint", step, bytes=size)


def _finish(plan: Plan, trainer: Trainer, record: Record, step: int, held_out: HeldOut | None, gauge: Gauge, joules: float | None) -> None:
    record.observe(STAGE, "peak_memory", gauge.peak(), step)
    if (reserved := gauge.reserved()) is not None:
        record.observe(STAGE, "reserved_memory", reserved, step)
    count = optim.count(trainer.optimizer.named, trainer.twice)
    if rank() == 0:
        record.observe(STAGE, "parameters", count, step)
        if joules is not None:
            record.observe(STAGE, "energy", joules, step)
        if held_out and plan.samples(step) * plan.train.seq_len <= BASELINE_TOKENS:
            trainer.timeline.enter("evaluate")
            loss = bigram.held_out_loss(_seen(trainer, step), held_out.sequences, plan.model.vocab)
            record.observe(STAGE, "bigram_bits_per_byte", held_out.bits_per_byte(loss), step)
    trainer.timeline.enter("idle")
    if dist.is_initialized():
        dist.barrier()
    book(record, trainer.timeline, None)
    record.event(STAGE, "end", step)
    record.flush()


def _seen(trainer: Trainer, steps: int) -> Iterator[np.ndarray]:
    batches = trainer.batches
    return (batches.tokens.window(batches.order[i]) for i in range(trainer.plan.samples(steps)))
