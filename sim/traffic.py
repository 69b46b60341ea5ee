"""What the trainer sends: every collective of one optimizer step on one rank, by kind and mesh axis, counted from its code.

The twin of what `real dry=true` traces; tests hold the two to be equal to the byte. A call's bytes are those of the larger of
what goes in and what comes out: the whole tensor of an all-gather or a reduce-scatter.
"""

from collections import defaultdict
from collections.abc import Iterator
from math import ceil, prod
from typing import NamedTuple, TypeAlias

from conf.arithmetic import recomputes, stage_blocks
from conf.plan import Model, Plan
from sim.schedule import rank_of

FP32, INT64 = 4, 8


class Call(NamedTuple):
    """Collectives of a kind over an axis: their ranks, how many in a step, and bytes of each."""

    kind: str
    axis: str
    ranks: int
    calls: int
    bytes: int


class Matrix(NamedTuple):
    """A parameter, or a stack of them, as one tensor-parallel rank holds it; `copied` over tp where it is not cut."""

    shape: tuple[int, ...]
    copied: bool = False


Unit: TypeAlias = list[Matrix]  # what FSDP gathers and reduces together


def traffic(plan: Plan, pipeline_rank: int = 0) -> list[Call]:
    """Collectives of a step on the first rank of a pipeline rank, the messages of the pipeline aside.

    Expert loads are taken as even. Selective recomputation keeps what came over the network; full recomputation sends
    again what its block sent, but for the last of it, whose result the backward pass does not need.
    """
    pp, vpp = plan.mesh.pp, plan.mesh.vpp
    stages = [stage for stage in range(pp * vpp) if rank_of(plan.mesh.pipeline, stage, pp) == pipeline_rank]
    found: dict[tuple[str, str, int, int], int] = defaultdict(int)
    for stage in stages:
        blocks = stage_blocks(plan.model.layers, pp * vpp, stage)
        for call in (*_passes(plan, blocks, stage), *_sharded(plan, blocks, stage)):
            if call.ranks > 1 and call.calls:
                found[call.kind, call.axis, call.ranks, call.bytes] += call.calls
    return [Call(kind, axis, ranks, calls, size) for (kind, axis, ranks, size), calls in sorted(found.items())]


def totals(calls: list[Call]) -> dict[tuple[str, str, int], tuple[int, int]]:
    """Calls and bytes of a step by kind, axis and ranks."""
    found: dict[tuple[str, str, int], tuple[int, int]] = {}
    for kind, axis, ranks, number, size in calls:
        before = found.get((kind, axis, ranks), (0, 0))
        found[kind, axis, ranks] = before[0] + number, before[1] + number * size
    return found


# -- with every micro-batch


def _passes(plan: Plan, blocks: range, stage: int) -> Iterator[Call]:
    """Tensor-, context- and expert-parallel calls of all micro-batches."""
    model, tp, n = plan.model, plan.mesh.tp, plan.accumulation
    tokens, size = plan.train.micro_batch * plan.train.seq_len // plan.mesh.cp, 2 if plan.train.half else FP32
    activations = tokens * model.hidden * size
    for index in blocks:
        yield from (call._replace(calls=n * call.calls) for call in _block(plan, index, tokens, size))
    if stage == 0:  # the embedding's rows are summed over tp and parted by tokens; their gradients are gathered
        yield Call("reduce-scatter", "tp", tp, n, activations)
        yield Call("all-gather", "tp", tp, n, activations)
    if stage == plan.mesh.pp * plan.mesh.vpp - 1:
        yield Call("all-gather", "tp", tp, n, activations)
        yield Call("reduce-scatter", "tp", tp, n, activations)
        yield Call("all-reduce", "tp", tp, n, tokens * FP32)  # largest logit of a token
        yield Call("all-reduce", "tp", tp, n, 2 * tokens * FP32)  # sum of its exponentials, and the target's logit


def _block(plan: Plan, index: int, tokens: int, size: int) -> Iterator[Call]:
    """Calls of one block and micro-batch."""
    model, tp, train = plan.model, plan.mesh.tp, plan.train
    full = train.recompute == "full" and recomputes(train.recompute_share, index)
    mixed = _mixed(model, index)
    parts = 1 + (not mixed or model.moe.shared > 0)  # attention, and a feed-forward that all tokens visit
    activations = tokens * model.hidden * size
    # Computed again, a block gathers its inputs again and sums its attention again; the last sum is not needed.
    yield Call("all-gather", "tp", tp, parts * (2 + full), activations)
    yield Call("reduce-scatter", "tp", tp, parts * (2 + full) - full * (not mixed), activations)
    yield from _attention(plan, tokens, size, 1 + full)
    if mixed:
        yield from _experts(plan, tokens // tp, size, 1 + full)


def _mixed(model: Model, index: int) -> bool:
    return model.moe.experts > 0 and index >= model.moe.dense_layers


def _attention(plan: Plan, tokens: int, size: int, forwards: int) -> Iterator[Call]:
    """What spreading a sequence over cp sends."""
    model, cp, tp = plan.model, plan.mesh.cp, plan.mesh.tp
    rope = model.mla.rope if model.mla.kv_rank else 0
    query, key, value = model.heads * (model.head_dim + rope), model.kv_heads * (model.head_dim + rope), model.kv_heads * model.head_dim
    query, key, value, out = (tokens * width * size // tp for width in (query, key, value, model.heads * model.head_dim))
    if plan.mesh.cp_kind == "ring":  # keys and values as one, of the keys' width; their fp32 gradients go the whole way round
        yield Call("all-to-all", "cp", cp, (forwards + 1) * (cp - 1), 2 * key)
        yield Call("all-to-all", "cp", cp, cp, 2 * key * FP32 // size)
    elif plan.mesh.cp_kind == "gather":
        for each in (key, value):
            yield Call("all-gather", "cp", cp, forwards, each * cp)
            yield Call("reduce-scatter", "cp", cp, 1, each * cp)
    else:
        for each in (query, key, value, out):
            yield Call("all-to-all", "cp", cp, forwards + 1, each)


def _experts(plan: Plan, tokens: int, size: int, forwards: int) -> Iterator[Call]:
    """Rows to the experts and back, how many of them, and the visits of a sequence for the balancing loss."""
    moe, ep = plan.model.moe, plan.mesh.ep
    rows = tokens * moe.top_k * plan.model.hidden * size
    yield Call("all-to-all", "ep", ep, forwards, moe.experts * INT64)
    yield Call("all-to-all", "ep", ep, 2 * (forwards + 1), rows)
    if moe.balance == "loss":
        yield Call("all-reduce", "sequence", plan.mesh.cp * plan.mesh.tp, forwards, plan.train.micro_batch * moe.experts * FP32)


# -- with every unit of FSDP


def _sharded(plan: Plan, blocks: range, stage: int) -> Iterator[Call]:
    """Gathers and reductions of the units of a stage.

    A block is gathered for each forward and backward pass, the head's and the root's unit once a micro-batch, and in a
    pipeline everything once a step. Gradients are reduced with the last micro-batch, in fp32: over tp where a tensor is copied,
    over the shards, and over the replicas.
    """
    mesh, train = plan.mesh, plan.train
    shards, n, size = plan.dp_shard * mesh.cp, plan.accumulation, 2 if train.half else FP32
    common, experts = ("dp_shard", shards), ("dp_expert", shards * mesh.tp // mesh.ep)
    last = stage == mesh.pp * mesh.vpp - 1
    for index in blocks:
        mixed = _mixed(plan.model, index)
        yield from _unit(plan, _of_block(plan, index), common, 1 if mesh.pp > 1 else 2 * n, size)
        if mixed:
            yield from _unit(plan, _of_experts(plan, experts[1]), experts, 1 if mesh.pp > 1 else 2 * n, size)
    for unit in _ends(plan, stage == 0, last):
        yield from _unit(plan, unit, common, 1 if mesh.pp > 1 else n, size)


def _unit(plan: Plan, unit: Unit, axis: tuple[str, int], gathers: int, size: int) -> Iterator[Call]:
    name, ranks = axis
    shard = sum(ceil(matrix.shape[0] / ranks) * prod(matrix.shape[1:]) for matrix in unit)  # rows are padded to divide
    if not unit:
        return
    yield Call("all-gather", name, ranks, gathers, shard * ranks * size)
    yield Call("reduce-scatter", name, ranks, 1, shard * ranks * FP32)
    yield Call("all-reduce", "dp_replicate", plan.mesh.dp_replicate, 1, shard * FP32)
    for matrix in unit:
        yield Call("all-reduce", "tp", plan.mesh.tp, int(matrix.copied), prod(matrix.shape) * FP32)


def _of_block(plan: Plan, index: int) -> Unit:
    """A block's parameters but for its routed experts, as the trainer lays them out."""
    model, tp = plan.model, plan.mesh.tp
    h, mla, bias = model.hidden, model.mla, model.layer_norm
    wide, value, kv = model.heads * model.head_dim, model.heads * model.head_dim, model.kv_heads * model.head_dim
    unit = [Matrix((h,), True)] * (2 + 2 * bias)
    if mla.kv_rank:
        wide = model.heads * (model.head_dim + mla.rope)
        unit += [Matrix((mla.q_rank, h), True), Matrix((mla.q_rank,), True), Matrix((wide // tp, mla.q_rank))] if mla.q_rank else [
            Matrix((wide // tp, h))]  # fmt: skip
        unit += [Matrix((mla.kv_rank + mla.rope, h), True), Matrix((mla.kv_rank,), True), Matrix((2 * value // tp, mla.kv_rank))]
    else:
        unit += [Matrix((wide // tp, h)), *[Matrix((kv // tp, h))] * 2]
        unit += [Matrix((model.head_dim,), True)] * (2 * model.qk_norm)
        unit += ([Matrix((wide // tp,)), *[Matrix((kv // tp,))] * 2, Matrix((h,), True)]) * bias
    unit.append(Matrix((h, value // tp)))
    if not _mixed(model, index):
        return unit + _feed_forward(plan, model.ffn)
    return [
        *unit,
        Matrix((model.moe.experts, h), True),
        *(_feed_forward(plan, model.moe.shared * model.moe.ffn) if model.moe.shared else []),
    ]


def _feed_forward(plan: Plan, width: int) -> Unit:
    model, tp = plan.model, plan.mesh.tp
    up = [Matrix((width // tp, model.hidden)), *[Matrix((width // tp,))] * model.layer_norm] * (1 + model.gated)
    return [*up, Matrix((model.hidden, width // tp)), *[Matrix((model.hidden,), True)] * model.layer_norm]


def _of_experts(plan: Plan, ranks: int) -> Unit:
    """Routed experts, sharded by each expert's rows where those divide, else by whole experts."""
    moe, h, local = plan.model.moe, plan.model.hidden, plan.model.moe.experts // plan.mesh.ep
    if h % ranks == 0 and moe.ffn % ranks == 0:
        return [Matrix((moe.ffn, local, h))] * 2 + [Matrix((h, local, moe.ffn))]
    return [Matrix((local, moe.ffn, h))] * 2 + [Matrix((local, h, moe.ffn))]


def _ends(plan: Plan, first: bool, last: bool) -> list[Unit]:
    """The units of head and root: a tied embedding lies in the root with all that has no unit of its own."""
    model, tp = plan.model, plan.mesh.tp
    table = [Matrix((model.vocab // tp, model.hidden))]
    norm = [Matrix((model.hidden,), True)] * (1 + model.layer_norm)
    embedding = [*table, *[Matrix((model.position_rows, model.hidden), True)] * (model.position_rows > 0)]
    if first and last and model.tied:
        return [[*embedding, *norm]]
    return [[*norm, *table]] * last + [embedding] * first
