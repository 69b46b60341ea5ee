"""The step: what one optimizer step of a model costs on a mesh, from its operations up.

    step = micro-batches × (forward + backward of the busiest stage) + pipeline bubble
           + exposed communication + optimizer

Arrays of plans in, arrays out; one plan is an array of length 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np

from conf.arithmetic import block_parameters, embedding_parameters, flops_per_token, parameters
from conf.plan import Plan
from sim.kernels import Array, Device, Work, attention, matmul, moved, rates
from sim.memory import memory
from sim.network import Network


@dataclass(frozen=True)
class Steps:
    """One entry a plan; seconds of one step on a rank, whose parts add up to step_time."""

    step_time: Array
    compute: Array
    communication: Array
    bubble: Array
    optimizer: Array
    evaluate: Array  # seconds of one held-out evaluation
    memory: Array  # bytes, peak on a rank
    mfu: Array
    tokens_per_s: Array


def columns(plans: Sequence[Plan]) -> Any:
    """The numbers of the plans that the model needs, as arrays under the plan's names."""

    def gather(pick: Any) -> Array:
        return np.array([float(pick(plan)) for plan in plans])

    model = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "tied")
    train = ("seq_len", "global_batch", "micro_batch", "evaluate_sequences")
    values = {name: gather(lambda p, n=name: getattr(p.model, n)) for name in model}
    values |= {name: gather(lambda p, n=name: getattr(p.train, n)) for name in train}
    values["vpp"] = gather(lambda p: p.mesh.vpp)
    values |= {axis: gather(lambda p, a=axis: p.axes[a]) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    values |= {name: gather(lambda p, n=name: getattr(p, n)) for name in ("dp", "accumulation", "ranks", "tokens_per_step")}
    values["size"] = gather(lambda p: 2 if p.train.precision == "bf16" else 4)
    values["peak"] = gather(lambda p: (p.gpu.bf16_peak if p.train.precision == "bf16" else p.gpu.fp32_peak) or np.nan)
    flags = {"recompute": np.array([p.train.recompute == "full" for p in plans]), "cuda": np.array([p.gpu.kind == "cuda" for p in plans])}
    return SimpleNamespace(**values, **flags)


def steps(plans: Sequence[Plan]) -> Steps:
    """Predict the step of every plan."""
    p, device = columns(plans), Device([rates(plan) for plan in plans])
    network = Network(plans, device)
    layers, ends = _layers_a_stage(p), _ends(p, device)
    forward = _block(p, device, "forward")
    backward = _block(p, device, "backward") + np.where(p.recompute, forward, 0.0)
    stage = layers * (forward + backward)
    last = np.where(p.pp > 1, np.maximum(0.0, sum(ends.values()) - _spared(p) * (forward + backward)), sum(ends.values()))
    micro = stage + last + _accumulate(p, device)
    inside = _tensor_traffic(p, network, layers) + np.where(p.pp > 1, 2 * network.send("pp", _message(p)), 0.0)
    bubble = (p.pp - 1) / p.vpp * (micro + inside)  # interleaved 1F1B (Narayanan et al. 2021, section 2.2.2)
    agreed = network.collective("all_reduce", "dp_shard", np.full_like(p.dp, 4.0))  # one number: the gradient norm, and the loss
    optimizer = _optimizer(p, device) + agreed
    sharding = _sharding(p, device, network, layers, p.accumulation)
    window = p.accumulation * micro
    waiting = np.where(p.dp > 1, _largest(p.dp) * device["jitter"] * window, 0.0)
    exposed = np.where(p.cuda, np.maximum(0.0, sharding - window), sharding + waiting)
    compute = p.accumulation * (micro + _units(p, device, layers))
    communication = p.accumulation * inside + exposed + agreed
    step_time = compute + communication + bubble + optimizer
    sequences = np.ceil(p.evaluate_sequences / (p.dp * p.micro_batch))
    gathers = _gathers(p, network, layers) * np.where(p.cuda, 0.0, 1.0)
    evaluate = sequences * (layers * forward + ends["forward"] + gathers + 0.5 * _units(p, device, layers))
    rate = p.tokens_per_step / step_time
    mfu = rate * flops_per_token(p, p.seq_len) / (p.peak * p.ranks)
    return Steps(step_time, compute, communication, bubble, optimizer, evaluate, memory(p).total, mfu, rate)


def _largest(ranks: Array) -> Array:
    """Standard deviations by which the slowest of some ranks exceeds their mean: ranks that wait for each other after
    every unit pay it every time (Blom 1958's approximation of the normal order statistic)."""
    return np.array([NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) for n in ranks])


def _layers_a_stage(p: Any) -> Array:
    """Blocks of the busiest stage; where layers do not divide by pp, embedding and head count as layers."""
    return np.asarray(np.where(p.layers % p.pp == 0, p.layers / p.pp, (p.layers + 2) / p.pp))


def _spared(p: Any) -> Array:
    """Blocks that the last stage has less than the others."""
    return np.where(p.layers % p.pp == 0, 0.0, 1.0)


def block_work(p: Any, stage: str) -> list[Work]:
    """The operations of one block on one micro-batch, forward or backward, as the trainer's eager code runs them."""
    tokens, size, h = p.micro_batch * p.seq_len / p.cp, p.size, p.hidden
    width, kv, ffn = h / p.tp, h * p.kv_heads / p.heads / p.tp, p.ffn / p.tp
    products = [(width, h), (kv, h), (kv, h), (h, width), (ffn, h), (ffn, h), (h, ffn)]
    work = [matmul(tokens, n, k, size, stage) for n, k in products]
    work.append(attention(tokens, p.seq_len, width, size, stage))
    work += [moved("norm", tokens * h / p.tp, size, stage)] * 2
    work += [moved("rotary", tokens * width, size, stage), moved("rotary", tokens * kv, size, stage)]
    work.append(moved("swiglu", tokens * ffn, size, stage))
    adds = 2 if stage == "forward" else 5  # backward sums gradients: two residuals, three of q k v, two of gate and up
    return work + [moved("add", tokens * h / p.tp, size, "forward")] * adds


def _block(p: Any, device: Device, stage: str) -> Array:
    """Seconds of one block on one micro-batch."""
    return np.asarray(device["glue"] + device["composition"] * np.sum([device.seconds(work) for work in block_work(p, stage)], axis=0))


def _ends(p: Any, device: Device) -> dict[str, Array]:
    """Embedding, last norm, head and loss on one micro-batch."""
    tokens, size = p.micro_batch * p.seq_len / p.cp, p.size
    seconds = {}
    for stage in ("forward", "backward"):
        work = [moved("embedding", tokens * p.hidden / p.tp, size, stage), moved("norm", tokens * p.hidden / p.tp, size, stage)]
        work += [matmul(tokens, p.vocab / p.tp, p.hidden, size, stage), moved("loss", tokens * p.vocab / p.tp, 4.0, stage)]
        seconds[stage] = device["composition"] * np.sum([device.seconds(w) for w in work], axis=0)
    return seconds


def _held(p: Any) -> Array:
    """Parameters of one tensor- and pipeline-parallel rank."""
    return np.asarray(parameters(p) / (p.tp * p.pp))


def _accumulate(p: Any, device: Device) -> Array:
    """Adding a micro-batch's weight gradients to those before, and clearing: a pass over all of them."""
    again = (p.accumulation - 1) / p.accumulation
    return np.asarray(again * device.seconds(moved("add", _held(p), 4.0, "forward")))


def _optimizer(p: Any, device: Device) -> Array:
    """Clipping and AdamW on this rank's shard, fp32: nine tensors a block, the last norm and the tables."""
    tensors = 9 * p.layers / p.pp + 3 - p.tied
    shard = _held(p) / (p.dp_shard * p.cp)
    return np.asarray(tensors * device["optimizer_tensor"] + device.seconds(moved("optimizer", shard, 4.0, "step")))


def _tensor_traffic(p: Any, network: Network, layers: Array) -> Array:
    """Sequence-parallel all-gathers and reduce-scatters of one micro-batch: two of each forward, and again backward."""
    size = p.micro_batch * p.seq_len / p.cp * p.hidden * p.size
    pair = network.collective("all_gather", "tp", size) + network.collective("reduce_scatter", "tp", size)
    keys = 2 * size * p.kv_heads / p.heads / p.tp * p.cp
    context = network.collective("all_gather", "cp", keys) + network.collective("reduce_scatter", "cp", keys)
    return np.asarray(layers * (4 * pair + np.where(p.cp > 1, context, 0.0)))


def _message(p: Any) -> Array:
    """Bytes of the activations between pipeline stages."""
    return np.asarray(p.micro_batch * p.seq_len / p.cp * p.hidden / p.tp * p.size)


def _units(p: Any, device: Device, layers: Array) -> Array:
    """What sharding adds to the compute of one micro-batch: hooks a unit, and copies in and out of flat buffers."""
    count = layers + np.where(p.tied > 0, 1, 2)
    copied = _held(p) * p.size
    return np.where(p.dp > 1, count * device["shard_unit"] + copied / device["shard_copy"], 0.0)


def _gathers(p: Any, network: Network, layers: Array) -> Array:
    """All-gathers of the parameters for one forward pass."""
    block, rest = block_parameters(p) / p.tp * p.size, embedding_parameters(p) / p.tp * p.size
    tables = np.where(p.tied > 0, 1, 2)
    return np.asarray(
        layers * network.collective("all_gather", "dp_shard", block) + tables * network.collective("all_gather", "dp_shard", rest)
    )


def _sharding(p: Any, device: Device, network: Network, layers: Array, micro_batches: Array) -> Array:
    """FSDP's traffic in a step: parameters gathered for forward and backward, gradients reduced with the last micro-batch.

    In a pipeline parameters stay gathered for the step, and the head's and root's units do not reshard after forward.
    """
    block, rest = block_parameters(p) / p.tp, embedding_parameters(p) / p.tp
    tables = np.where(p.tied > 0, 1, 2)
    passes = np.where(p.pp > 1, 1, 2 * micro_batches)
    ends = np.where(p.pp > 1, 1, micro_batches)
    gather = passes * layers * network.collective("all_gather", "dp_shard", block * p.size)
    gather += ends * tables * network.collective("all_gather", "dp_shard", rest * p.size)
    reduce = layers * network.collective("reduce_scatter", "dp_shard", block * 4) + tables * network.collective(
        "reduce_scatter", "dp_shard", rest * 4
    )
    shard = (layers * block + tables * rest) * 4 / p.dp_shard
    return np.asarray(gather + reduce + network.collective("all_reduce", "dp_replicate", shard))
