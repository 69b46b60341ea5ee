"""Many lives of a plan, over all cores: as many as were asked for, or until their mean is known well enough."""

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from conf.errors import Refused
from conf.plan import Plan
from conf.record import Value
from sim.kernels import Rates, rates
from sim.life import live
from sim.pace import Pace, pace, uncertain
from sim.summary import summary

T = TypeVar("T")
R = TypeVar("R")
KNOWN = ("run.tokens", "run.wall_clock", "run.ettr", "run.energy")  # quantities whose means an asked precision is about
LEAST, MOST = 16, 16_384  # lives of an asked precision
BRIEF = 1.0  # seconds of work below which other processes are not worth their start


def spread_out(work: Callable[[T], R], tasks: Sequence[T], each: float) -> list[R]:
    """The work on every task, in their order; over all cores where it is enough. `each` is the time [s] that one takes."""
    cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(tasks))
    if cores < 2 or each * len(tasks) < BRIEF or multiprocessing.current_process().daemon:
        return [work(task) for task in tasks]
    chunk = max(1, min(16, len(tasks) // (4 * cores)))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(work, tasks, chunksize=chunk))


def _life(plan: Plan, step: Pace, speed: Rates, task: tuple[int, float]) -> dict[str, Value]:
    seed, factor = task
    return summary(live(plan, seed, step.slowed(factor), speed))


def others(plan: Plan, count: int, precision: float | None, first: Mapping[str, Value], each: float) -> list[Mapping[str, Value]]:
    """The first life with others: `count` in all, or doubled from there until the precision is reached.

    Every batch is spread over the step model's error, and has seeds of its own.
    """
    step = pace(plan)
    work = partial(_life, plan, step, rates(plan))
    told: list[Mapping[str, Value]] = [first]
    goal = count if precision is None else max(count, LEAST)
    while len(told) < goal:
        new = goal - len(told)
        told += spread_out(work, [(plan.seed + len(told) + i, factor) for i, factor in enumerate(uncertain(plan, new, step.error))], each)
        if precision is not None and interval(told) > precision:
            goal = 2 * len(told)
        if goal > MOST:
            raise Refused(f"precision={precision}: {len(told):,} lives know their means within {interval(told):.2g} only; ask for less")
    return told


def interval(told: Iterable[Mapping[str, Value]]) -> float:
    """Widest half of the 95% intervals of the means, relative to them."""
    lives, widest = list(told), 0.0
    for name in KNOWN:
        values = np.array([life[name].value for life in lives if name in life])
        if len(values) > 1 and values.mean():
            widest = max(widest, 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)) / abs(float(values.mean())))
    return widest


def clocked(work: Callable[[], R]) -> tuple[R, float]:
    """What work gives, and the time [s] that it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began
