"""What a GPU does besides products, to be timed: attention, kernels that only move tensors, the optimizer, copies, launches.

Everything is the trainer's own code. `how` tells attention's kernels apart, torch's choice and cuDNN's, and copies from pinned and from
pageable memory.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conf.plan import Plan
from real import fp8, optim
from real.attention import Attend
from real.kernels import _plain as dense
from real.loss import loss_sum
from real.model import Block, Decoder, rotary, rotate
from real.products import Call, Task, pass_of, timed, told
from real.rollout import Engine, Request
from real.stopwatch import Stopwatch

HEADS = ((32, 8, 128), (32, 8, 64), (16, 16, 128))  # of queries, of keys, and their width
SEQUENCES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TOGETHER = 16384  # tokens of a batch of shorter sequences; of the longest a quarter of the heads is timed
MOVED = ((4096, 1024), (8192, 4096), (16384, 2048), (16384, 4096), (16384, 8192), (32768, 5120))  # tokens and width
VOCABULARIES = ((4096, 32768), (8192, 32768), (8192, 128256), (2048, 50257))
LISTS = ((12, 768, 2048), (24, 1024, 2816), (16, 2048, 5632), (4, 4096, 14336), (96, 64, 192), (48, 128, 384), (24, 256, 704),
         (2, 4096, 14336), (48, 512, 1408), (8, 2048, 5632))  # blocks, width, feed-forward  # fmt: skip
COPIED = (1 << 20, 1 << 26, 1 << 30)  # bytes
SMALL = ((1, 128, 256, 4, 4, 704), (1, 128, 512, 8, 8, 1408))  # blocks of which the host is what is measured
BLOCKS = ((4, 2048, 768, 12, 12, 2048), (8, 2048, 1024, 16, 8, 2816), (4, 2048, 2048, 32, 8, 5632), (2, 4096, 3072, 24, 8, 8192),
          (1, 8192, 4096, 32, 8, 14336), (1, 16384, 4096, 32, 8, 14336))  # sequences, their length, width, heads, of keys, ffn  # fmt: skip
DECODED = ((2, 1024, 16, 8, 2816), (8, 1024, 16, 8, 2816), (2, 4096, 32, 8, 14336), (6, 4096, 32, 8, 14336))  # layers, width, heads, …
COMPANY, CONTEXTS = (1, 16, 64, 256), (128, 2048, 8192)  # completions under way, and the tokens that each holds
STEPS = 8  # decode steps in a round
CALLS = 8  # blocks that the host queues in a row: some hundred kernels


def attentions(where: torch.device) -> Iterator[Task]:
    cuda = where.type == "cuda"
    for seq, (heads, keys, width), stage in itertools.product(SEQUENCES if cuda else (32,), HEADS if cuda else [(4, 2, 16)], PASSES):
        fewer = 4 if seq > TOGETHER else 1
        shape = {"batch": max(1, TOGETHER // seq) if cuda else 1, "seq": seq, "heads": heads // fewer, "kv_heads": max(1, keys // fewer)}
        shape["qk_head_dim"] = width
        for how in ("", "cudnn") if cuda and keys == heads else ("",):
            yield Task("attention", stage, "bf16", shape, partial(timed, partial(_attention, shape, stage, how)), how)


PASSES = ("forward", "backward")


def _attention(shape: dict[str, int], stage: str, how: str, where: torch.device) -> Call:
    batch, seq, width = shape["batch"], shape["seq"], shape["qk_head_dim"]
    q, k, v = (_drawn(where, batch, shape[h], seq, width) for h in ("heads", "kv_heads", "kv_heads"))
    attend = Attend()
    if not how:
        return pass_of(attend, (q, k, v), stage)

    def chosen(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(*inputs)  # type: ignore[no-any-return]

    return pass_of(chosen, (q, k, v), stage)


def _drawn(where: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=where, dtype=torch.bfloat16, requires_grad=True)


def moving(where: torch.device) -> Iterator[Task]:
    """Kernels that only move tensors: m tokens of width k, or logits of n tokens."""
    cuda = where.type == "cuda"
    for m, k in MOVED if cuda else [(32, 16)]:
        for op, make in MOVES.items():
            for stage in PASSES if op not in ("add", "cast") else ("forward",):
                yield Task(op, stage, "bf16", {"m": m, "k": k}, partial(timed, partial(make, m, k, stage)))
    for m, n in VOCABULARIES if cuda else [(16, 64)]:
        for stage in PASSES:
            yield Task("loss", stage, "bf16", {"m": m, "n": n}, partial(timed, partial(_loss, m, n, stage)))


def _norm(m: int, k: int, stage: str, where: torch.device) -> Call:
    return pass_of(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), (_drawn(where, m, k), _drawn(where, k)), stage)


def _swiglu(m: int, k: int, stage: str, where: torch.device) -> Call:
    return pass_of(lambda gate, up: F.silu(gate) * up, (_drawn(where, m, k), _drawn(where, m, k)), stage)


def _gelu(m: int, k: int, stage: str, where: torch.device) -> Call:
    return pass_of(partial(F.gelu, approximate="tanh"), (_drawn(where, m, k),), stage)


def _add(m: int, k: int, stage: str, where: torch.device) -> Call:
    return pass_of(torch.add, (_drawn(where, m, k), _drawn(where, m, k)), stage)


def _cast(m: int, k: int, stage: str, where: torch.device) -> Call:
    """A weight from fp32 to bf16, as sharding gathers it."""
    x = torch.randn(m, k, device=where)
    return partial(x.to, torch.bfloat16)


def _rotary(m: int, k: int, stage: str, where: torch.device) -> Call:
    """Heads of 128, or of all the width where it is less."""
    width = min(128, k)
    cos, sin = (t.to(torch.bfloat16) for t in rotary(torch.arange(m, device=where), width, 1e4))
    return pass_of(rotate, (_drawn(where, 1, k // width, m, width),), stage, cos, sin)


def _embedding(m: int, k: int, stage: str, where: torch.device) -> Call:
    tokens = torch.randint(min(32768, 8 * m), (m,), device=where)
    return pass_of(lambda table: F.embedding(tokens, table), (_drawn(where, min(32768, 8 * m), k),), stage)


def _quantise(m: int, k: int, stage: str, where: torch.device) -> Call:
    """Rounding to fp8; of a gradient also the copy whose columns are rows."""
    x = torch.randn(m, k, device=where, dtype=torch.bfloat16)
    if stage == "forward":
        return partial(fp8._round, x, fp8.E4M3)
    return partial(_turned, x)


def _turned(grad: Tensor) -> Tensor:
    return fp8._round(grad, fp8.E5M2)[0].T.contiguous()


MOVES: dict[str, Callable[[int, int, str, torch.device], Call]] = {
    "norm": _norm, "swiglu": _swiglu, "gelu": _gelu, "add": _add, "cast": _cast, "rotary": _rotary, "embedding": _embedding,
    "quantise": _quantise,
}  # fmt: skip


def _loss(m: int, n: int, stage: str, where: torch.device) -> Call:
    targets = torch.randint(n, (1, m), device=where)
    return pass_of(lambda x: loss_sum(x[None], targets), (_drawn(where, m, n),), stage)


def updates(plan: Plan, where: torch.device) -> Iterator[Task]:
    """Clipping and a step of AdamW on the tensors of some blocks; m counts them, k their numbers."""
    for blocks, width, ffn in LISTS if where.type == "cuda" else [(2, 16, 32)]:
        sizes = blocks * [(width, width)] * 4 + blocks * [(ffn, width), (ffn, width), (width, ffn)] + 2 * blocks * [(width,)]
        shape = {"m": len(sizes), "k": sum(int(torch.Size(size).numel()) for size in sizes)}
        yield Task("optimizer", "step", "fp32", shape, partial(timed, partial(_update, sizes, plan.train.learning_rate)))


def _update(sizes: list[tuple[int, ...]], rate: float, where: torch.device) -> Call:
    weights = [nn.Parameter(torch.randn(*size, device=where)) for size in sizes]
    adam, grads = torch.optim.AdamW(weights, lr=rate, fused=True), [torch.randn_like(weight) for weight in weights]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad

    def step() -> None:
        optim.shrink(grads, optim.sum_of_squares(grads).sqrt(), 1e9)
        adam.step()

    return step


def copies(where: torch.device) -> Iterator[Task]:
    """Between host and device."""
    cuda = where.type == "cuda"
    for size, stage, how in itertools.product(COPIED if cuda else (4096,), ("to_host", "to_device"), ("pinned", "pageable")[not cuda :]):
        yield Task("copy", stage, "bf16", {"bytes": size}, partial(timed, partial(_copy, size, stage, how)), how)


def _copy(size: int, stage: str, how: str, where: torch.device) -> Call:
    device, host = torch.ones(size, device=where, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8, pin_memory=how == "pinned")
    into, out_of = (host, device) if stage == "to_host" else (device, host)
    return partial(into.copy_, out_of, non_blocking=how == "pinned")


def decodes(plan: Plan, where: torch.device) -> Iterator[Task]:
    """Steps of the generation engine: m layers of width k, a batch of completions that hold seq tokens each."""
    cuda = where.type == "cuda"
    for size, batch, seq in itertools.product(
        DECODED if cuda else [(1, 16, 2, 2, 32)], COMPANY if cuda else [2], CONTEXTS if cuda else [4]
    ):
        shape = dict(zip(("m", "k", "heads", "kv_heads", "n"), size, strict=True)) | {"batch": batch, "seq": seq}
        yield Task("decode", "step", "bf16", shape, partial(_decode, plan, shape))


def _decode(plan: Plan, shape: dict[str, int], watch: Stopwatch) -> dict[str, float]:
    sizes = {"layers": shape["m"], "hidden": shape["k"], "heads": shape["heads"], "kv_heads": shape["kv_heads"], "ffn": shape["n"]}
    with watch.where:
        model = Decoder(dense(plan.model).but(**sizes)).to(torch.bfloat16).requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    new = 7 * STEPS  # a step that fills the cache, then six rounds
    engine = Engine(model, slots=shape["batch"], longest=shape["seq"] + new, new_tokens=new, end=-1, temperature=1.0, device=watch.where)
    engine.submit(Request(0, number, (1,) * shape["seq"], number) for number in range(shape["batch"]))
    engine.step()
    return told(watch.stepped(engine.step, STEPS))


def launches(plan: Plan, where: torch.device) -> Iterator[Task]:
    """The smallest kernel between two events, behind others, and on the host; and blocks on the host."""
    for stage, how in (("alone", Stopwatch.time), ("queued", Stopwatch.queued), ("hosted", Stopwatch.hosted)):
        yield Task("launch", stage, "bf16", {"m": 1, "k": 1}, partial(_smallest, how))
    yield from _blocks("host", plan, SMALL if where.type == "cuda" else ((1, 8, 16, 2, 2, 32),))


def blocks(plan: Plan, where: torch.device) -> Iterator[Task]:
    """Whole blocks on the device: what the times of single operations are checked on."""
    return _blocks("block", plan, BLOCKS if where.type == "cuda" else ((1, 8, 16, 2, 2, 32),))


def _blocks(op: str, plan: Plan, sizes: tuple[tuple[int, ...], ...]) -> Iterator[Task]:
    for size, stage in itertools.product(sizes, PASSES):
        shape = dict(zip(("batch", "seq", "k", "heads", "kv_heads", "n"), size, strict=True))
        yield Task(op, stage, "bf16", shape, partial(_block, plan, shape, stage, op == "host"))


def _smallest(how: Callable[[Stopwatch, Call], Any], watch: Stopwatch) -> dict[str, float]:
    one = torch.ones(1, device=watch.where)
    return told(how(watch, partial(one.add_, 1.0)))


def _block(plan: Plan, shape: dict[str, int], stage: str, host: bool, watch: Stopwatch) -> dict[str, float]:
    """Seconds in which the device computes a block's pass, or the host queues it."""
    settings = {"layers": 1, "hidden": shape["k"], "heads": shape["heads"], "kv_heads": shape["kv_heads"], "ffn": shape["n"]}
    block = Block(dense(plan.model).but(**settings), 0).to(watch.where, torch.bfloat16)
    angles = tuple(t.to(torch.bfloat16) for t in rotary(torch.arange(shape["seq"], device=watch.where), shape["k"] // shape["heads"], 1e4))
    x = _drawn(watch.where, shape["batch"], shape["seq"], shape["k"])
    how = partial(Stopwatch.hosted, watch, calls=CALLS) if host else watch.time
    if stage == "forward":
        return told(how(partial(block, x, angles, None)))
    out = block(x, angles, None)
    inputs, grad = [x, *block.parameters()], torch.randn_like(out)
    return told(how(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)))
