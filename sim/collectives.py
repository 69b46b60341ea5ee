"""Time of what a mesh sends in a step: tensor, context, expert and data parallelism, from their collectives' times (network.py)."""

from typing import Any

import numpy as np

from conf.arithmetic import embedding_parameters, expert_layers, layers_parameters, query_width, routed_parameters, value_width
from sim.kernels import Array, Device, some
from sim.memory import adapters_held, held
from sim.network import Network


def tensor_traffic(p: Any, network: Network, layers: Array) -> Array:
    """Sequence-parallel all-gathers and reduce-scatters of one micro-batch: two of each forward, again backward, and again where the
    forward pass is."""
    size = p.micro_batch * p.seq_len / p.cp * p.hidden * p.size
    pair = network.collective("all_gather", "tp", size) + network.collective("reduce_scatter", "tp", size)
    return np.asarray(layers * 2 * (1 + _forwards(p)) * pair)


def _forwards(p: Any) -> Any:
    """Forward passes of a block: one, and another where the backward pass does it again."""
    return 1 + p.recompute_share * p.recompute


def context_traffic(p: Any, device: Device, network: Network, layers: Array, spent: dict[str, Array]) -> Array:
    """What spreading sequences over cp adds to one micro-batch.

    ring: keys and values go round in cp − 1 hops each pass, beside the attention to those at hand, and on the way back their fp32
    gradients too (Liu et al. 2023, Ring Attention, section 3); gather: they are gathered, their gradients reduced (Llama 3, arXiv
    2407.21783, section 3.3.2); ulysses: queries, keys, values and outputs trade sequence for heads (Jacobs et al. 2023).
    """
    if not some(p.cp > 1):
        return np.zeros(1)
    tokens, forwards = p.micro_batch * p.seq_len / p.cp / p.tp * p.size, _forwards(p)
    latent = p.mla.kv_rank > 0
    keys = tokens * np.where(latent, query_width(p) + value_width(p), 2 * p.kv_heads * p.head_dim)
    hop, late = network.send("cp", keys), network.send("cp", keys * 4 / p.size)
    round_ = {"forward": forwards * (p.cp - 1) * hop, "backward": (p.cp - 1) * hop + p.cp * late}
    beside = {"forward": forwards * spent["attention.forward"], "backward": spent["attention.backward"]}
    hidden = sum(np.where(p.beside, np.minimum(round_[stage], beside[stage]), 0.0) for stage in round_)
    ring = sum(round_.values()) - (1 - device["slowdown"]) * hidden
    gathered = forwards * network.collective("all_gather", "cp", keys * p.cp) + network.collective("reduce_scatter", "cp", keys * p.cp)
    traded = tokens * (query_width(p) + value_width(p)) + keys
    ulysses = (forwards + 1) * network.all_to_all(p.cp, 1.0, traded, p.tp)
    return np.asarray(layers * (p.cp > 1) * np.where(p.ulysses, ulysses, np.where(p.gathered, gathered, ring)))


def _expert_traffic(p: Any, network: Network, layers: Array) -> Array:
    """Tokens sent to their experts and back in one micro-batch, forward and backward, and forward again where recomputed; ranks that
    share experts gather the tokens and reduce the results. The rank with the fullest experts is waited for."""
    size = p.micro_batch * p.seq_len / p.cp / p.tp * p.hidden * p.size * p.moe.imbalance
    passes = 2 * (1 + _forwards(p)) * layers * expert_layers(p) / p.layers
    whole = size * p.moe.top_k * p.etp
    shared = network.ring("all_gather", p.etp, np.ones(1), whole) + network.ring("reduce_scatter", p.etp, np.ones(1), whole)
    return np.asarray(passes * (network.all_to_all(p.ep, p.moe.top_k, size, p.etp, p.once) + 0.5 * shared))


def experts_shown(p: Any, device: Device, network: Network, layers: Array, compute: Array) -> Array:
    """What a micro-batch waits for its experts' traffic: all of it, or, beside another one's compute, what exceeds that and what it
    slows it by."""
    traffic = _expert_traffic(p, network, layers) if some(p.moe.experts) else np.zeros(1)
    hidden = np.where(p.overlap_experts, np.minimum(traffic, compute), 0.0)
    return np.asarray(traffic - (1 - device["slowdown"]) * hidden)


def message(p: Any) -> Array:
    """Bytes of the activations between pipeline stages."""
    return np.asarray(p.micro_batch * p.seq_len / p.cp * p.hidden / p.tp * p.size)


def gathers(p: Any, network: Network, layers: Array) -> Array:
    """All-gathers of the parameters for one forward pass."""
    return layers * _exchange(p, network, "all_gather", p.size, p.stored) + _ends_exchange(p, network, "all_gather", p.size)


def _exchange(p: Any, network: Network, kind: str, size: Any, stored: Any = None) -> Array:
    """A collective over the shards of one block: the ranks of dp_shard and cp, and for experts those that hold the same ones.

    `size` are bytes of a parameter, `stored` those of one that is no routed expert's, where they differ.
    """
    each = size if stored is None else stored
    common = network.ring(kind, p.dp_shard * p.cp, p.tp, layers_parameters(p) / p.layers / p.tp * each)
    if not some(p.moe.experts):
        return common
    holders, routed = p.dp_shard * p.cp * p.tp / p.ep / p.etp, routed_parameters(p) / p.layers / p.ep / p.etp
    return np.asarray(common + (p.moe.experts > 0) * network.ring(kind, holders, p.ep * p.etp, routed * size))


def _ends_exchange(p: Any, network: Network, kind: str, size: Any) -> Array:
    """The same for embedding and head."""
    tables = np.where(p.tied > 0, 1, 2)
    return np.asarray(tables * network.ring(kind, p.dp_shard * p.cp, p.tp, embedding_parameters(p) / p.tp * size))


def sharding(p: Any, network: Network, layers: Array, micro_batches: Array) -> Array:
    """Traffic of data parallelism in a step.

    FSDP gathers parameters for forward and backward and reduces gradients with the last micro-batch; in a pipeline
    parameters stay gathered for the step, and the head's and root's units do not reshard after forward. With gradients
    sharded (ZeRO-2) they are gathered once a micro-batch, with optimizer states sharded (ZeRO-1) once a step, and with
    nothing sharded gradients are all-reduced: as much as a reduction and a gathering.
    """
    passes = np.where((p.pp > 1) | (p.zero < 2), 1, np.where(p.zero == 3, 2, 1) * micro_batches)
    ends = np.where((p.pp > 1) | (p.zero < 2), 1, micro_batches)
    blocks, tables = _exchange(p, network, "all_gather", p.size, p.stored), _ends_exchange(p, network, "all_gather", p.size)
    gather = passes * layers * blocks + ends * tables
    kept = np.where(p.zero == 0, p.size, 4.0)  # without sharding gradients are reduced as they are, else in fp32
    reduce = layers * _exchange(p, network, "reduce_scatter", kept) + _ends_exchange(p, network, "reduce_scatter", kept)
    shard = (held(p) / (p.dp_shard * p.cp)) * 4
    trained = np.where(p.frozen, (p.zero == 3) * gather, gather + reduce)
    if some(p.rank):
        shard = 4 * adapters_held(p)
        trained = trained + network.collective("reduce_scatter", "dp_shard", shard)
        return np.asarray(trained + network.collective("all_reduce", "dp_replicate", shard / p.dp_shard))
    return np.asarray(trained + ~p.frozen * network.collective("all_reduce", "dp_replicate", shard))
