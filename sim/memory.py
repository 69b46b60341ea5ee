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
    """The moments of a step that can be the fullest, on one pipeline rank.

    Gradients are added up in fp32, unsharded, until the last micro-batch, with which they are reduced; the buffer of a reduction is
    held until the next one's.
    """
    sharded, several, size = np.equal(p.zero, 3), np.greater(p.accumulation, 1), p.size
    always = {"state": _state(p, stage), "messages": stage.messages}
    added = np.where(sharded & several, FP32 * stage.held, 0.0)  # all of the gradients of the micro-batches before
    table = stage.tables * block.table  # of embedding and head
    head = stage.last * block.table
    unsharded = np.where(sharded, size * np.where(p.pp > 1, stage.held, table), 0.0)
    both = np.where(sharded & (p.pp == 1), size * (table - head + block.common + np.where(block.mixed > 0, 0.0, block.common)), unsharded)
    # Megatron's kernels leave autograd an empty weight gradient, one of each shape (get_dummy_wgrad of Transformer Engine's module/base.py).
    empty = np.where(sharded, 0.0, size * (block.common + block.expert))
    copies = np.where((p.tp > 1) & sharded, 3 * FP32 + size, np.where(sharded, 3 * FP32, FP32 + size))
    logits = stage.last * block.tokens * p.vocab / p.tp
    ends = stage.last * block.tokens * p.hidden * (1 + 1 / p.tp) * size  # inputs of the last norm and of the head
    reduced = np.where(sharded, np.where(several, 0.0, FP32 * np.where(p.pp > 1, 0.0, head)), 0.0)
    loss = always | {
        "gathered": unsharded, "gradients": added + empty + np.where(sharded, 0.0, size * head), "logits": copies * logits + ends,
        "activations": stage.activations,
    }  # fmt: skip
    back = always | {
        "gathered": both, "gradients": added + reduced + empty + np.where(sharded, size * block.down, 0.0), "working": block.working,
        "activations": stage.activations,
    }  # fmt: skip
    late = always | {
        "gathered": both, "gradients": added + reduced + empty + np.where(sharded, size * block.feed, 0.0), "working": block.attending,
        "activations": stage.activations - block.freed,
    }  # fmt: skip
    routed = block.routed * (block.mixed > 0)
    mixture = always | {
        "gathered": both + np.where(sharded & (p.pp == 1), size * 2 * routed, 0.0), "gradients": added + reduced + empty,
        "experts": block.rows, "working": block.again, "activations": stage.activations,
    }  # fmt: skip
    whole = block.common + routed
    reducing = always | {
        "gathered": both, "activations": stage.activations - block.kept * (p.pp == 1),
        "gradients": np.where(sharded, added + np.where(several, FP32, FP32 + size) * np.where(p.pp > 1, 0.0, whole), 0.0),
    }  # fmt: skip
    heads = always | {
        "gathered": unsharded, "activations": stage.activations, "logits": ends,
        "gradients": np.where(sharded, added + np.where(several, FP32, FP32 + size) * np.where(p.pp > 1, 0.0, head), 0.0),
    }  # fmt: skip
    update = {"state": _state(p, stage) + np.where(sharded, FP32 * stage.shard, 0.0), "messages": stage.messages}
    return [loss, back, late, mixture, reducing, heads, update]


def _state(p: Any, stage: SimpleNamespace) -> Array:
    """FSDP: fp32 weights and moments of the shard. Else what Megatron holds: weights, fp32 gradients, weights and moments."""
    whole = p.size * (p.size < FP32) + FP32 * (p.zero != 2) + (FP32 + p.moments) * (p.zero == 0)
    split = (FP32 + p.moments) * (p.zero > 0) + FP32 * (p.zero == 2)
    return np.asarray(np.where(p.zero == 3, (FP32 + p.moments) * stage.shard, whole * stage.held + split * stage.shard))


# -- where


def in_flight(p: Any, rank: Any) -> Array:
    """Passes of a micro-batch through a virtual stage that a pipeline rank keeps at once, until their weights' gradients are there.

    GPipe: all. 1F1B: as many as there are stages from here on. Interleaved: its warm-up and one (Narayanan et al. 2021, section
    2.2.2). Zero-bubble: those of its first rank everywhere, because weights wait; the V-shaped ones likewise two a rank (Qi et al.
    2024), DualPipeV one more on the last (DeepSeek-V3). Equal to torch's schedules and to sim.schedule's (tests/test_memory.py).
    """
    count, turn = p.accumulation, np.minimum(p.pp, p.accumulation)
    plain = np.where(p.vpp > 1, 2 * (p.pp - rank - 1) + (p.vpp - 1) * turn + 1, p.pp - rank)
    v_shaped = np.minimum(2 * p.pp + p.dual * (rank == p.pp - 1), count + 1 + rank)
    most = np.where(p.v_shaped, v_shaped, np.where(p.parted, (p.vpp - 1) * turn + p.pp, np.where(p.gpipe, count, plain)))
    return np.asarray(np.minimum(count * p.vpp, most))


def _stage(p: Any, block: SimpleNamespace, rank: Any) -> SimpleNamespace:
    """What one pipeline rank has: layers, parameters and passes in flight."""
    stages, whole = p.pp * p.vpp, p.layers % (p.pp * p.vpp) > 0
    ends = whole & ((p.layers + 2) % stages == 0)  # embedding and head count as layers
    first, last = np.equal(rank, 0), np.where(p.v_shaped, rank == 0, rank == p.pp - 1)
    shared = np.where(ends, (p.layers + 2) / p.pp - first - last, np.floor(p.layers * (rank + 1) / p.pp) - np.floor(p.layers * rank / p.pp))
    layers = np.where(p.pp > 1, shared, p.layers)
    dense = np.where(p.pp > 1, np.clip(p.moe.dense_layers - rank * layers / p.vpp, 0, layers / p.vpp), p.moe.dense_layers)
    mixed = np.where(p.moe.experts > 0, layers - dense, 0.0)
    tables = first + last * np.where(first & last & (p.tied > 0), 0, 1)
    common = (layers - mixed) * block.dense_parameters + mixed * block.mixed_parameters + tables * block.table
    routed = mixed * block.routed
    spread = p.dp_shard * p.cp
    flight = in_flight(p, rank) / p.vpp
    kept = (layers - mixed) * block.dense_kept + mixed * block.mixed_kept
    message = np.where((p.pp > 1) & (p.zero == 3), block.tokens * p.hidden / p.tp * p.size, 0.0)
    passed = flight * p.vpp * message * (1 - 2 * last * (1 - first) / 2 - (1 - first))  # outputs are kept, inputs are messages
    received = np.where(p.v_shaped, 4 - 2 * first, 2 * p.vpp - first - last)
    return SimpleNamespace(
        rank=rank, last=1.0 * last, tables=tables, held=common + routed, shard=common / spread + routed / np.maximum(1, spread * p.tp / p.ep),
        activations=flight * kept + passed, messages=p.accumulation * message * received,
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
    part = h * (1 + 1 / tp + apart)  # input of a half of a block, and what comes out of its last matrix
    part = np.where(p.tp > 1, np.where(torch, 2 * h + 2 * h / tp, 2 * h / tp), 2 * h)
    none = inputs + attended, inputs + dense, mixture
    selective = part + products, part + narrow, mixture
    bytes_ = tokens * size

    def kept(feed: int) -> Any:
        some = np.where(p.selective, selective[0] + selective[feed], none[0] + none[feed])
        return bytes_ * np.where(p.recompute, h / tp, some)

    mixed = expert_layers(p) > 0
    block = {"dense_kept": kept(1), "mixed_kept": kept(2), "tokens": tokens, "mixed": 1.0 * mixed}
    copied = h * (p.mla.kv_rank + p.mla.q_rank + p.mla.rope * (p.mla.kv_rank > 0))  # latent projections, not cut over tp
    attention = (attention_parameters(p) + vector_parameters(p) - copied) / tp + copied
    expert, up = expert_parameters(p), moe.top_k * moe.ffn / tp
    shared = moe.shared * expert / tp + h * moe.experts
    block |= {
        "dense_parameters": attention + mlp_parameters(p) / tp, "mixed_parameters": attention + shared, "table": embedding_parameters(p) / tp,
        "routed": moe.experts / p.ep * expert * mixed, "expert": expert * mixed,
    }  # fmt: skip
    all_dense = (expert_layers(p) < p.layers) * 1.0
    wide = np.where(all_dense > 0, p.ffn, moe.shared * moe.ffn) / tp
    block["common"] = np.where(all_dense > 0, block["dense_parameters"], block["mixed_parameters"])
    block["down"], block["feed"] = wide * h, (2 + p.gated) * wide * h
    again = np.where(p.recompute, none[0] + np.where(all_dense > 0, none[1], none[2]) - h / tp, np.where(p.selective, (1 + p.gated) * wide + h, 0.0))
    block["again"] = bytes_ * np.where(p.recompute, none[0] + none[2] - h / tp, 0.0)
    block["working"] = bytes_ * (again + (1 + p.gated) * wide + 2 * h / tp + apart * h)
    block["attending"] = bytes_ * (np.where(p.recompute, none[0], 0.0) + _attending(p))
    block["freed"] = bytes_ * np.where(p.recompute, 0.0, np.where(p.selective, selective[1], none[1]))
    block["kept"] = np.where(all_dense > 0, block["dense_kept"], block["mixed_kept"])
    block["rows"] = bytes_ * 2 * moe.top_k * h / tp
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
