"""Pre-training on every rank: steps, evaluations, checkpoints, and their record.

A resumed run is bit-equal to an unbroken one: weights, moments and the data cursor are in the checkpoint, the schedule
and the order of the data are functions of the step, and nothing else is random.
"""

import math
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from conf.errors import Refused
from conf.plan import Plan
from conf.record import Record
from conf.units import show
from real import bigram, checkpoint, optim, parallel, tiers
from real.adapters import load_base
from real.buddy import Buddy
from real.cluster import rank
from real.data import Chats, Order, Tokens, refuse_small, training, tuning
from real.failures import Injector
from real.heartbeat import Pulse, clock
from real.integrity import differing
from real.memory import Gauge
from real.power import meter
from real.profile import Watched
from real.progress import Progress
from real.replica import Replicas
from real.resume import fill, led, newest, resume
from real.stability import Decision, Guard
from real.straggler import Scores
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
    began: float  # the run's clock when the stage began
    launched: float  # and when these ranks were started
    furthest: int  # steps that an earlier attempt had done
    predicted: dict[str, float]  # the simulator's step time [s] and peak memory [B], where it was asked
    source: Path | None = None  # a checkpoint, or a Hugging Face model, to start from
    base: Path | None = None  # such a one whose weights are fine-tuned here
    traced: tuple[int, int] | None = None  # first and last step that torch's profiler watches
    pulse: Pulse | None = None  # where the launcher looks for heartbeats
    whole: Plan | None = None  # the plan of which this is a smaller mesh, or one replica
    replica: int | None = None  # which, where replicas restart alone


def pretrain(plan: Plan, start: Start) -> bool:
    """The whole stage on one rank; returns whether it is done, and was not asked to stop before.

    Raises Refused when memory runs out: what was foretold, what there is, and what would help.
    """
    try:
        return Training(plan, start).run()
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


class Training:
    """One rank's part of the stage."""

    def __init__(self, plan: Plan, start: Start) -> None:
        self.plan, self.start, whole = plan, start, start.whole or plan
        first = plan.ranks * (start.replica or 0)
        self.record = record = Record(start.folder, first + rank(), began=clock(plan) - start.epoch)
        self.pulse = start.pulse or alone(plan)
        self.injector = Injector(whole, record, rank(), self.pulse, start.folder, first)
        cuda = plan.gpu.kind == "cuda"
        self.timeline, self.power, self.gauge = Timeline(cuda, self._changed), meter(plan.gpu.kind), Gauge(cuda)
        record.observe(STAGE, "init", max(0.0, record.now() - start.launched), at=record.now())
        tokens, order = (tuning if start.base else training)(start.folder / "tokens", plan)
        self.held_out = _held_out(plan, start.folder / "tokens", Chats if start.base else Tokens)
        self.trainer = Trainer(plan, tokens, self.timeline, order, adapters=start.base is not None and plan.finetune.adapters)
        if start.base:
            with self.timeline.during("load"):
                load_base(start.base, plan, self.trainer.parts, self.trainer.tp.rank if self.trainer.tp else 0)
        self.injector.attach(self.trainer.parts, self.trainer.optimizer.named)
        self.whole, self.tiers = whole, tiers.tiers(whole, start.folder)
        self.writers: dict[tiers.Tier, checkpoint.Writer | Buddy] = {
            tier: checkpoint.Writer(tier.folder, whole, self.injector.at) for tier in self.tiers
        }
        if plan.cluster.nodes > 1 and self.tiers[:-1]:
            run = led(lambda: tiers.run_of(start.folder))
            self.writers |= {tier: Buddy(tier.name, tier.folder, whole, run, self.injector.at) for tier in self.tiers[:-1]}
        self.buddies = [writer for writer in self.writers.values() if isinstance(writer, Buddy)]
        self.guard = led(lambda: Guard(whole, start.folder))
        self.trainer.batches.passed_over = self.guard.samples
        self.scores = Scores(plan.ranks, plan.mesh.pp) if start.pulse and rank() == 0 else None
        self.watched = Watched(start.traced, start.folder, cuda)
        self.step = resume(whole, self.trainer, start.folder, start.source, record, self.buddies)
        self.replicas: Replicas | None = None
        if start.replica is not None:
            self.replicas = Replicas(plan, start.replica, self.trainer.parts, self.trainer.optimizer)
            self.trainer.agree, self.trainer.batches.dealt = self.replicas.agree, self.replicas.share
        self.decision: Decision | None = None
        self.progress: Progress | None = None

    def _changed(self, state: str) -> None:
        self.pulse.beat(rank(), state)
        self.injector.at(state)

    def run(self) -> bool:
        """Steps until the end; returns whether that was reached."""
        plan, record, over, wish = self.plan, self.record, False, False
        if self.step >= (plan.train.steps or math.inf):
            return True
        self.progress = Progress(plan, self.start.predicted.get("step_time"), self.step) if rank() == 0 else None
        self.guard.resume(self.step)
        book(record, self.timeline, None)
        while not over and not wish:
            if self.replicas:
                self._meet(self.replicas)
            told = self._step()
            if told is None:
                continue
            wish = told
            if self.decision and self.decision.answer in ("rollback", "verify"):
                self._back(self.decision.to)
                continue
            last = _over(plan, self.step, record.now() - self.start.began)
            if self.held_out and _due(self.step, plan.train.evaluate_every, last):
                self._evaluate(self.held_out)
            due = list(tiers.due(self.tiers, self.step, last or wish))
            if (due or _due(self.step, plan.failures.verify_every, False)) and not self._sound():
                continue
            over = last
            for tier in due if self.replicas is None or self.replicas.leads else ():
                self._save(tier)
            for tier, writer in self.writers.items():
                self._saved(tier, writer.poll())
            record.flush()
        self.timeline.enter("checkpoint")
        self._settle()
        book(record, self.timeline, None)
        if over:
            self._finish()
        record.flush()
        if self.replicas:
            self.replicas.close()
        if self.progress:
            self.progress.close()
        return over

    # -- a step

    def _meet(self, replicas: Replicas) -> None:
        """Who is up for the next step; a replica that was away gets the state of the others."""
        with self.timeline.during("idle"):
            step, changed = replicas.begin(self.step)
        if changed:
            self.trainer.batches.rewind()
            if rank() == 0:
                self.record.event(STAGE, "quorum", step, replicas=replicas.up)
        if step != self.step:
            self.record.event(STAGE, "rejoin", step)
            self.step = step
        book(self.record, self.timeline, None)

    def _step(self) -> bool | None:
        """One step, told; returns whether somebody wishes the run to stop, None where the step is to be done again."""
        plan, record = self.plan, self.record
        self.decision = None
        self.injector.begin(self.step + 1)
        self.watched.before(self.step + 1)
        told = self.trainer.step(self.step, self.pulse.stop, self._judge if self.guard.awake else None)
        self.watched.after(self.step + 1)
        if told is None:
            book(record, self.timeline, None)
            return None
        loss, norm, wish = told
        self.step += 1
        seconds, states = book(record, self.timeline, self.step, replay=self.step <= self.start.furthest)
        work = sum(states.get(state, 0.0) for state in WORK)
        self.pulse.stepped(rank(), self.step, work)
        tell(plan, record, self.step, seconds, loss, norm)
        if self.decision:
            self._decided(self.decision)
        elif not math.isfinite(loss):
            cure = f"lower train.learning_rate={plan.train.learning_rate} or train.clip={plan.train.clip}"
            raise Refused(f"the loss of step {self.step} is {loss}: training diverged; {cure}, or set failures.spikes.answer=skip")
        if self.progress:
            self.progress.step(self.step, loss, seconds)
        for slow in self.scores.look([beat.work for beat in self.pulse], seconds) if self.scores else ():
            record.event(STAGE, "straggler", self.step, culprit=slow.rank, factor=slow.score, cost=slow.cost)
            self._say(f"rank {slow.rank} is slow: {slow.score:.1f} times the work of the others, which makes steps {slow.cost:.0%} longer")
        return wish

    def _judge(self, loss: float, norm: float) -> float:
        """The factor of the learning rate; 0 for a step that must not count."""
        self.decision = self.guard.answer(self.step + 1, loss, norm)
        return 0.0 if self.decision else self.guard.rate(self.step + 1)

    def _decided(self, decision: Decision) -> None:
        self.guard.decide(decision, rank() == 0)
        if rank() == 0:
            self.record.event(
                STAGE, "corruption" if decision.answer == "verify" else "spike", self.step, why=decision.why, answer=decision.answer
            )
        self._say(f"step {self.step}: {decision.why}; answered with {decision.answer}")

    def _sound(self) -> bool:
        """Whether all replicas hold the same weights; where they do not, back to the last checkpoint, which was saved when they did."""
        axes = self.trainer.axes
        if not self.plan.failures.verify_every or axes is None:
            return True
        with self.timeline.during("communication"):
            wrong = differing(self.trainer.optimizer.named, axes)
        if not wrong:
            return True
        why = f"replica{'s' * (len(wrong) > 1)} {' and '.join(map(str, wrong))} of {self.plan.mesh.dp_replicate} hold other weights"
        self._decided(self.guard.within_budget(Decision(self.step, "verify", why, self.step)))
        self._back(self.step)
        return False

    def _back(self, most: int) -> None:
        """To the newest checkpoint of at most so many steps; what was saved after it belongs to a history that was given up."""
        self._settle()
        copy = newest(self.whole, self.start.folder, self.buddies, most)
        if copy is None:
            raise Refused(f"step {self.step} must be undone, and there is no checkpoint of step {most} or before; "
                          "lower checkpoint.every or failures.spikes.rewind, or raise checkpoint.keep")  # fmt: skip
        step = copy.step
        fill(copy, self.whole, self.trainer)
        led(lambda: tiers.forget_after(self.whole, self.start.folder, step))
        for buddy in self.buddies:
            buddy.forget_after(step)
        self.start = replace(self.start, furthest=max(self.start.furthest, self.step))
        self.step = step
        self.trainer.batches.rewind()
        self.guard.resume(step)
        book(self.record, self.timeline, None)
        if rank() == 0:
            self.record.event(STAGE, "rollback", step)
        self.record.flush()

    # -- between steps

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    def _evaluate(self, held_out: HeldOut) -> None:
        self.timeline.enter("evaluate")
        loss = self.trainer.evaluate(held_out)
        if rank() == 0:
            self.record.observe(STAGE, "held_out_loss", loss, self.step)
            if not held_out.tokens.masked:
                self.record.observe(STAGE, "held_out_bits_per_byte", held_out.bits_per_byte(loss), self.step)
            self.record.event(STAGE, "evaluate", self.step, loss=loss)
        self._say(f"held-out loss {loss:.4f} nat a token after step {self.step}")
        book(self.record, self.timeline, None)

    def _save(self, tier: tiers.Tier) -> None:
        self.timeline.enter("checkpoint")
        self._saved(tier, self.writers[tier].save(checkpoint.state(self.trainer.parts, self.trainer.optimizer), self.step))
        book(self.record, self.timeline, None)

    def _settle(self) -> None:
        """Wait for what is being written."""
        for tier, writer in self.writers.items():
            self._saved(tier, writer.finish())

    def _saved(self, tier: tiers.Tier, safe: list[tuple[int, int]]) -> None:
        if rank() == 0:
            for step, size in safe:
                self.record.observe(STAGE, "checkpoint_bytes", size, step)
                self.record.event(STAGE, "checkpoint", step, bytes=size, **({} if tier.name == tiers.REMOTE else {"tier": tier.name}))

    def _finish(self) -> None:
        record, trainer, step, plan = self.record, self.trainer, self.step, self.plan
        record.observe(STAGE, "peak_memory", self.gauge.peak(), step)
        if (reserved := self.gauge.reserved()) is not None:
            record.observe(STAGE, "reserved_memory", reserved, step)
        count, joules = optim.count(trainer.optimizer.named, trainer.twice), self.power.joules()
        if rank() == 0:
            record.observe(STAGE, "parameters", count, step)
            if joules is not None:
                record.observe(STAGE, "energy", joules, step)
            if self.held_out and not self.held_out.tokens.masked and plan.samples(step) * plan.train.seq_len <= BASELINE_TOKENS:
                self.timeline.enter("evaluate")
                loss = bigram.held_out_loss(self._seen(step), self.held_out.sequences, plan.model.vocab)
                record.observe(STAGE, "bigram_bits_per_byte", self.held_out.bits_per_byte(loss), step)
        if rank() % plan.cluster.gpus_per_node == 0:
            tiers.release(self.whole, self.start.folder)
        self.timeline.enter("idle")
        if dist.is_initialized():
            dist.barrier()
        book(record, self.timeline, None)
        record.event(STAGE, "end", step)

    def _seen(self, steps: int) -> Iterator[np.ndarray]:
        """The sequences of so many steps, with a beat of the heart at each."""
        batches = self.trainer.batches
        for i in range(self.plan.samples(steps)):
            self.pulse.beat(rank(), "evaluate")
            yield batches.tokens.window(batches.order[i])


def alone(plan: Plan) -> Pulse:
    """Under torchrun nobody listens to the heart, and a rank hears the signals itself."""
    pulse = Pulse(plan.ranks)
    for which in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(which, lambda *_: pulse.ask_to_stop())
    return pulse


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


def _held_out(plan: Plan, folder: Path, kind: type[Tokens]) -> HeldOut | None:
    if not plan.train.evaluate_sequences:
        return None
    rest = kind(folder, "held_out", plan.train.seq_len)
    if kind is Chats and not len(rest):
        return None
    refuse_small(rest, plan, "held_out")
    order = Order(len(rest), plan.seed)
    count = max(plan.dp, min(plan.train.evaluate_sequences, len(rest)) // plan.dp * plan.dp)
    return HeldOut(rest, [order[i] for i in range(count)], folder)


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
