"""The operations of a training step, timed: raw rows for `foretold analysis calibrate`.

Each operation is the model's own code on tensors of many sizes, forward and backward, on all ranks at once, because
cores share caches and memory. Nothing is fitted here.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from conf.arithmetic import attention_matrices
from conf.plan import Mla, Model, Moe, Plan
from real.cluster import device
from real.loss import loss_sum
from real.model import Block, rotary, rotate

Row = dict[str, Any]
FORGOTTEN = 64_000_000  # bytes: more than a large last-level cache holds


@dataclass(frozen=True)
class Operation:
    """What to run, on which inputs; the forward's output is differentiated for the backward."""

    op: str
    shape: dict[str, int]
    forward: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def rows(plan: Plan, crew: dist.ProcessGroup | None = None) -> Iterator[Row]:
    """One row an operation, size and stage, timed by a crew of ranks at once, or by this one alone."""
    where = device(plan)
    dtype = torch.bfloat16 if plan.train.half else torch.float32
    cuda = where.type == "cuda"
    scale = 16 if cuda else 1  # a GPU needs larger tensors to show its rates
    for operation in (*_operations(where, dtype, scale), *_of_the_plan(plan, where, dtype)):
        yield from _timed(operation, plan, cuda, crew)
    yield from _blocks(plan, where, dtype, scale)
    yield from _optimizer(plan, where, scale, crew)


def row(plan: Plan, op: str, stage: str, shape: dict[str, int], seconds: float) -> Row:
    base = {"gpu": plan.gpu.name, "precision": plan.train.precision, "ranks": plan.ranks, "op": op, "stage": stage}
    return base | {name: shape.get(name) for name in COLUMNS} | {"time_us": seconds * 1e6}


COLUMNS = ("cv", "batch", "m", "n", "k", "seq", "heads", "kv_heads", "qk_head_dim", "bytes")


def _operations(where: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Operation]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=where, dtype=dtype, requires_grad=True)

    for m in (512 * scale, 2048 * scale):
        for n, k in ((64, 192), (160, 160), (512, 192), (256, 704), (1024, 256), (2048, 224), (384, 1024)):
            if m * n * k * scale**2 <= (3e9 if scale == 1 else 4e13):
                shape = {"m": m, "n": n * scale, "k": k * scale}
                yield Operation("matmul", shape, F.linear, (tensor(m, k * scale), tensor(n * scale, k * scale)))
    for batch, seq, heads, kv, width in (
        (8, 128, 6, 2, 32),
        (8, 256, 4, 4, 32),
        (4, 512, 4, 2, 48),
        (2, 512, 8, 4, 64),
        (4, 256, 8, 8, 64),
        (1, 1024, 6, 6, 32),
    ):
        seq = seq * min(scale, 4)
        shape = {"batch": batch, "seq": seq, "heads": heads, "kv_heads": kv, "qk_head_dim": width}
        q, k, v = (tensor(batch, seq, h, width) for h in (heads, kv, kv))
        yield Operation("attention", shape, _attention, (q, k, v))
    for m, k in ((1024, 192), (1024, 512), (4096, 320), (2048, 1024)):
        m *= scale
        yield Operation("norm", {"m": m, "k": k}, lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), (tensor(m, k), tensor(k)))
        yield Operation("swiglu", {"m": m, "k": 2 * k}, lambda g, u: F.silu(g) * u, (tensor(m, 2 * k), tensor(m, 2 * k)))
        yield Operation("add", {"m": m, "k": k}, torch.add, (tensor(m, k), tensor(m, k)))
        yield Operation("embedding", {"m": m, "k": k, "n": 2048}, _embedding(m, where), (tensor(2048, k),))
    for batch, seq, heads, width in ((8, 128, 6, 32), (4, 512, 4, 48), (2, 1024, 8, 64)):
        cos, sin = (t.to(dtype) for t in rotary(torch.arange(seq, device=where), width, 1e4))
        x = tensor(batch * scale, heads, seq, width)
        yield Operation("rotary", {"m": batch * scale * seq, "k": heads * width}, lambda x, c=cos, s=sin: rotate(x, c, s), (x,))
    for m, n in ((512, 2048), (1024, 4096), (2048, 2048), (256, 8192)):
        m *= scale
        targets = torch.randint(n, (1, m), device=where)
        yield Operation("loss", {"m": m, "n": n}, lambda x, t=targets: loss_sum(x[None], t), (tensor(m, n),))
    yield Operation("launch", {"m": 1, "k": 1}, torch.add, (tensor(1), tensor(1)))


def _of_the_plan(plan: Plan, where: torch.device, dtype: torch.dtype) -> Iterator[Operation]:
    """The matrix products and the attention of one of the plan's micro-batches, at their own shapes, where memory allows."""
    model, tp = plan.model, plan.mesh.tp
    tokens = plan.train.micro_batch * plan.train.seq_len // plan.mesh.cp
    *into, out = attention_matrices(model)
    pairs = {(int(n) // tp, int(k)) for n, k, there in into if there} | {(int(out[0]), int(out[1]) // tp)}
    pairs |= {(model.ffn // tp, model.hidden), (model.hidden, model.ffn // tp), (model.vocab // tp, model.hidden)}
    for n, k in sorted(pairs):
        if 4 * 3 * (tokens * (n + k) + n * k) <= plan.gpu.memory:

            def tensor(*shape: int) -> Tensor:
                return torch.randn(*shape, device=where, dtype=dtype, requires_grad=True)

            yield Operation("matmul", {"m": tokens, "n": n, "k": k}, F.linear, (tensor(tokens, k), tensor(n, k)))
    heads, kv, width = model.heads // tp, max(1, model.kv_heads // tp), model.head_dim
    shape = {"batch": plan.train.micro_batch, "seq": plan.train.seq_len, "heads": heads, "kv_heads": kv, "qk_head_dim": width}
    q, k, v = (torch.randn(plan.train.micro_batch, plan.train.seq_len, h, width, device=where, dtype=dtype) for h in (heads, kv, kv))
    yield Operation("attention", shape, _attention, tuple(x.requires_grad_() for x in (q, k, v)))


def _attention(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(*out.shape[:1], out.shape[2], -1)


def _embedding(m: int, where: torch.device) -> Callable[[Tensor], Tensor]:
    tokens = torch.randint(2048, (m,), device=where)
    return lambda table: F.embedding(tokens, table)


def _timed(operation: Operation, plan: Plan, cuda: bool, crew: dist.ProcessGroup | None) -> Iterator[Row]:
    """Forward and backward on tensors that the caches have forgotten, as a training step finds them: the calls take
    turns on copies that together exceed any cache."""
    size = sum(t.numel() * t.element_size() for t in operation.inputs)
    copies = [operation.inputs]
    while len(copies) < min(32, 1 + FORGOTTEN // size):
        copies.append(tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in operation.inputs))
    turns = cycle(copies)
    with torch.no_grad():
        yield row(plan, operation.op, "forward", operation.shape, best(lambda: operation.forward(*next(turns)), cuda, crew))
    graphs = []
    for inputs in copies:
        out = operation.forward(*inputs)
        graphs.append((out, [t for t in inputs if t.requires_grad], out.detach().clone()))
    again = cycle(graphs)
    seconds = best(lambda: torch.autograd.grad(*next(again), retain_graph=True), cuda, crew)
    yield row(plan, operation.op, "backward", operation.shape, seconds)


def best(work: Callable[[], Any], cuda: bool = False, crew: dist.ProcessGroup | None = None, budget: float = 0.025) -> float:
    """Median seconds of a call, over as many as fit into the budget (at least 3, after one that warms up).

    The ranks of a crew begin together: in training, too, they do the same thing at the same time.
    """
    work()
    if crew is not None:
        dist.barrier(crew)
    if cuda:
        torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 200):
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _blocks(plan: Plan, where: torch.device, dtype: torch.dtype, scale: int) -> Iterator[Row]:
    """Whole blocks: what operations cost one after another, beyond their times alone, and how much that varies (cv)."""
    for batch, seq, hidden, heads, ffn in (
        (4, 256, 160, 5, 448),
        (8, 128, 224, 7, 640),
        (2, 512, 256, 8, 512),
        (8, 256, 96, 3, 320),
        (2, 256, 320, 10, 896),
        (8, 16, 192, 6, 512),
        (4, 32, 96, 3, 256),
        (1, 64, 256, 8, 704),
    ):
        hidden, ffn, heads = hidden * scale, ffn * scale, heads * min(scale, 8)
        shape = {"batch": batch, "seq": seq * min(scale, 8), "heads": heads, "kv_heads": heads, "k": hidden, "n": ffn}
        settings = {"layers": 1, "hidden": hidden, "heads": heads, "kv_heads": heads, "ffn": ffn}
        block = Block(_plain(plan.model).but(**settings), 0).to(where, dtype)
        cos, sin = (t.to(dtype) for t in rotary(torch.arange(shape["seq"], device=where), hidden // heads, 1e4))
        x = torch.randn(batch, shape["seq"], hidden, device=where, dtype=dtype, requires_grad=True)

        times: dict[str, list[float]] = {"forward": [], "backward": []}
        for _ in range(12):
            began = _now(where)
            out = block(x, (cos, sin), None)
            between = _now(where)
            out.backward(out.detach())
            times["forward"].append(between - began)
            times["backward"].append(_now(where) - between)
            block.zero_grad(set_to_none=True)
        for stage, seconds in times.items():
            typical = statistics.fmean(seconds[2:])
            yield row(plan, "block", stage, shape, typical) | {"cv": statistics.stdev(seconds[2:]) / typical}


def _plain(model: Model) -> Model:
    """A dense model with ordinary attention: what the fit of whole blocks is about."""
    return model.but(moe=Moe(), mla=Mla(), head=None, gated=True, positions="rope", layer_norm=False, qk_norm=False)


def _now(where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _optimizer(plan: Plan, where: torch.device, scale: int, crew: dist.ProcessGroup | None) -> Iterator[Row]:
    """One step of AdamW with clipping, as the trainer does it on its own shard."""
    from real import optim

    for count, width in ((8, 256), (24, 256), (12, 512), (48, 64)):
        weights = [nn.Parameter(torch.randn(width * scale, width, device=where)) for _ in range(count)]
        adam = torch.optim.AdamW(weights, lr=plan.train.learning_rate, fused=True)
        grads = [torch.randn_like(weight) for weight in weights]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad

        def step(grads: list[Tensor] = grads, adam: torch.optim.Optimizer = adam) -> None:
            optim.shrink(grads, optim.sum_of_squares(grads).sqrt(), 1e9)
            adam.step()

        numbers = sum(weight.numel() for weight in weights)
        yield row(plan, "optimizer", "step", {"m": count, "k": numbers}, best(step, where.type == "cuda", crew, 0.1))
