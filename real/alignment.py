"""What every alignment does on a rank of the trainers: its record, its steps, its checkpoints; what is learned in them, others say."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from conf.errors import Refused
from conf.plan import Plan
from conf.record import Record
from conf.units import show
from real import checkpoint
from real.cluster import rank
from real.heartbeat import Pulse, clock
from real.learner import Network
from real.memory import Gauge
from real.parallel import Axes
from real.pretrain import STAGE, WORK, Start, alone, book
from real.resume import led
from real.timeline import Timeline


class Rank:
    """A rank's record, clock and heart."""

    def __init__(self, plan: Plan, start: Start) -> None:
        self.plan, self.align, self.start = plan, plan.align, start
        self.record = Record(start.folder, rank(), began=clock(plan) - start.epoch)
        self.pulse: Pulse = start.pulse or alone(plan)
        cuda = plan.gpu.kind == "cuda"
        self.timeline, self.gauge = Timeline(cuda, self._changed), Gauge(cuda)
        self.record.observe(STAGE, "init", max(0.0, self.record.now() - start.launched), at=self.record.now())

    def _changed(self, state: str) -> None:
        self.pulse.beat(rank(), state)

    def enter(self, state: str) -> None:
        """Change the state where it is another; a beat either way."""
        if self.timeline.state != state:
            self.timeline.enter(state)
        else:
            self.pulse.beat(rank(), state)

    def book(self, step: int | None = None) -> float:
        """Write where the time since the last call went; returns its seconds."""
        seconds, states = book(self.record, self.timeline, step, replay=step is not None and step <= self.start.furthest)
        self.pulse.stepped(rank(), step or 0, max(1e-9, sum(states.get(state, 0.0) for state in (*WORK, "generate", "score"))))
        self.record.flush()
        return seconds

    def finish(self, step: int | None = None) -> None:
        self.record.observe(STAGE, "peak_memory", self.gauge.peak(), step)
        self.book()
        self.record.flush()


@dataclass(frozen=True)
class Told:
    """What a step says of itself: quantities of the record, and the line that a person reads."""

    quantities: Mapping[str, float]
    line: str


class Alignment(Rank, ABC):
    """A trainer. Subclasses make `networks`, the first of which is what the stage is for, and say what a `step` is."""

    networks: dict[str, Network]  # by the prefix of their tensors in a checkpoint

    def __init__(self, plan: Plan, start: Start) -> None:
        super().__init__(plan, start)
        self.learning, self.whole = plan.aligned, start.whole or plan
        self.axes = Axes(self.learning, self.timeline) if dist.is_initialized() else None
        self.writer = checkpoint.Writer(start.folder / "checkpoints", self.whole)
        self.done = 0

    @abstractmethod
    def step(self, step: int) -> Told:
        """One batch; returns what it says of itself."""

    def beside(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint besides the networks'."""
        return {}

    def begin(self) -> None:
        """Before the first step of this life."""

    def end(self) -> None:
        """After the last."""

    def close(self) -> None:
        """When this life ends, wherever it has come to: ranks that serve this one end too."""

    def run(self) -> bool:
        """Steps until the end; returns whether that was reached."""
        self.done = self._resume()
        if self.done >= self.align.steps:
            self.close()
            return True
        self.begin()
        self.book()
        wish = False
        while self.done < self.align.steps and not wish:
            told = self.step(self.done)
            self.done += 1
            wish = self._wished()
            self._tell(told, self.book(self.done))
            every = self.plan.checkpoint.every
            if wish or self.done == self.align.steps or (every and self.done % every == 0):
                self._save()
        if self.done == self.align.steps:
            self.end()
        self._saved(self.writer.finish())
        self.close()
        self.finish(self.done)
        return self.done == self.align.steps

    def _wished(self) -> bool:
        """Whether somebody asked to stop, which the first rank decides for all."""
        return bool(led(lambda: self.pulse.stop))

    def _tell(self, told: Told, seconds: float) -> None:
        self.record.observe(STAGE, "step_time", seconds, self.done)
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(told.quantities.get(name, 0.0))]
        if bad:
            raise Refused(f"the {bad[0].replace('_', ' ')} of step {self.done} is {told.quantities[bad[0]]}: alignment diverged; lower "
                          f"align.learning_rate={self.align.learning_rate}")  # fmt: skip
        if rank() == 0:
            for name, value in told.quantities.items():
                self.record.observe(STAGE, name, value, self.done)
            every = max(1, self.align.steps // 20)
            if self.done % every == 0 or self.done == self.align.steps:
                print(f"{self.align.method} step {self.done}/{self.align.steps}  {told.line}  {show(seconds, 's')} a step", flush=True)

    def say(self, text: str) -> None:
        if rank() == 0:
            print(text, flush=True)

    # -- checkpoints

    def _save(self) -> None:
        self.timeline.enter("checkpoint")
        found = {name: tensor for prefix, network in self.networks.items() for name, tensor in network.state(prefix).items()}
        self._saved(self.writer.save(found | self.beside(), self.done))
        self.book()

    def _saved(self, safe: list[tuple[int, int]]) -> None:
        for step, size in safe if rank() == 0 else ():
            self.record.observe(STAGE, "checkpoint_bytes", size, step)
            self.record.event(STAGE, "checkpoint", step, bytes=size)

    def _resume(self) -> int:
        """Load the newest sound checkpoint; returns the steps that it holds."""
        found = led(self._newest)
        if found is None:
            return 0
        path, step = found
        with self.timeline.during("load"):
            for prefix, network in self.networks.items():
                network.load(path, step * self._updates, prefix)
            if held := self.beside():
                checkpoint.read(held, path)
        self.record.event(STAGE, "restart", step, checkpoint=path.name)
        self.say(f"resumed from {path.name}")
        return step

    @property
    def _updates(self) -> int:
        """Optimizer steps of a step."""
        return self.align.updates if self.align.rollouts else 1

    def _newest(self) -> tuple[Path, int] | None:
        for path in reversed(checkpoint.complete(self.start.folder / "checkpoints")):
            reason, manifest = checkpoint.check(path, self.whole)
            if reason is None:
                return path, int(manifest["step"])
            print(f"passed over: {path}: {reason}", flush=True)
        return None
