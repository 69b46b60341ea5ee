"""What autograd keeps of a block, and what its backward pass holds besides: bytes of one micro-batch on one rank.

Counted from the trainer's own code, tensor by tensor; `real dry=true` traces the same. Its eager code keeps what was gathered over tp
whole, silu(gate) beside its product with up, and the router's fp32 input. Megatron's keeps a norm's output in parts and gathers it
again, makes SwiGLU in one kernel, and weighs experts' rows before the last product, so that what comes back is not kept.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from conf.arithmetic import (
    attention_parameters,
    embedding_parameters,
    expert_layers,
    expert_parameters,
    mlp_parameters,
    query_width,
    value_width,
    vector_parameters,
)

FP32 = 4


def blocks(p: Any, eager: bool) -> SimpleNamespace:
    """Bytes and parameters of one block, as the trainer's eager code has them or as Megatron's.

    dense, mixed: kept from forward to backward, by kind of feed-forward; again: what is recomputed at once; working and freed:
    what the backward pass of a dense feed-forward adds to that, and what is gone before that of attention, which adds `attending`;
    waits: kept besides by a pass whose weights' gradients wait. Parameters: dense_parameters and mixed_parameters without the
    routed ones, routed, expert (one), table (embedding or head); largest: of a block's unit; down, feed: of its feed-forward.
    """
    tokens, tp, h, moe = p.micro_batch * p.seq_len / p.cp, p.tp, p.hidden, p.moe
    size = tokens * p.size
    gathered = np.greater(tp, 1) & eager
    fused = np.asarray(p.compiled | (not eager))
    attention, products = _attention(p)
    wide, narrow = _feed_forward(p, p.ffn / tp, fused)
    inner = _mixture(p, fused, eager)
    normed = np.where(gathered, h, h / tp)  # a norm's output, the input of the matrices after it; of routed experts the router's copy is
    entry = h / tp + _unfused_norm(p)
    mixture = entry + np.where(eager & np.equal(moe.shared, 0), 0.0, normed) + inner
    none = entry + normed + attention, entry + normed + wide, mixture
    # A half of a block keeps its input and what its last matrix gave; over tp also its input gathered and its output before the sum.
    half = 2 * h / tp + np.where(gathered, 2 * h, 0.0)
    # The trainer's mixture keeps all, Megatron's computes its activation again.
    lean = h / tp + normed + moe.imbalance * moe.top_k * p.etp * h / tp
    lean = lean + (moe.top_k * moe.imbalance + moe.shared) * (1 + p.gated) * moe.ffn / tp
    some = half + products, half + narrow, mixture if eager else lean

    def kept(feed: int) -> Any:
        again = np.where(p.recompute, h / tp, np.where(p.selective, some[0] + some[feed], none[0] + none[feed]))
        return size * (p.recompute_share * again + (1 - p.recompute_share) * (none[0] + none[feed]))

    dense, experts = np.less(expert_layers(p), p.layers), np.greater(expert_layers(p), 0)
    ffn = np.where(dense, p.ffn, moe.shared * moe.ffn) / tp
    whole = none[0] + np.where(dense, none[1], none[2])
    again = np.where(p.recompute, whole - h / tp, np.where(p.selective, (1 + p.gated) * ffn + h, 0.0))
    return SimpleNamespace(
        tokens=tokens, dense=kept(1), mixed=kept(2), kept=np.where(dense, kept(1), kept(2)),
        working=size * (again + (1 + p.gated) * ffn + 2 * h / tp + gathered * h),
        freed=size * np.where(p.recompute, 0.0, np.where(p.selective, some[1], none[1])),
        attending=size * (np.where(p.recompute, none[0], 0.0) + _attending(p)),
        rows=size * experts * 2 * moe.top_k * moe.imbalance * p.etp * h / tp,
        mixture=size * experts * np.where(p.recompute, none[0] + none[2] - h / tp, 0.0),
        waits=size * (np.where(p.recompute | p.selective, whole, 0.0) + np.where(dense, narrow, inner) + products + 5 * h / tp),
        **_parameters(p, ffn, dense, experts),
    )  # fmt: skip


def _parameters(p: Any, ffn: Any, dense: Any, experts: Any) -> dict[str, Any]:
    """Of one block on one rank; latent projections, routers and norms are not cut over tp."""
    copied = p.hidden * (p.mla.kv_rank + p.mla.q_rank + p.mla.rope * (p.mla.kv_rank > 0))
    attention = (attention_parameters(p) - copied + vector_parameters(p)) / p.tp + copied
    expert, plain = expert_parameters(p), attention + mlp_parameters(p) / p.tp
    mixed = attention + p.moe.shared * expert / p.tp + p.hidden * p.moe.experts
    return {
        "dense_parameters": plain, "mixed_parameters": mixed, "largest": np.where(dense, plain, mixed), "expert": experts * expert / p.etp,
        "routed": experts * p.moe.experts / p.ep * expert / p.etp, "table": embedding_parameters(p) / p.tp,
        "down": ffn * p.hidden, "feed": (2 + p.gated) * ffn * p.hidden,
    }  # fmt: skip


def _attention(p: Any) -> tuple[Any, Any]:
    """Elements a token that attention keeps, its input aside: all of them, and what matrix products and the kernel gave alone.

    Queries and keys after rotation, values, and the output; before a norm of queries and keys them too. Latent attention keeps
    its narrow vectors before and after their norms, on every tensor-parallel rank. Spread over cp the output is kept in the order of
    tokens too, or keys and values gathered, with a mask. Without fusion every score, 5 a s (Korthikanti et al. 2022, table 2).
    """
    wide, value, key, mla = query_width(p), value_width(p), p.kv_heads * p.head_dim, p.mla
    latent, gathers = np.greater(mla.kv_rank, 0), np.greater(p.cp, 1) & p.gathered
    ordinary = wide + 2 * key + value + (wide + key) * p.qk_norm
    narrow = mla.q_rank + mla.kv_rank + mla.rope
    spread = np.where(gathers, (p.cp - 1) * np.where(latent, wide + value, 2 * key), value * np.greater(p.cp, 1))
    scores = (1 - p.fused_attention) * ~p.core * 2.5 * p.heads * p.seq_len  # in elements of 2 bytes
    kept = np.where(latent, 2 * wide + 3 * value, ordinary) + spread + scores
    sent = np.where(latent, wide + value, 2 * key)  # what came over the network is kept with them; a ring's last rank has all parts whole
    ring, traded = (p.cp - 1) * (np.where(latent, 2 * wide, 2 * key) + value), sent + wide + value
    sent = np.greater(p.cp, 1) * np.where(p.gathered, p.cp * sent, np.where(_ring(p), ring, traded))
    products = np.where(latent, wide + 3 * value, wide + 2 * key + value) + sent
    mask = gathers * p.seq_len / p.micro_batch
    return kept / p.tp + mask + latent * (narrow + mla.q_rank + mla.kv_rank), products / p.tp + latent * narrow


def _unfused_norm(p: Any) -> Any:
    """Elements a token that torch's RMSNorm on a CPU keeps besides its input: what it divided, in fp32, and its input where that is not."""
    copies = FP32 / p.size * (1 + np.less(p.size, FP32)) * p.hidden / p.tp
    return np.where(p.beside, 0.0, copies * (1 - 1 * p.layer_norm))


def _feed_forward(p: Any, width: Any, fused: Any) -> tuple[Any, Any]:
    """The same of a feed-forward: gate, up, silu(gate) and their product, without silu(gate) where one kernel makes the product;
    without a gate up and gelu(up)."""
    return (2 + p.gated * (2 - fused)) * width, (1 + p.gated) * width


def _mixture(p: Any, fused: Any, eager: bool) -> Any:
    """All of them of a mixture: rows sent to experts, what came back, theirs, those of shared experts, and the router's input."""
    wide, _ = _feed_forward(p, p.moe.ffn, fused)
    router = FP32 / p.size * p.hidden if eager else 0.0
    rows = p.moe.top_k * p.moe.imbalance * (wide + (1 + eager) * p.etp * p.hidden)  # ranks that share experts see each other's rows
    return (rows + p.moe.shared * wide + router) / p.tp


def _attending(p: Any) -> Any:
    """Elements a token of the backward pass of attention: gradients of queries, keys, values and output; a ring's in fp32, and its
    keys and values once for every query head."""
    wide, value, key = query_width(p), value_width(p), p.kv_heads * p.head_dim
    plain = np.where(np.greater(p.mla.kv_rank, 0), 3 * wide + 3 * value, 2 * wide + 2 * key + value)
    return (np.where(np.greater(p.cp, 1) & _ring(p), 12 * wide, plain) + p.hidden) / p.tp


def _ring(p: Any) -> Any:
    return ~(p.gathered | p.ulysses)
