"""Bytes on the fullest device: state, what is gathered, activations, logits.

Counted from the trainer's own code: which tensors autograd keeps in one block, and what FSDP2 holds unsharded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.arithmetic import block_parameters, embedding_parameters, parameters
from sim.kernels import Array


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


def memory(p: Any) -> Memory:
    """Memory of the first pipeline stage of each plan; `p` holds the plans' values as arrays (see sim.parallel)."""
    share = np.where(p.pp > 1, p.tp * p.pp, p.tp)
    held = parameters(p) / share
    shards = p.dp_shard * p.cp
    state = 4 * held * 4 / shards  # fp32 weights, gradients and two moments
    unsharded = np.where(p.pp > 1, block_parameters(p) * p.layers / share, 2 * block_parameters(p) / p.tp)
    gathered = np.where(shards > 1, (unsharded + embedding_parameters(p) / p.tp) * p.size, 0.0)
    late = np.where((shards > 1) & (p.accumulation > 1), held * 4, 0.0)  # gradients reduced with the last micro-batch
    tokens = p.micro_batch * p.seq_len / p.cp
    in_flight = np.minimum(p.pp, p.accumulation)
    per_block = tokens * np.where(p.recompute, p.hidden / p.tp, kept(p)) * p.size
    working = np.where(p.recompute, tokens * kept(p) * p.size, 0.0)
    head = np.where(p.pp > 1, 0.0, 3.0) * tokens * p.vocab / p.tp * 4
    return Memory(state, gathered + late, per_block * p.layers / p.pp * in_flight + working, head)


def kept(p: Any) -> Array:
    """Elements a token that autograd keeps in one block, on one tensor-parallel rank.

    Inputs of the two norms and their outputs 4 h, queries, keys and values after rotation h (1 + 2 kv/heads), attention's
    output h, and gate, up, silu(gate) and their product 4 f.
    """
    attention = p.hidden * (4 + 1 + 2 * p.kv_heads / p.heads + 1)
    return np.asarray((attention + 4 * p.ffn) / p.tp)
