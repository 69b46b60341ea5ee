"""Matrix products to be timed on a GPU: shapes, and the calls that the trainer makes of them.

A product of m tokens by a matrix [n, k] comes in three layouts: forward x Wᵀ, the input's gradient dy W, the weight's gradient dyᵀ x; each
in bf16 and in the trainer's fp8. Grouped products are those of real/moe.py. Shapes are those of layers from 125 million to 70 billion
parameters, some drawn at random, some that no power of two divides, and some thin ones.
"""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from real import fp8
from real.moe import grouped
from real.stopwatch import Call, Stopwatch, Time

LAYOUTS = ("forward", "input", "weight")
MODELS = ((768, 768, 2048), (1024, 512, 2816), (2048, 512, 5632), (3072, 1024, 8192), (4096, 1024, 14336), (5120, 1024, 13824),
          (8192, 1024, 28672))  # width, of keys, of the feed-forward  # fmt: skip
TOKENS = (2048, 8192, 32768)
VOCABULARY = 32768
DRAWN, SEED = 60, 11
ODD = ((4096, 50257, 768), (8192, 50257, 2048), (4095, 4095, 4095), (4097, 4097, 4097), (2047, 2049, 2051), (8192, 4100, 4096),
       (8192, 4096, 4100), (8192, 10922, 4096), (16384, 4098, 4098), (1000, 1000, 1000), (3000, 5000, 7000), (12345, 4096, 4096),
       (8192, 11008, 4096), (8192, 13696, 5120), (6000, 6000, 6000), (777, 8192, 8192), (8191, 8192, 8192), (4096, 5001, 2048),
       (16384, 1001, 4096), (8192, 2050, 8192),
       (8192, 32003, 4096), (4096, 3001, 3001), (16384, 5122, 2048), (8192, 1025, 1023), (2048, 10007, 4096),
       (32768, 1537, 2048))  # fmt: skip
THIN = ((16, 4096, 4096), (64, 4096, 4096), (16, 14336, 4096), (64, 4096, 14336), (8192, 16, 4096), (8192, 64, 4096), (8192, 4096, 16),
        (8192, 4096, 64))  # fmt: skip
GROUPED = ((8, 512, 14336, 4096), (8, 2048, 14336, 4096), (8, 2048, 4096, 14336), (16, 1024, 2048, 4096), (64, 128, 1408, 2048),
           (64, 512, 1408, 2048), (64, 512, 2048, 1408), (64, 1024, 2048, 1408), (128, 256, 768, 2048), (128, 512, 2048, 768),
           (32, 512, 2048, 7168), (32, 1024, 7168, 2048))  # experts, tokens of each, outputs, inputs  # fmt: skip
MOST = 2e13  # FLOPs of a product: 25 ms at the rate of an H200


class Task(NamedTuple):
    """Something to be timed once: what it is called in the table, and how."""

    op: str
    stage: str
    precision: str
    shape: dict[str, int]
    run: Callable[[Stopwatch], dict[str, float]]
    how: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from the others."""
        return (self.op, self.stage, self.precision, self.how, *(f"{name}={size}" for name, size in sorted(self.shape.items())))


def told(time: Time) -> dict[str, float]:
    return {"time_us": time.seconds * 1e6, "cv": time.cv}


def timed(make: Callable[[torch.device], Call], watch: Stopwatch) -> dict[str, float]:
    """Time a call on inputs that are made for it and forgotten after it."""
    return told(watch.time(make(watch.where)))


def products(where: torch.device) -> Iterator[Task]:
    """Single products in all layouts, in an order that mixes sizes; a CPU gets the smallest ones."""
    for m, n, k in shapes() if where.type == "cuda" else [(64, 96, 32), (63, 33, 65)]:
        for layout in LAYOUTS:
            yield Task("matmul", layout, "bf16", {"m": m, "n": n, "k": k}, partial(timed, partial(_plain, m, n, k, layout)))
            if fp8.fits(n, k) and m % 16 == 0:
                yield Task("matmul", layout, "fp8", {"m": m, "n": n, "k": k}, partial(timed, partial(_eight, m, n, k, layout)))


def mixtures(where: torch.device) -> Iterator[Task]:
    """Grouped products, forward and backward; m counts the tokens of all experts."""
    for experts, tokens, n, k in GROUPED if where.type == "cuda" else [(2, 16, 32, 16)]:
        for stage in ("forward", "backward"):
            shape = {"batch": experts, "m": experts * tokens, "n": n, "k": k}
            yield Task("grouped", stage, "bf16", shape, partial(timed, partial(_experts, experts, tokens, n, k, stage)))


def shapes() -> list[tuple[int, int, int]]:
    """m, n and k of all products, shuffled: any first part of them has all kinds."""
    dice, found = random.Random(SEED), {*ODD, *THIN}
    for width, keys, ffn in MODELS:
        pairs = ((width, width), (keys, width), (ffn, width), (width, ffn), (VOCABULARY, width))
        found |= {(m, n, k) for m in TOKENS for n, k in pairs}
    for _ in range(DRAWN):
        found.add(tuple(64 * round(2 ** dice.uniform(math.log2(low), math.log2(high))) for low, high in ((2, 1024), (8, 256), (8, 256))))  # type: ignore[arg-type]
    kept = sorted(shape for shape in found if 2.0 * math.prod(shape) <= MOST)
    dice.shuffle(kept)
    return kept


def _plain(m: int, n: int, k: int, layout: str, where: torch.device) -> Call:
    tensor = partial(torch.randn, device=where, dtype=torch.bfloat16)
    if layout == "forward":
        return partial(torch.nn.functional.linear, tensor(m, k), tensor(n, k))
    grad = tensor(m, n)
    return partial(torch.mm, grad, tensor(n, k)) if layout == "input" else partial(torch.mm, grad.T, tensor(m, k))


def _eight(m: int, n: int, k: int, layout: str, where: torch.device) -> Call:
    """The trainer's product in fp8 on operands that are rounded already."""
    a, b = {"forward": ((m, k), (n, k)), "input": ((m, n), (k, n)), "weight": ((n, m), (k, m))}[layout]
    rounded = partial(_rounded, where)
    (left, left_scale), (right, right_scale) = rounded(a, fp8.E4M3 if layout == "forward" else fp8.E5M2), rounded(b, fp8.E4M3)
    return partial(fp8._scaled, left, right.T, left_scale, right_scale, torch.bfloat16)


def _rounded(where: torch.device, shape: tuple[int, int], to: torch.dtype) -> Any:
    return fp8._round(torch.randn(*shape, device=where, dtype=torch.bfloat16), to)


def _experts(experts: int, tokens: int, n: int, k: int, stage: str, where: torch.device) -> Call:
    tensor = partial(torch.randn, device=where, dtype=torch.bfloat16, requires_grad=True)
    x, weight, counts = tensor(experts * tokens, k), tensor(experts, n, k), torch.full((experts,), tokens, device=where)
    return pass_of(grouped, (x, weight), stage, counts)


def pass_of(forward: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], stage: str, *others: Any) -> Call:
    """A function's forward pass, or its backward pass on a graph that is kept."""
    if stage == "forward":
        return torch.no_grad()(partial(forward, *inputs, *others))
    out = forward(*inputs, *others)
    return partial(torch.autograd.grad, out, [x for x in inputs if x.requires_grad], torch.randn_like(out), retain_graph=True)
