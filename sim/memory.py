"""Bytes on the fullest device: state, what is gathered, activations, logits.

Counted from the trainer's own code: which tensors autograd keeps in one block, and what FSDP2 holds unsharded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.arithmetic import embedding_parameters, expert_layers, layers_parameters, parameters, query_width, routed_parameters, value_width
from sim.kernels import Array

USABLE = 0.94  # of a device's memory that a run can use: the rest is the driver's, NCCL's, and holes


@dataclass(frozen=True)
class Memory:
    """Bytes by part, one entry a plan."""

    state: Array
    gathered: Array
    activations: Array
    logits: Array

    @property
    def total(self) -> Array:
        return self.state + self.gathered + self.activations + self.logits


def held(p: Any) -> Array:
    """Parameters of the fullest tensor-, expert- and pipeline-parallel rank: what it would hold without sharding.

    Leading dense layers leave more of the mixtures to the other stages.
    """
    routed = routed_parameters(p)
    stage = np.minimum(1.0, p.layers / p.pp / np.maximum(expert_layers(p), 1))
    return np.asarray((parameters(p) - routed) / p.tp / p.pp + routed / p.ep / p.etp * stage)


def memory(p: Any) -> Memory:
    """Memory of the first pipeline stage of each plan; `p` holds the plans' values as arrays (see sim.parallel)."""
    shards = p.dp_shard * p.cp
    # FSDP: fp32 weights, gradients and two moments. Else what Megatron holds: weights, fp32 gradients, weights and moments.
    whole = p.size * (p.size < 4) + 4 * (p.zero != 2) + 12 * (p.zero == 0)
    split = 12 * (p.zero > 0) + 4 * (p.zero == 2)
    shard = parameters(p) / (p.pp * p.tp * shards)
    state = np.where(p.zero == 3, 16 * shard, whole * held(p) + split * shard)
    state = np.where(p.frozen, p.size * np.where(p.zero == 3, shard, held(p)), state)  # weights alone; adapters are small
    block = layers_parameters(p) / p.tp + routed_parameters(p) / p.ep / p.etp
    unsharded = np.where(p.pp > 1, block / p.pp, 2 * block / p.layers)
    gathered = np.where((shards > 1) & (p.zero == 3), (unsharded + embedding_parameters(p) / p.tp) * p.size, 0.0)
    late = np.where((shards > 1) & (p.zero == 3) & (p.accumulation > 1), held(p) * 4, 0.0)  # gradients reduced with the last micro-batch
    tokens = p.micro_batch * p.seq_len / p.cp
    in_flight = np.where(p.gpipe, p.accumulation, np.minimum(p.pp, p.accumulation))
    some = np.where(p.selective, products(p), kept(p))
    share = p.recompute_share
    per_block = tokens * (share * np.where(p.recompute, p.hidden / p.tp, some) + (1 - share) * kept(p)) * p.size
    working = np.where(p.recompute | p.selective, tokens * kept(p) * p.size, 0.0)
    head = np.where(p.pp > 1, 0.0, 3.0) * tokens * p.vocab / p.tp * 4
    return Memory(state, gathered + late, per_block * p.layers / p.pp * in_flight + working, head)


def kept(p: Any) -> Array:
    """Elements a token that autograd keeps in one block, on one tensor-parallel rank; the mean of dense and mixed blocks.

    Inputs of the two norms and their outputs 4 h, queries, keys and values after rotation, attention's output, and gate,
    up, silu(gate) and their product 4 f (without a gate: up and gelu(up), 2 f) for every feed-forward that a token visits,
    with the copies of it that are sent to experts.
    """
    mixed, factor = expert_layers(p) / p.layers, 2 + 2 * p.gated
    keys = np.where(p.mla.kv_rank > 0, query_width(p) + value_width(p), 2 * p.kv_heads * p.head_dim)
    attention = 4 * p.hidden + query_width(p) + keys + value_width(p) + p.mla.kv_rank + p.mla.q_rank
    experts = (p.moe.top_k + p.moe.shared) * p.moe.ffn * factor + 2 * p.moe.top_k * p.hidden
    scores = (
        (1 - p.fused_attention) * ~p.core * 2.5 * p.heads * p.seq_len
    )  # 5 a s of Korthikanti et al. 2022, table 2, in elements of 2 bytes
    return np.asarray((attention + scores + (1 - mixed) * factor * p.ffn + mixed * experts) / p.tp)


def products(p: Any) -> Array:
    """Of these, what selective recomputation keeps: results of matrix products and attention, the inputs of the block's two
    halves, and under tensor parallelism what their all-gathers brought, whole."""
    mixed, factor = expert_layers(p) / p.layers, 1 + p.gated
    keys = np.where(p.mla.kv_rank > 0, 2 * value_width(p) + p.mla.kv_rank + p.mla.rope + p.mla.q_rank, 2 * p.kv_heads * p.head_dim)
    attention = 3 * p.hidden + query_width(p) + keys + value_width(p)
    experts = (p.moe.top_k + p.moe.shared) * p.moe.ffn * 2 * factor + 2 * p.moe.top_k * p.hidden  # a mixture of real keeps all,
    lean = (p.moe.top_k + p.moe.shared) * p.moe.ffn * factor + p.moe.top_k * p.hidden  # Megatron's computes its activation again
    experts = np.where(p.zero < 3, lean, experts)
    feed = (1 - mixed) * (factor * p.ffn + p.hidden) + mixed * experts
    return np.asarray((attention + feed) / p.tp + np.where(p.tp > 1, 2 * p.hidden, 0))
