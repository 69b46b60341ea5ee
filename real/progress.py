"""The live line: step, loss, tokens a second, MFU, predicted against measured, time left."""

import statistics
import sys
import time
from collections import deque

from conf.arithmetic import flops_per_token
from conf.plan import Plan
from conf.units import show


class Progress:
    def __init__(self, plan: Plan, predicted: float | None, first: int) -> None:
        self.plan, self.predicted, self.first = plan, predicted, first
        self.terminal = sys.stdout.isatty()
        self.recent: deque[float] = deque(maxlen=50)
        peak = plan.gpu.peak(plan.train.precision)
        self.peak = (peak or plan.gpu.fp32_peak) * plan.ranks
        self.shown = 0.0

    def step(self, step: int, loss: float, seconds: float) -> None:
        self.recent.append(seconds)
        last, now = step == self.plan.train.steps, time.monotonic()
        due = now - self.shown >= (0.2 if self.terminal else 10.0)
        if due or last:
            self.shown = now
            self._print(self.line(step, loss))

    def line(self, step: int, loss: float) -> str:
        typical = statistics.median(self.recent)
        rate = self.plan.tokens_per_step / typical
        mfu = rate * flops_per_token(self.plan.model, self.plan.train.seq_len) / self.peak
        parts = [f"step {step}" + (f"/{self.plan.train.steps}" if self.plan.train.steps else ""), f"loss {loss:.3f}"]
        parts += [f"{show(rate, 'token/s')}", f"MFU {mfu:.0%}", f"{show(typical, 's')} a step"]
        if self.predicted:
            parts.append(f"foretold {show(self.predicted, 's')} ({typical / self.predicted - 1:+.0%})")
        if self.plan.train.steps:
            parts.append(f"{show((self.plan.train.steps - step) * typical, 's')} left")
        return "  ".join(parts)

    def say(self, text: str) -> None:
        self._print(text, keep=True)

    def _print(self, text: str, keep: bool = False) -> None:
        if self.terminal:
            print(f"\r\033[K{text}", end="\n" if keep else "", flush=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(flush=True)
