"""Rollouts, foretold: engines that write completions, a token of each at a step.

A lift that stops only where someone gets in or out: between two stops all ride on together, so an engine's clock jumps from the end of
one completion to that of the next.

    step of n completions that hold k tokens = host + links(n) + (b^s + f^s)^(1/s) + k × held,
    b = bytes of the weights that n tokens touch / bandwidth,   f = their FLOPs / rate,   held = bytes of a token's cache / bandwidth

the roofline (Williams et al. 2009) with a soft knee. A CPU rank runs the trainer's own code instead (real/rollout.py), one operation
after the other. New completions are prefilled before the next step, all in a row. Where the cache is full, the youngest gives way and
is prefilled again later, as in vLLM (Kwon et al. 2023, section 4.5).
"""

import math
from collections import deque
from collections.abc import Callable
from functools import cache
from heapq import heapify, heappop, heappush
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import simpy

from conf.alignment import Align
from conf.arithmetic import embedding_parameters, layers_parameters, matmul_parameters, query_width, routed_parameters, value_width
from conf.lengths import lengths_of
from conf.plan import Plan
from sim.cluster import Course
from sim.kernels import Array, Device, measured, rates
from sim.network import Network
from sim.parallel import columns, passed

# Sharpness s of the knee: of matrix products of 1 to 4,096 tokens with the rates of conf/gpu, H100 and A100 alike, mean errors of 10 and 7%
# (vidur's profiles). A host's times and the rate at which attention reads a cache are the gpu's: decode_host, decode_block, decode_keys,
# fitted to the steps of NeMo-RL v0.5 (LOG.md, 2026-11-30), 2.5 times as long where the host is a Grace.
KNEE = 1.7
CHUNK = 8192  # tokens that are prefilled at once, vLLM's max_num_batched_tokens
FEW = 0.1  # share of its slots below which an engine is in the tail
WIDTHS = {"fp32": 4, "fp8": 1, "fp4": 0.5}  # bytes of a weight; 2 in other precisions


class Decode(NamedTuple):
    """What an engine's work takes."""

    step: Array  # seconds of a step with 0, 1, 2, … completions, their cache aside
    held: float  # seconds a step of reading what a token left in the cache
    prefill: float  # seconds of a prompt's token


def width(plan: Plan) -> float:
    """Bytes of a weight in an engine."""
    return WIDTHS.get(plan.train.precision, 2)


def cached(plan: Plan) -> float:
    """Bytes of a token's keys and values over an engine's ranks together: heads are cut over them, but a head is whole and latent
    attention's one vector is everywhere."""
    model, size, tp = plan.model, 4 if plan.train.precision == "fp32" else 2, plan.align.engine_tp
    if model.mla.kv_rank:
        return float(model.layers * (model.mla.kv_rank + model.mla.rope) * size * tp)
    return float(model.layers * 2 * max(model.kv_heads, tp) * model.head_dim * size)


def crowd(plan: Plan, generating: bool) -> float:
    """Ranks that work at a time for each core, where ranks are cores and there are too few: everyone where all work at once, else one
    role's."""
    role, cluster = plan.roles, plan.cluster
    ranks = plan.ranks if plan.align.placement == "async" else len(role.generators if generating else role.trainers)
    return max(1.0, ranks / cluster.nodes / cluster.cores_per_node) if plan.gpu.kind == "cpu" else 1.0


def decode(plan: Plan) -> Decode:
    """An engine of align.engine_tp ranks."""
    device, counts = Device([rates(plan)]), np.arange(plan.align.slots + 1, dtype=float)
    return (_trainers_code if plan.gpu.kind == "cpu" else _serving)(plan, device, counts)


def _serving(plan: Plan, device: Device, counts: Array) -> Decode:
    """A serving engine on GPUs: fused kernels in graphs."""
    own, prompt, tp = columns([plan]), float(plan.align.prompt_tokens), plan.align.engine_tp
    own.tp, own.cp, own.ep, own.etp, own.compiled, own.graphs = float(tp), 1.0, 1.0, 1.0, np.array([True]), np.array([True])
    own.micro_batch, own.seq_len = max(1.0, CHUNK / prompt), prompt
    gpu = measured(plan).gpu
    host = gpu.decode_host + gpu.decode_block * plan.model.layers
    step = host + _links(plan, device, counts) + weights(plan, device, counts)
    held = cached(plan) / tp / (gpu.decode_keys * device["bandwidth.attention.forward"][0])
    return Decode(step, float(held), float(passed(own, device)[0] / (own.micro_batch * prompt)))


def _trainers_code(plan: Plan, device: Device, counts: Array) -> Decode:
    """Ranks that run the trainer's forward pass on a token of each completion, all prompts at once."""
    own, prompt, model = columns([plan]), float(plan.align.prompt_tokens), plan.model
    own.tp, own.crowd, own.micro_batch, own.seq_len = float(plan.align.engine_tp), crowd(plan, True), np.maximum(counts, 1.0), 1.0
    step = passed(own, device)
    read = cached(plan) / plan.align.engine_tp / device["bandwidth.attention.forward"][0]
    flops = 2 * model.layers * (query_width(model) + value_width(model)) / device["rate.attention.forward"][0]
    own.micro_batch, own.seq_len = float(plan.align.slots), prompt
    return Decode(step, float(own.crowd * (read + flops)), float(passed(own, device)[0] / (plan.align.slots * prompt)))


def weights(plan: Plan, device: Device, counts: Array) -> Array:
    """Seconds of the matrix products of a step: all of a dense model's weights, and of a mixture the experts that any of n tokens meets,
    1 − (1 − k / E)^n of them where a router has no favourites."""
    model, tp = plan.model, plan.align.engine_tp
    moe = model.moe
    touched = 1 - (1 - moe.top_k / moe.experts) ** counts if moe.experts else 0.0
    read = layers_parameters(model) + embedding_parameters(model) + routed_parameters(model) * touched / device["grouped"]
    memory = width(plan) * read / tp / device["bandwidth.matmul.forward"]
    arithmetic = 2 * matmul_parameters(model) * counts / tp / device["rate.matmul.forward"]
    return knee(memory, arithmetic)


def knee(memory: Array, arithmetic: Array) -> Array:
    """Seconds of matrix products that would take so long for their weights alone, or for their arithmetic alone.

    >>> float(knee(np.array(0.0), np.array(2.0)))
    2.0
    """
    return np.asarray((memory**KNEE + arithmetic**KNEE) ** (1 / KNEE))


def _links(plan: Plan, device: Device, counts: Array) -> Array:
    """Seconds of two all-reduces a block over an engine's ranks, captured in graphs, so that none waits to be started."""
    tp = plan.align.engine_tp
    if tp == 1:
        return np.zeros_like(counts)
    n, size = np.array([float(tp)]), counts * plan.model.hidden * 2
    each = Network([plan], device).ring("all_reduce", n, np.ones(1), size) - device["start"]
    return np.asarray(2 * plan.model.layers * each)


# -- lengths


def lengths(align: Align, count: int, step: int, dice: np.random.Generator) -> Array:
    """Tokens of so many completions of a step: the even quantiles of a law cut at new_tokens that grows with the steps, in an order by
    chance. So the mean and the tail of every step are those of the law, and only who gets which is drawn. The law is what was seen
    (align.lengths), or else a lognormal with the mean that is expected."""
    grown = 1 + align.growth * step / 100
    law = grown * seen(align.lengths, count) if align.lengths else _lognormal(align, min(grown * align.expected, align.new_tokens), count)
    return np.asarray(dice.permutation(np.maximum(1, np.rint(np.minimum(law, align.new_tokens))).astype(int)))


def seen(said: str, count: int) -> Array:
    """So many even quantiles of the lengths in a file, each of them one that was seen: as many as it has are the file itself."""
    return np.quantile(lengths_of(said), (np.arange(count) + 0.5) / count, method="inverted_cdf")


def _lognormal(align: Align, mean: float, count: int) -> Array:
    return np.asarray(np.exp(_centre(mean, align.sigma, align.new_tokens) + align.sigma * _even(count)))


@cache
def _even(count: int) -> Array:
    """So many even quantiles of the standard normal."""
    return np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])


def _centre(mean: float, sigma: float, cut: float) -> float:
    """Mean of the logarithm with which a lognormal cut at `cut` has this mean, by halving.

    E[min(X, c)] = exp(m + s²/2) Φ((ln c − m)/s − s) + c Φ((m − ln c)/s).

    >>> round(math.exp(_centre(100.0, 0.0, 200.0)), 3)
    100.0
    """
    if not sigma or mean >= cut:
        return math.log(mean) if mean < cut else math.log(cut) + 20 * sigma
    normal, low, high = NormalDist(), math.log(mean) - sigma**2, math.log(cut) + 20 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        far = (math.log(cut) - middle) / sigma
        found = math.exp(middle + sigma**2 / 2) * normal.cdf(far - sigma) + cut * normal.cdf(-far)
        low, high = (middle, high) if found < mean else (low, middle)
    return low


# -- engines


class Completion:
    """One answer under way."""

    __slots__ = ("batch", "length", "made", "version")

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length, self.made, self.version = batch, length, 0, -1


class Engine:
    """One generator: slots, a cache, and who waits for them."""

    def __init__(self, env: simpy.Environment, align: Align, work: Decode, room: float, few: float, version: Callable[[], int],
                 done: Callable[[Completion], None]) -> None:  # fmt: skip
        self.env, self.work, self.room, self.few, self.version, self.done = env, work, room, few, version, done
        self.slots, self.prompt = align.slots, align.prompt_tokens
        self.waiting: deque[Completion] = deque()
        self.active: list[tuple[int, int, Completion]] = []  # heap: step at which it ends, order, completion
        self.order: dict[Completion, int] = {}  # the same by age, with the step at which each ends
        self.steps = self.tokens = self.number = self.preempted = 0
        self.spent = self.tail = 0.0  # seconds of work, and of them those with few completions
        self.halt = ""  # drain: begin nothing new; now: stand still after the step under way
        self.full = self.reread = False
        self.since: float | None = None
        self.call, self.stands = env.event(), env.event()
        env.process(self._run())

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.active)

    def busy(self) -> float:
        """Seconds of work until now."""
        return self.spent + (0.0 if self.since is None else self.env.now - self.since)

    def take(self, completion: Completion) -> None:
        self.waiting.append(completion)
        if len(self.order) < self.slots and not self.full:
            self._wake()

    def hold(self, at_once: bool) -> simpy.Event:
        """Stop after the step under way, or when nobody is left; the event says when it stands."""
        self.halt, self.stands = "now" if at_once else "drain", self.env.event()
        if at_once or not self.order:
            self._wake()
        return self.stands

    def go_on(self) -> None:
        """With new weights, with which the begun is read again."""
        self.halt, self.reread = "", bool(self.order)
        self._wake()

    def _wake(self) -> None:
        if not self.call.triggered:
            self.call.succeed()

    def _run(self) -> Course[None]:
        while True:
            standing = self.halt == "now" or (self.halt and not self.order)
            if standing and not self.stands.triggered:
                self.stands.succeed()
            if standing or not (self.order or self.waiting):
                self.call = self.env.event()
                yield self.call
                continue
            self.since = self.env.now
            read = self.reread * self.tokens + self._admit()
            self.reread = False
            if read:
                yield self.env.timeout(read * self.work.prefill)
            yield from self._ride()
            self.spent, self.since = self.busy(), None

    def _ride(self) -> Course[None]:
        """Until someone ends, the cache is full, or, at the end of a step, there is news."""
        count, began, riders = self._ahead(), self.env.now, len(self.order)
        whole, self.call = self.env.timeout(self._seconds(count)), self.env.event()
        if self.halt == "now":
            self._wake()
        yield whole | self.call
        if not whole.processed:
            count = self._by(self.env.now - began, count)
            yield self.env.timeout(max(0.0, began + self._seconds(count) - self.env.now))
        if riders < self.few:
            self.tail += self.env.now - began
        self._move(count)

    def _admit(self) -> int:
        """Fill the slots; returns the tokens that must be read."""
        read = 0
        while self.waiting and not self.halt and not self.full and len(self.order) < self.slots:
            context = self.prompt + self.waiting[0].made
            if self.tokens + context > self.room and self.order:
                break
            one = self.waiting.popleft()
            if one.version < 0:
                one.version = self.version()
            self.number += 1
            self.order[one] = self.steps + one.length - one.made
            heappush(self.active, (self.order[one], self.number, one))
            self.tokens += context
            read += context
        return read

    def _ahead(self) -> int:
        """Steps until the next completion ends or the cache is full, where the youngest give way."""
        while self.tokens + len(self.order) > self.room and len(self.order) > 1:
            self._give_way()
        left = self.active[0][0] - self.steps
        return left if len(self.order) == 1 else max(1, min(left, int((self.room - self.tokens) // len(self.order))))

    def _give_way(self) -> None:
        youngest, end = self.order.popitem()
        self.active = [entry for entry in self.active if entry[2] is not youngest]
        heapify(self.active)
        youngest.made = youngest.length - (end - self.steps)
        self.tokens -= self.prompt + youngest.made
        self.waiting.appendleft(youngest)
        self.full, self.preempted = True, self.preempted + 1

    def _seconds(self, count: int) -> float:
        """Of so many steps: n s + held (n k + m n (n − 1) / 2), with m completions that hold k tokens now."""
        m = len(self.order)
        return float(count * self.work.step[m] + self.work.held * (count * self.tokens + m * count * (count - 1) / 2))

    def _by(self, seconds: float, most: int) -> int:
        """Steps after which so much time has gone, the one under way included."""
        curve = self.work.held * len(self.order) / 2
        linear = self._seconds(1) - curve
        exact = (math.sqrt(linear**2 + 4 * curve * seconds) - linear) / (2 * curve) if curve else seconds / linear
        return max(1, min(most, math.ceil(exact - 1e-9)))

    def _move(self, count: int) -> None:
        self.steps += count
        self.tokens += count * len(self.order)
        while self.active and self.active[0][0] <= self.steps:
            one = heappop(self.active)[2]
            self.tokens -= self.prompt + one.length
            del self.order[one]
            self.full = False
            self.done(one)
