"""Power of a GPU in each phase of a training, from the driver's counter of energy, and over time in a few real steps.

A phase is held for seconds, the first of them not counted, because the counter moves in steps of up to a tenth of one and the power limit
takes as long to settle.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from conf.plan import Plan
from real import nvml
from real.products import Task
from real.stopwatch import SLEEP, Stopwatch
from real.timeline import Timeline
from real.trainer import Trainer

SETTLE, HELD = 1.0, 3.0  # s of a phase before it is counted, and while it is
PERIOD = 0.02  # s between two samples of the trace
STEPS = 8.0  # s of training that the trace lasts
NONE = "no counter of energy (libnvidia-ml): power is not measured"


def phases(plan: Plan, where: torch.device, folder: Path, held: float = HELD, settle: float = SETTLE) -> list[Task]:
    """Idle, products, copies, a kernel that waits as in a collective that never ends, kernels that wait for the host, and a training;
    none without a counter."""
    if nvml.joules(where) is None:
        return []
    works: dict[str, Callable[[Stopwatch], Callable[[], object]]] = {
        "idle": lambda watch: partial(time.sleep, 0.05),
        "products": lambda watch: watch.product,
        "copies": lambda watch: watch.copy,
        "spinning": lambda watch: partial(torch.cuda._sleep, SLEEP),
        "waiting": lambda watch: partial(torch.ones(1, device=watch.where).add_, 1.0),
    }
    tasks = [Task("power", stage, "bf16", {}, partial(_phase, work, held, settle)) for stage, work in works.items()]
    return [*tasks, Task("power", "training", plan.train.precision, {}, partial(_training, plan, folder))]


def _phase(work: Callable[[Stopwatch], Callable[[], object]], held: float, settle: float, watch: Stopwatch) -> dict[str, float]:
    call = work(watch)
    watch.during(call, settle)
    before = nvml.joules(watch.where)
    seconds = watch.during(call, held)
    after = nvml.joules(watch.where)
    return told(before, after, seconds)


def told(before: float | None, after: float | None, seconds: float) -> dict[str, float]:
    """Mean power between two readings, where there are any."""
    watts = {} if before is None or after is None else {"watts": (after - before) / seconds}
    return {"time_us": seconds * 1e6} | watts


class Noise:
    """Random tokens in one document, as real.data.Tokens gives them."""

    packed = masked = False

    def __init__(self, plan: Plan, windows: int = 64) -> None:
        self.seq_len, self.windows = plan.train.seq_len, windows
        self.tokens = np.random.default_rng(plan.seed).integers(plan.model.vocab, size=windows * self.seq_len + 1)

    def __len__(self) -> int:
        return self.windows

    def window(self, index: int) -> np.ndarray:
        return self.tokens[index * self.seq_len : (index + 1) * self.seq_len + 1]

    def documents(self, index: int) -> np.ndarray:
        return np.zeros(self.seq_len + 1, np.int64)


def _training(plan: Plan, folder: Path, watch: Stopwatch) -> dict[str, float]:
    """The plan's own steps on random tokens, and the power of each moment in power.csv."""
    trainer = Trainer(plan, Noise(plan), Timeline(watch.cuda))
    trainer.step(0)
    steps = iter(range(1, 1_000_000))
    watch.sync()
    with sampled(watch.where, folder / "power.csv"):
        before, began = nvml.joules(watch.where), time.perf_counter()
        while time.perf_counter() - began < STEPS:
            trainer.step(next(steps))
            watch.sync()
        after, seconds = nvml.joules(watch.where), time.perf_counter() - began
    return told(before, after, seconds)


@contextmanager
def sampled(where: torch.device, path: Path) -> Iterator[None]:
    """Write the power of a device to a table while something goes on: seconds since the start, watts, which the driver may have smoothed
    over a second, and joules, whose differences are not smoothed."""
    done, rows = threading.Event(), ["at,watts,joules"]

    def sample() -> None:
        began = time.perf_counter()
        while not done.wait(PERIOD):
            read = ("" if number is None else f"{number:.3f}" for number in (nvml.watts(where), nvml.joules(where)))
            rows.append(",".join([f"{time.perf_counter() - began:.4f}", *read]))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.write_text("\n".join(rows) + "\n")
