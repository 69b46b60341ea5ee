"""The trainer's own code, one configuration after the other in one process: starting Python and CUDA for each would take most of the time.

What a configuration is measured by: steps after the warm-up, each between two moments at which the device has nothing left to do; the
allocator's peak; the driver's count of energy over all measured steps.
"""

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

from conf.errors import Refused
from conf.plan import Plan
from real import cluster, nvml
from real.data import Order, Tokens
from real.heartbeat import Pulse, clock
from real.memory import Gauge
from real.parallel import refuse_unbuilt
from real.pretrain import Start
from real.timeline import Timeline
from real.trainer import Trainer
from tests.kit import inputs, loops
from tests.kit.foretell import AGAIN, MEASURED, append, ended, now
from tests.kit.plans import LEAST, WARM, Row, plan_of, seconds, steps_of

Step = Callable[[int], float]  # the loss of a step
SPOILT = "CUDA error"  # after such a failure nothing more can be done in the process
ROUNDS = 3  # turns of each baseline beside ours, of LEAST steps


@contextmanager
def world(plan: Plan) -> Iterator[None]:
    """A device, and a process group of one rank where `real` begins one: for lower precision."""
    cuda = plan.gpu.kind == "cuda"
    if cuda:
        torch.cuda.set_device(0)
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1)
    if plan.train.precision == "fp32":
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def work(found: Sequence[Row], told: Mapping[str, Mapping[str, Any]], folder: Path, until: float, profile: str = "") -> None:
    """Execute the rows that have no result, in their order, as long as each is expected to end before `until` (time.monotonic)."""
    path = folder / MEASURED
    plans = {row.name: plan_of(row, profile) for row in found}
    done = ended(folder)
    missing = [row for row in found if (row.name, plans[row.name].id) not in done]
    if not missing:
        return
    with TemporaryDirectory() as scratch:
        for row in missing:
            plan, foretold = plans[row.name], told[row.name]
            if time.monotonic() + seconds(row, plan, foretold["parameters"], foretold["step_time"]) > until:
                print(f"{row.name}: left for the next call", flush=True)
                continue
            head = {"name": row.name, "plan": plan.id}
            append(path, {"at": now(), **head, "status": "began", "clock": time.monotonic()})
            result = one(row, plan, Path(scratch), steps_of(foretold["step_time"]))
            append(path, {"at": now(), **head, **result})
            print(line(row, foretold, result), flush=True)
            if SPOILT in result["status"]:
                sys.exit(AGAIN)


def line(row: Row, foretold: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if result["status"] != "done":
        return f"{row.name}: {result['status']}"
    off = foretold["step_time"] / result["step_time"] - 1
    return f"{row.name}: {result['step_time'] * 1e3:.1f} ms a step, foretold {foretold['step_time'] * 1e3:.1f} ({off:+.1%})"


def one(row: Row, plan: Plan, folder: Path, steps: int) -> dict[str, Any]:
    """What a configuration comes to; one that is refused, too large or broken says so, and the next finds the device free."""
    began = time.monotonic()
    try:
        refuse_unbuilt(plan)
        cluster.check(plan)
        with world(plan):
            result = _measured(row, plan, folder, steps)
    except Refused as refused:
        result = {"status": f"refused: {refused.problems[0]}"}
    except torch.OutOfMemoryError as error:
        result = {"status": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:
        result = {"status": f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    _tidy(plan)
    return result | {"seconds": time.monotonic() - began}


def _tidy(plan: Plan) -> None:
    torch._dynamo.reset()
    gc.collect()
    if plan.gpu.kind == "cuda":
        torch.cuda.empty_cache()


def _measured(row: Row, plan: Plan, folder: Path, steps: int) -> dict[str, Any]:
    device = cluster.device(plan)
    with prepared(plan, folder) as (step, gauge):
        losses = [step(number) for number in range(WARM)]
        joules = nvml.joules(device)
        times = []
        for number in range(WARM, WARM + steps):
            took, loss = timed(lambda number=number: step(number), device)  # type: ignore[misc]
            times.append(took)
            losses.append(loss)
        energy = None if joules is None else (nvml.joules(device) or math.nan) - joules
        learns = plan.align.method == "none"  # an alignment's loss tells little in so few steps
        told = {"status": "done", "step_time": statistics.median(times), "steps": steps, "spread": spread(times), "losses": losses,
                "memory": gauge.peak(), "reserved": gauge.reserved(), "finite": all(map(math.isfinite, losses)),
                "falls": statistics.fmean(losses[-3:]) < losses[0] if learns else None,
                "energy": energy and energy / steps, "watts": energy and energy / sum(times)}  # fmt: skip
        if row.beside:
            told |= beside(plan, step, WARM + steps, folder, device)
    return told


def timed(work: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    wait(device)
    began = time.perf_counter()
    loss = work()
    wait(device)
    return time.perf_counter() - began, loss


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(times: Sequence[float]) -> float:
    """Half of what lies between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


@contextmanager
def prepared(plan: Plan, folder: Path) -> Iterator[tuple[Step, Gauge]]:
    """A step of the plan's training, fine-tuning or alignment, as `real` does it, and what its memory is read from."""
    if plan.align.method != "none":
        yield from _alignment(plan, folder)
        return
    tuned = plan.finetune.method != "none"
    twin = plan.tuned if tuned else plan
    tokens = Tokens(inputs.tokens(folder, plan.model.vocab), "train", twin.train.seq_len)
    cuda = plan.gpu.kind == "cuda"
    timeline, gauge = Timeline(cuda), Gauge(cuda)
    trainer = Trainer(twin, tokens, timeline, Order(len(tokens), plan.seed), adapters=tuned and plan.finetune.adapters)

    def step(number: int) -> float:
        told = trainer.step(number)
        timeline.close()
        assert told is not None
        return told[0]

    yield step, gauge


def _alignment(plan: Plan, folder: Path) -> Iterator[tuple[Step, Gauge]]:
    from real.policy import Policy
    from real.preferences import Preferences

    base = inputs.base(folder, plan)
    plan, place = inputs.alignment(folder, plan)
    gauge = Gauge(plan.gpu.kind == "cuda")
    start = Start(place, clock(plan), 0.0, 0.0, 0, {}, base=base, pulse=Pulse(1))
    trainer = (Policy if plan.align.rollouts else Preferences)(plan, start)
    trainer.begin()
    trainer.book()

    def step(number: int) -> float:
        told = trainer.step(number)
        trainer.done += 1
        trainer.book(trainer.done)
        return told.quantities["loss"]

    try:
        yield step, gauge
    finally:
        trainer.close()


def beside(plan: Plan, ours: Step, first: int, folder: Path, device: torch.device) -> dict[str, Any]:
    """Tokens a second of baselines and of ours, in turns in this process, so that clocks and heat are the same for all."""
    steps: dict[str, Step] = {"ours": ours}
    batches = [batch.to(device) for batch in loops.batches(plan, inputs.tokens(folder, plan.model.vocab))]
    told: dict[str, Any] = {}
    for name, make in loops.BASELINES.items():
        try:
            steps[name] = make(plan, batches, device)
            for number in range(WARM):
                steps[name](number)
        except Exception as error:  # a package that is not there, or no room
            steps.pop(name, None)
            told[f"{name}_left_out"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for number in range(LEAST):
                times[name].append(timed(lambda: steps[name](first + number), device)[0])  # noqa: B023
        first += LEAST
    return told | {f"{name}_tokens_per_s": plan.tokens_per_step / statistics.median(took) for name, took in times.items()}
