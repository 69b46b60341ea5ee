"""Bytes on each pipeline rank's devices, part by part, at the moments of a step when most is held.

A step is a tide: activations rise with the forward passes in flight and fall with the backward ones, while gradients rise. Which
moment is the highest depends on the plan, so each that can be is added up, on the first, the second and the last rank of the pipeline
(those between hold less than the second), and the fullest counts. Counted from the trainer's own code: which tensors
autograd keeps in a block, what FSDP2 holds unsharded, what torch's pipeline stages receive into. `real dry=true` traces the same.
With ZeRO below 3 it is Megatron's: sequence-parallel inputs are gathered again instead of kept, SwiGLU is one kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from conf.arithmetic import (
    attention_parameters,
    embedding_parameters,
    expert_layers,
    expert_parameters,
    layers_parameters,
    mlp_parameters,
    parameters,
    query_width,
    routed_parameters,
    value_width,
    vector_parameters,
)
from sim.kernels import Array

USABLE = 0.94  # of a device's memory that a run can use: the rest is the driver's, NCCL's, and holes
FP32 = 4
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0 + 8 / 256, "muon": 4.0}  # bytes a parameter; 8 bits have a scale a block of 256
PARTS = ("state", "gathered", "gradients", "activations", "working", "logits", "messages", "experts")
Moment: TypeAlias = dict[str, Any]  # bytes by part; a part that is not there is 0


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest pipeline rank, one entry a plan; `moments` are all that were added up, with the rank each is of.

    state: weights and moments, and gradients where they are always held; gathered: unsharded copies of parameters; gradients:
    those of a step, unsharded or on their way; activations: kept from forward to backward; working: what a block's backward pass
    holds besides, recomputed activations included; logits: with their loss; messages: what pipeline stages receive into;
    experts: rows on their way to experts and back.
    """

    moments: list[tuple[Array, Moment]]

    @cached_property
    def total(self) -> Array:
        return reduce(np.maximum, (_sum(moment) for _, moment in self.moments))

    @cached_property
    def rank(self) -> Array:
        """The pipeline rank that is the fullest."""
        return self._of_fullest(lambda rank, _: rank)

    def part(self, name: str) -> Array:
        """One of PARTS, on the fullest rank at the fullest moment; they add up to the total."""
        return self._of_fullest(lambda _, moment: moment.get(name, 0.0))

    def of_rank(self, rank: int) -> Array:
        """The most on one pipeline rank: the first, the second or the last."""
        found = [np.where(place == rank, _sum(moment), 0.0) for place, moment in self.moments]
        return np.asarray(reduce(np.maximum, found))

    def _of_fullest(self, pick: Callable[[Array, Moment], Any]) -> Array:
        found: Any = np.zeros(np.shape(self.total))
        for rank, moment in reversed(self.moments):
            found = np.where(_sum(moment) == self.total, pick(rank, moment), found)
        return np.asarray(found)


def _sum(moment: Moment) -> Array:
    return np.asarray(sum(moment.values()))


def held(p: Any) -> Array:
    """Parameters of the fullest tensor-, expert- and pipeline-parallel rank: what it would hold without sharding.

    Leading dense layers leave more of the mixtures to the other stages.
    """
    routed = routed_parameters(p)
    stage = np.minimum(1.0, p.layers / p.pp / np.maximum(expert_layers(p), 1))
    return np.asarray((parameters(p) - routed) / p.tp / p.pp + routed / p.ep * stage)


def memory(p: Any) -> Memory:
    """Memory of each plan; `p` holds the plans' values as arrays that broadcast (see sim.parallel)."""
    blocks = _blocks(p)
    places = [0.0] + [1.0] * bool(np.any(p.pp > 2)) + [p.pp - 1.0] * bool(np.any(p.pp > 1))
    found = []
    for rank in places:
        stage = _stage(p, blocks, np.minimum(rank, p.pp - 1))
        found += [(stage.rank, moment) for moment in _moments(p, blocks, stage)]
    return Memory(found)


# -- when


def _moments(p: Any, block: SimpleNamespace, stage: SimpleNamespace) -> list[Moment]:
    """The moments of a step that can be the fullest, on one pipeline rank."""
    always = {"state": _state(p, stage), "messages": stage.messages}
    moments = np.where(np.equal(p.zero, 3), 1.0, 0.0), _sharded(p, block, stage), _megatron(p, block, stage)
    told = []
    for mine, other in zip(moments[1], [*moments[2], *[moments[2][-1]] * len(moments[1])], strict=False):
        parts = {name: np.where(moments[0] > 0, mine.get(name, 0.0), other.get(name, 0.0)) for name in {**mine, **other}}
        told.append(always | parts)
    update = {"state": _state(p, stage) + np.where(moments[0] > 0, FP32 * stage.shard, 0.0), "messages": stage.messages}
    return [*told, update]


def _megatron(p: Any, block: SimpleNamespace, stage: SimpleNamespace) -> list[Moment]:
    """With ZeRO below 3: the loss, and the backward pass of a block.

    Its kernels leave autograd an empty weight gradient, one of each shape (get_dummy_wgrad in Transformer Engine's
    module/base.py), and one of the head while its own is computed.
    """
    empty, kept = p.size * (block.common + block.expert), {"activations": stage.activations}
    loss = (FP32 + p.size) * stage.logits + stage.ends
    return [
        kept | {"gradients": empty + p.size * stage.head, "logits": loss},
        kept | {"gradients": empty, "working": block.working},
        kept | {"gradients": empty, "experts": block.rows, "working": block.again},
    ]


def _sharded(p: Any, block: SimpleNamespace, stage: SimpleNamespace) -> list[Moment]:
    """With FSDP: the loss, the head's reduction, the first, second and last block of the backward pass, and the gradients that wait.

    Gradients are added up in fp32, unsharded, until the last micro-batch, with which they are reduced; the buffer of a reduction is
    held until the next one's. A pipeline's parameters stay unsharded, and its gradients are reduced when few activations are left.
    Else the block in work is unsharded and the one after it, the head until it is done, and the embedding.
    """
    alone, size, several = np.equal(p.pp, 1), p.size, np.greater(p.accumulation, 1)
    added = several * FP32 * stage.held - ~stage.steady * np.minimum(several * FP32 * stage.held, stage.a_pass)
    table, head, whole = stage.tables * block.table, stage.own_head, block.common + block.routed
    unsharded = size * np.where(alone, table, stage.held)
    around = size * np.where(alone, table - head + block.common + np.where(block.routed > 0, 0.0, block.common), stage.held)
    copies = np.where((p.tp > 1) | (p.pp > 1), 3 * FP32 + size, 3 * FP32)
    pending = p.parted * ~np.equal(p.dual, 1) * size * ((stage.held - table) / p.vpp + stage.last * block.table)
    tied = size * (table - head) * (p.tied > 0)
    loss = {
        "gathered": unsharded, "gradients": added + pending, "activations": stage.activations + stage.outputs,
        "logits": copies * stage.logits + stage.ends,
    }  # fmt: skip
    heads = {
        "gathered": unsharded, "activations": stage.activations, "logits": stage.ends,
        "gradients": added + alone * (FP32 + ~several * size) * head,
    }  # fmt: skip
    first = {"gathered": around, "gradients": added + alone * (~several * FP32 * head + FP32 * head / stage.spread) + tied}
    rows = {"experts": block.rows, "working": block.again, "activations": stage.activations}
    back = {"working": block.working, "activations": stage.activations}
    late = {"working": block.attending, "activations": stage.activations - block.freed}
    mixture = rows | first | {"gathered": around + alone * size * 2 * block.routed}
    second = (several * (added - FP32 * head) + ~several * FP32 * whole + FP32 * (head + whole) / stage.spread) * alone + tied
    final = (several * FP32 * (whole + table - head) + FP32 * whole + FP32 * stage.shard) * alone + tied
    reducing = np.where(several, added + FP32 * whole, (FP32 + size) * whole) * alone
    moments = [
        loss, heads, back | first | {"gradients": first["gradients"] + size * block.down},
        late | first | {"gradients": first["gradients"] + size * block.feed}, mixture,
        {"gathered": around, "gradients": reducing, "activations": stage.activations - alone * block.kept},
        {"gathered": around, "gradients": second + alone * size * block.down, "working": alone * block.working,
         "activations": stage.activations - block.kept},
        {"gathered": around, "gradients": final + alone * size * block.down, "working": alone * block.working, "activations": block.kept},
        {"gathered": unsharded, "gradients": added, "activations": stage.waiting},
    ]  # fmt: skip
    return moments


def _state(p: Any, stage: SimpleNamespace) -> Array:
    """FSDP: fp32 weights and moments of the shard. Else what Megatron holds: weights, fp32 gradients, weights and moments."""
    whole = p.size * (p.size < FP32) + FP32 * (p.zero != 2) + (FP32 + p.moments) * (p.zero == 0)
    split = (FP32 + p.moments) * (p.zero > 0) + FP32 * (p.zero == 2)
    return np.asarray(np.where(p.zero == 3, (FP32 + p.moments) * stage.shard, whole * stage.held + split * stage.shard))


# -- where


def in_flight(p: Any, rank: Any) -> Array:
    """Passes of a micro-batch through a virtual stage that a pipeline rank keeps at once, until their weights' gradients are there.

    GPipe: all. 1F1B: as many as there are stages from here on. Interleaved: its warm-up and one (Narayanan et al. 2021, section
    2.2.2). Zero-bubble: those of its first rank everywhere, because weights wait (Qi et al. 2024); the V-shaped ones two a rank,
    DualPipeV (DeepSeek-V3, 2024) one more. Equal to torch's schedules, and where the backward pass is whole to sim.schedule's
    (tests/test_memory.py).
    """
    count, turn = p.accumulation, np.minimum(p.pp, p.accumulation)
    plain = np.where(p.vpp > 1, 2 * (p.pp - rank - 1) + (p.vpp - 1) * turn + 1, p.pp - rank)
    v_shaped = np.minimum(2 * p.pp + 1 * p.dual, count + 1 + rank)
    most = np.where(p.v_shaped, v_shaped, np.where(p.parted, (p.vpp - 1) * turn + p.pp, np.where(p.gpipe, count, plain)))
    return np.asarray(np.minimum(count * p.vpp, most))


def waiting(p: Any, rank: Any) -> Array:
    """Of these, passes whose inputs' backward pass is done and whose weights' is not, when most is held; in ZBV's last rank all but one
    wait at the end of the step."""
    found = np.where(p.v_shaped, np.where(np.equal(rank, p.pp - 1), in_flight(p, rank) - 1, 1.0), rank + 1.0)
    return np.asarray(np.where(np.equal(p.parted, 1) & ~np.equal(p.dual, 1), np.minimum(found, in_flight(p, rank)), 0.0))


def _stage(p: Any, block: SimpleNamespace, rank: Any) -> SimpleNamespace:
    """What one pipeline rank has: layers, parameters and passes in flight."""
    stages = p.pp * p.vpp
    ends = (p.layers % stages > 0) & ((p.layers + 2) % stages == 0)  # embedding and head count as layers
    first, last = np.equal(rank, 0), np.where(p.v_shaped, np.equal(rank, 0), np.equal(rank, p.pp - 1)) > 0
    even = np.floor(p.layers * (rank + 1) / p.pp) - np.floor(p.layers * rank / p.pp)
    layers = np.where(ends, (p.layers + 2) / p.pp - first - last, even)
    dense = np.where(p.pp > 1, np.clip(p.moe.dense_layers - rank * layers / p.vpp, 0, layers / p.vpp), p.moe.dense_layers)
    mixed = np.where(np.greater(p.moe.experts, 0), layers - dense, 0.0)
    tables = first + last * np.where(first & last & np.greater(p.tied, 0), 0, 1)
    common = (layers - mixed) * block.dense_parameters + mixed * block.mixed_parameters + tables * block.table
    common = common + first * p.position_rows * p.hidden
    routed, spread, flight = mixed * block.routed, p.dp_shard * p.cp, in_flight(p, rank)
    kept, wait = ((layers - mixed) * block.dense_kept + mixed * block.mixed_kept) / p.vpp, waiting(p, rank)
    message = np.where((p.pp > 1) & np.equal(p.zero, 3), block.tokens * p.hidden / p.tp * p.size, 0.0)
    passed = flight * message * (1.0 * first - last)  # a stage's inputs are messages, and its outputs are kept until they come back
    received = np.where(p.v_shaped, 4 - 2 * first, 2 * p.vpp - 1.0 * first - last)
    held_back = np.where(p.v_shaped & np.equal(rank, p.pp - 1), flight - 1, flight)
    logits = last * block.tokens * p.vocab / p.tp
    outputs = np.where(p.gpipe, (p.accumulation - 1) * (FP32 + p.size), np.where(p.v_shaped, 0.0, np.maximum(wait - 1, 0.0) * p.size)) * logits
    more = layers / p.vpp * np.where(p.recompute | p.selective, block.whole, block.a_block) + layers / p.vpp * block.waiting
    return SimpleNamespace(
        rank=rank, last=1.0 * last, tables=tables, held=common + routed, spread=spread,
        head=last * block.table, own_head=last * block.table * np.where(first & np.greater(p.tied, 0), 0, 1),
        shard=common / spread + routed / np.maximum(1, spread * p.tp / p.ep), logits=logits, outputs=outputs,
        ends=last * block.tokens * p.hidden * (1 + 1 / p.tp) * p.size,  # inputs of the last norm and of the head
        activations=flight * kept + passed, a_pass=kept, steady=p.accumulation * p.vpp > flight,
        waiting=(held_back - wait) * kept + wait * more + passed, messages=p.accumulation * message * received,
    )  # fmt: skip


# -- what: widths a token


def _blocks(p: Any) -> SimpleNamespace:
    """Bytes of one micro-batch in one block, and parameters of a block, on one rank."""
    tokens, tp, h, size, moe = p.micro_batch * p.seq_len / p.cp, p.tp, p.hidden, p.size, p.moe
    torch = np.equal(p.zero, 3)
    fused, apart = p.compiled | ~torch, torch & (p.tp > 1)  # `apart`: what was gathered over tp is kept whole
    attended, products = _attention(p, apart)
    dense, narrow = _feed_forward(p, p.ffn, fused)
    inputs = h / tp + np.where(torch, h, h / tp)  # of a norm, and of the matrices after it
    routed = _mixture(p, fused)
    mixture = h / tp + np.where(torch, (moe.shared > 0) * h, h / tp) + routed
    # Input of a half of a block and what its last matrix gave; under tensor parallelism both, gathered and before they are summed.
    part = np.where(p.tp > 1, np.where(torch, 2 * h + 2 * h / tp, 2 * h / tp), 2 * h)
    none = inputs + attended, inputs + dense, mixture
    selective = part + products, part + narrow, mixture
    bytes_ = tokens * size

    def kept(feed: int) -> Any:
        some = np.where(p.selective, selective[0] + selective[feed], none[0] + none[feed])
        return bytes_ * np.where(p.recompute, h / tp, some)

    mixed = np.greater(expert_layers(p), 0)
    block = {"dense_kept": kept(1), "mixed_kept": kept(2), "tokens": tokens, "mixed": 1.0 * mixed}
    copied = h * (p.mla.kv_rank + p.mla.q_rank + p.mla.rope * (p.mla.kv_rank > 0))  # latent projections, not cut over tp
    attention = (attention_parameters(p) + vector_parameters(p) - copied) / tp + copied
    expert, up = expert_parameters(p), moe.top_k * moe.ffn / tp
    shared = moe.shared * expert / tp + h * moe.experts
    block |= {
        "dense_parameters": attention + mlp_parameters(p) / tp, "mixed_parameters": attention + shared, "table": embedding_parameters(p) / tp,
        "routed": moe.experts / p.ep * expert * mixed, "expert": expert * mixed,
    }  # fmt: skip
    all_dense = 1.0 * np.less(expert_layers(p), p.layers)
    wide = np.where(all_dense > 0, p.ffn, moe.shared * moe.ffn) / tp
    block["common"] = np.where(all_dense > 0, block["dense_parameters"], block["mixed_parameters"])
    block["down"], block["feed"] = wide * h, (2 + p.gated) * wide * h
    again = np.where(p.recompute, none[0] + np.where(all_dense > 0, none[1], none[2]) - h / tp, np.where(p.selective, (1 + p.gated) * wide + h, 0.0))
    block["again"] = bytes_ * np.where(p.recompute, none[0] + none[2] - h / tp, 0.0)
    block["working"] = bytes_ * (again + (1 + p.gated) * wide + 2 * h / tp + apart * h)
    block["attending"] = bytes_ * (np.where(p.recompute, none[0], 0.0) + _attending(p))
    block["freed"] = bytes_ * np.where(p.recompute, 0.0, np.where(p.selective, selective[1], none[1]))
    block["kept"] = np.where(all_dense > 0, block["dense_kept"], block["mixed_kept"])
    block["rows"] = bytes_ * 2 * moe.top_k * h / tp * mixed
    block["whole"] = block["a_block"] = bytes_ * (none[0] + np.where(all_dense > 0, none[1], none[2]))
    block["waiting"] = bytes_ * (np.where(all_dense > 0, narrow, routed) + products + 5 * h / tp)
    return SimpleNamespace(**block)


def _attention(p: Any, apart: Any) -> tuple[Any, Any]:
    """Elements a token that attention keeps, its input aside: all of them, and what matrix products and the kernel gave alone.

    Queries and keys after rotation, values, and the output; before a norm of queries and keys them too. Latent attention keeps what
    its narrow vectors were before and after their norms, on every tensor-parallel rank.
    """
    wide, value, key, mla = query_width(p), value_width(p), p.kv_heads * p.head_dim, p.mla
    latent = mla.kv_rank > 0
    ordinary = wide + 2 * key + value + (wide + key) * p.qk_norm
    narrow = mla.q_rank + mla.kv_rank + mla.rope
    spread = np.where(p.cp > 1, np.where(p.gathers, (p.cp - 1) * 2 * np.where(latent, wide, key), value), 0.0)  # a copy in the order of tokens
    mask = np.where(p.gathers & (p.cp > 1), p.seq_len / p.micro_batch, 0.0)
    scores = (1 - p.fused_attention) * 2.5 * p.heads * p.seq_len  # 5 a s of Korthikanti et al. 2022, table 2, in elements of 2 bytes
    kept = np.where(latent, 2 * wide + 3 * value, ordinary) + spread + scores
    products = np.where(latent, wide + 3 * value, wide + 2 * key + value)
    return kept / p.tp + mask + latent * (narrow + mla.q_rank + mla.kv_rank), products / p.tp + latent * narrow


def _feed_forward(p: Any, width: Any, fused: Any) -> tuple[Any, Any]:
    """The same of a feed-forward: gate, up, silu(gate) and their product, without silu(gate) where one kernel makes the product;
    without a gate up and gelu(up)."""
    return (2 + p.gated * (2 - fused)) * width / p.tp, (1 + p.gated) * width / p.tp


def _mixture(p: Any, fused: Any) -> Any:
    """The same of a mixture: rows sent to experts and brought back, theirs, those of shared experts, and the router's fp32 input."""
    moe, torch = p.moe, np.equal(p.zero, 3)
    inner = 2 + p.gated * (2 - fused)
    rows = moe.top_k * (inner * moe.ffn + (1 + torch) * p.hidden)  # Megatron weighs the product, so that what comes back is not kept
    return (rows + moe.shared * moe.ffn * inner + torch * FP32 / p.size * p.hidden) / p.tp


def _attending(p: Any) -> Any:
    """Elements a token of the backward pass of attention: gradients of queries, keys, values and output; a ring's in fp32, and its
    keys and values once for every query head."""
    wide, value, key = query_width(p), value_width(p), p.kv_heads * p.head_dim
    plain = np.where(p.mla.kv_rank > 0, 3 * wide + 3 * value, 2 * wide + 2 * key + value)
    return (np.where(p.rings & (p.cp > 1), 12 * wide, plain) + p.hidden) / p.tp
