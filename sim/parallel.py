"""The step: what one optimizer step of a model costs on a mesh, from its operations up.

    step = micro-batches × (forward + backward of the busiest stage) + pipeline bubble
           + exposed communication + optimizer

Arrays of plans in, arrays out; one plan is an array of length 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from operator import attrgetter
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np

from conf.arithmetic import (
    adapted,
    attention_matrices,
    expert_layers,
    flops_per_token,
    layers_parameters,
    parameters,
    query_width,
    value_width,
)
from conf.plan import Plan
from sim.collectives import context_traffic, experts_shown, gathers, message, sharding, tensor_traffic
from sim.kernels import Array, Device, Work, attention, matmul, moved, rates, some
from sim.memory import MOMENTS, NF4, adapters_held, held, memory
from sim.network import Network
from sim.schedule import PARTED, V_SHAPED

# Sums of a block, each three passes over the residual stream: in eager code, where they ride on the norms (a pass less each), and
# in the code from before fused attention, with dropout and its masks and with gradients of biases.
# Eager backward sums gradients: two residuals, three of q k v, two of gate and up.
ADDS = {"forward": (2, 4 / 3, 7 / 3), "backward": (5, 2 / 3, 20 / 3)}


# Kernels that the host launches for a micro-batch besides its blocks, one after the other because their inputs come from it: what a
# batch is handed out with, masks and positions, embedding, head, the dozen of a cross-entropy over a parted vocabulary, and backward.
AROUND = 35
# Bytes of quantising with a scale a block over those with one a tensor: 2 read, two copies of 1 written at once, by rows and by columns,
# and a scale of 1 for 32 of either; with one a tensor the second copy is made in the backward pass, from the first.
BLOCKED = {"forward": 4.0625 / 3, "backward": 4.0625 / 6}
CORE = ("attention.forward", "scores.forward")


@dataclass(frozen=True)
class Steps:
    """One entry a plan; seconds of one step on a rank, whose parts add up to step_time."""

    step_time: Array
    compute: Array
    communication: Array
    bubble: Array
    optimizer: Array
    evaluate: Array  # seconds of one held-out evaluation
    mfu: Array
    tokens_per_s: Array
    error: Array  # standard deviation of log(predicted / measured) that steps like it had
    arithmetic: Array  # seconds of compute in matrix products and attention
    stalled: Array  # seconds of compute in which the device waits for the host to launch kernels; the rest moves tensors
    plans: Any  # the numbers that they were predicted from

    @cached_property
    def memory(self) -> Array:
        """Bytes, peak on a rank; weighed when it is asked for, because that takes as long as the step."""
        return np.broadcast_to(memory(self.plans).total, self.step_time.shape)


def columns(plans: Sequence[Plan], adapters: bool = False) -> Any:
    """The numbers of the plans that the model needs, under the plan's names: arrays, or one number where all have the same,
    because arithmetic on a number costs next to nothing. With `adapters` (of one plan) the model is frozen but for them."""

    def gather(pick: Callable[[Plan], Any]) -> Any:
        found = [float(pick(plan)) for plan in plans]
        return found[0] if len(set(found)) == 1 else np.array(found)

    def of(group: str, names: Sequence[str]) -> dict[str, Any]:
        return {name: gather(attrgetter(f"{group}.{name}")) for name in names}

    values = of("model", ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "gated", "vocab", "tied", "position_rows",
                          "layer_norm", "qk_norm", "mtp"))  # fmt: skip
    values |= of("train", ("seq_len", "global_batch", "micro_batch", "evaluate_sequences", "fused_attention", "recompute_share")) | of(
        "mesh", ("vpp", "ep", "etp")
    )
    values |= {axis: gather(partial(_degree, axis)) for axis in plans[0].axes}
    values |= {name: gather(attrgetter(name)) for name in ("dp", "accumulation", "ranks", "tokens_per_step")}
    values["size"] = gather(lambda p: 4 if p.train.precision == "fp32" else 2)
    values["narrow"] = gather(lambda p: p.train.precision in ("fp8", "fp4"))
    values["zero"] = gather(lambda p: p.mesh.zero)
    values["peak"] = gather(lambda p: p.gpu.peak(p.train.precision) or np.nan)
    values["rope"] = gather(lambda p: p.model.positions == "rope")
    values["moments"] = gather(lambda p: MOMENTS[p.train.optimizer])
    moe = SimpleNamespace(**of("model.moe", ("experts", "top_k", "shared", "ffn", "dense_layers", "imbalance")))
    mla = SimpleNamespace(**of("model.mla", ("kv_rank", "q_rank", "rope")))
    values["crowd"] = gather(lambda p: max(1.0, p.cluster.gpus_per_node / p.cluster.cores_per_node) if p.gpu.kind == "cpu" else 1.0)
    flags = {
        "recompute": np.array([p.train.recompute == "full" for p in plans]),
        "selective": np.array([p.train.recompute == "selective" for p in plans]),
        "core": np.array([p.train.recompute == "attention" for p in plans]),
        "parted": np.array([p.mesh.pipeline in PARTED for p in plans]),
        "v_shaped": np.array([p.mesh.pipeline in V_SHAPED for p in plans]),
        "gpipe": np.array([p.mesh.pipeline == "gpipe" for p in plans]),
        "dual": np.array([p.mesh.pipeline == "dualpipev" for p in plans]),
        "beside": np.array([p.gpu.kind != "cpu" for p in plans]),
        "compiled": np.array([p.train.compile for p in plans]),
        "graphs": np.array([p.train.graphs for p in plans]),
        "blocked": np.array([p.train.scaling == "block" for p in plans]),
        "fused_gradients": np.array([p.train.fused_gradients for p in plans]),
        "fused_experts": np.array([p.train.fused_experts for p in plans]),
        "ulysses": np.array([p.mesh.cp_kind == "ulysses" for p in plans]),
        "gathered": np.array([p.mesh.cp_kind == "gather" for p in plans]),
        "once": np.array([p.mesh.dispatch == "tokens" for p in plans]),
        "overlap_experts": np.array([p.mesh.overlap_experts for p in plans]),
        "frozen": np.full(len(plans), adapters),  # weights that have no gradient, as under low-rank adapters
    }
    values |= {"rank": plans[0].finetune.rank, "thin": _thin(plans[0])} if adapters else {"rank": 0, "thin": []}
    values["stored"] = NF4 if adapters and plans[0].finetune.method == "qlora" else values["size"]
    return SimpleNamespace(**values, **flags, moe=moe, mla=mla)


def _thin(plan: Plan) -> list[tuple[float, float, float]]:
    """Inputs, outputs and number a block of the matrices with adapters, on a tensor-parallel rank."""
    rows, tp = ("o_proj", "down_proj"), plan.mesh.tp
    return [(inputs / (tp if name in rows else 1), outputs / (1 if name in rows else tp), count / plan.model.layers)
            for name, inputs, outputs, count in adapted(plan.model, plan.finetune.targets)]  # fmt: skip


def _degree(axis: str, plan: Plan) -> int:
    return plan.axes[axis]


def steps(plans: Sequence[Plan], adapters: bool = False) -> Steps:
    """Predict the step of every plan; with `adapters` of one whose model is frozen but for them."""
    device = Device([rates(plan) for plan in plans])
    return predict(columns(plans, adapters), device, Network(plans, device))


def predict(p: Any, device: Device, network: Network) -> Steps:
    """The steps of plans whose numbers are given as arrays that broadcast."""
    part = pieces(p, device, network)
    compute = (
        p.crowd * p.accumulation * (part.forward + part.backward + part.units)
    )  # CPU ranks that share a core take turns, but not in waiting
    communication = p.accumulation * part.traffic + part.sends + _exposed(p, device, part) + part.agreed
    bubble, optimizer = _bubble(p, part), p.crowd * part.optimizer
    step_time = compute + communication + bubble + optimizer
    sequences = np.ceil(p.evaluate_sequences / (p.dp * p.micro_batch))
    awaited = np.zeros(1) if p.beside.all() else np.where(p.beside, 0.0, gathers(p, network, part.layers))
    evaluate = p.crowd * sequences * (part.layers * part.block_forward + part.ends_forward + awaited + 0.5 * part.units)
    rate = p.tokens_per_step / step_time
    mfu = rate * flops_per_token(p, p.seq_len) / (p.peak * p.ranks)
    base = np.where(p.moe.experts > 0, device["mixture_error"], device["error"])
    error = np.hypot(base, device["host_error"] * part.waiting)
    busy = (p.crowd * p.accumulation * part.arithmetic, p.crowd * p.accumulation * part.stalled)
    told = (step_time, compute, communication, bubble, optimizer, evaluate, mfu, rate, error, *busy)
    names = (field.name for field in fields(Steps) if field.name != "plans")
    return Steps(**dict(zip(names, np.broadcast_arrays(*map(np.atleast_1d, told)), strict=True)), plans=p)


def pieces(p: Any, device: Device, network: Network) -> SimpleNamespace:
    """Seconds of which a step is made, for the busiest pipeline rank; the event simulation (sim.step) moves the same ones.

    forward, backward: compute of a micro-batch, ends included; weights: the part of backward that is the weights' gradients;
    block, ends: the same of one block, and of embedding and head; extra: by how much the ends make their rank busier;
    added: adding a micro-batch's gradients to those before; units: what sharding adds to a micro-batch;
    arithmetic, stalled: the parts of forward and backward in matrix products and attention, and in waiting for the host;
    around: launches of a micro-batch besides its blocks; waiting: share of the blocks' time in which the device waits for the host;
    traffic: tensor-, context- and expert-parallel of a micro-batch; send: one message to a neighbour in the pipeline, and
    sends: waiting for those in a step; sharding: data-parallel traffic of a step; agreed: one number over all.
    """
    layers, spent = _layers_a_stage(p), _spent(p, device)
    slowest = 1 + device["spread"] * np.maximum(0.0, _largest(p.ranks))
    again = np.where(p.recompute, spent["forward"], np.where(p.selective, spent["small"], np.where(p.core, spent["core"], 0.0)))
    again = p.recompute_share * again
    doubled = p.recompute_share * np.where(p.recompute, spent["arithmetic.forward"], np.where(p.core, spent["core"], 0.0))
    block = spent["forward"] + spent["backward"] + again
    for stage, extra in (("forward", 0.0), ("backward", again)):  # further tokens' blocks lie beside the head
        spent[f"ends.{stage}"] = spent[f"ends.{stage}"] + p.mtp * (spent[stage] + extra)
    ends = spent["ends.forward"] + spent["ends.backward"]
    shown = np.where(p.pp > 1, np.maximum(0.0, ends - _spared(p) * block), ends) / ends  # the last stage may have fewer blocks
    around = AROUND * device["host"] * ~p.graphs + np.zeros(1)
    forward = layers * spent["forward"] + shown * spent["ends.forward"] + around
    added = _accumulate(p, device, layers * spent["weights"])
    backward = layers * (spent["backward"] + again) + shown * spent["ends.backward"] + added
    hidden = np.where(p.compiled, device["tensor_overlap"], 0.0)
    send = np.where(p.pp > 1, network.send("pp", message(p)), 0.0)
    agreed = network.collective("all_reduce", "dp_shard", 4.0)  # one number: the gradient norm, and the loss
    return SimpleNamespace(
        layers=layers, block_forward=spent["forward"], ends_forward=spent["ends.forward"],
        block={"F": slowest * spent["forward"], "B": slowest * (spent["backward"] + again), "W": slowest * spent["weights"]},
        ends={"F": slowest * spent["ends.forward"], "B": slowest * spent["ends.backward"]}, extra=slowest * shown * ends,
        forward=slowest * forward, backward=slowest * backward, weights=slowest * layers * spent["weights"],
        arithmetic=slowest * (layers * (spent["arithmetic"] + doubled) + shown * (spent["ends.arithmetic"] + p.mtp * spent["arithmetic"])),
        stalled=slowest * (layers * spent["stalled"] + around), waiting=spent["waiting"] / block,
        added=slowest * added, around=slowest * around, units=_units(p, device, layers),
        traffic=(1 - hidden) * tensor_traffic(p, network, layers) + context_traffic(p, device, network, layers, spent)
        + experts_shown(p, device, network, layers, forward + backward),
        send=send,
        sends=_sends(p, send), sharding=sharding(p, network, layers, p.accumulation), agreed=agreed,
        optimizer=_optimizer(p, device) + agreed,
    )  # fmt: skip


def passed(p: Any, device: Device) -> Array:
    """Seconds of one micro-batch's forward pass through all blocks and the ends on one rank, traffic aside."""
    spent = _spent(p, device)
    around = AROUND * device["host"] * ~p.graphs
    return np.asarray(p.crowd * (p.layers * spent["forward"] + spent["ends.forward"] + around))


def forward(plan: Plan, sequences: float) -> float:
    """Seconds in which a plan's ranks take so many sequences through a forward pass alone, as for log-probabilities: as many
    micro-batches as they make, and those in which a pipeline fills."""
    device = Device([rates(plan)])
    p, network = columns([plan]), Network([plan], device)
    part = pieces(p, device, network)
    again = p.recompute_share * p.recompute
    awaited = np.zeros(1) if p.beside.all() else gathers(p, network, part.layers)
    each = p.crowd * (part.forward + 0.5 * part.units) + part.traffic / (2 + again) + awaited + np.where(p.pp > 1, part.send, 0.0)
    count = np.ceil(sequences / (p.dp * p.micro_batch)) + p.pp - 1
    return float((count * each)[0])


def _sends(p: Any, send: Array) -> Array:
    """Waiting for messages in a step: those of the first micro-batch's way through all stages, there and back. The others are
    under way beside compute, but for 1F1B, whose ranks also wait about one message for each micro-batch beyond pp / 2."""
    alone = (p.vpp == 1) & ~p.gpipe
    return np.asarray(send * (2 * (p.vpp * p.pp - 1) + alone * 1.2 * np.maximum(0.0, p.accumulation - p.pp / 2)))


def _bubble(p: Any, part: SimpleNamespace) -> Array:
    """Time in which the busiest pipeline rank has nothing to do, of n micro-batches over pp ranks of v virtual stages each.

    A backward pass that is one piece leaves, with m = min(n, pp), (forward + backward) (pp + (m − 1) / v − m): (pp − 1) / v of
    it where there are enough micro-batches (Narayanan et al. 2021, section 2.2.2), else as much as the first one's way through
    all stages. With the weights' part filled in (Qi et al. 2024) the way of the first pass to the last rank is left, since
    the ranks begin together after the gradient norm: (pp − 1) / v of a forward pass, or of what the inputs' backward is longer.
    Exact against the event simulation where forward, inputs' and weights' backward take the same time; where the inputs' backward
    takes much longer, as with recomputation, V-shaped schedules stall more than this says (sim.step tells).
    """
    whole = part.forward + part.backward - part.extra + part.traffic
    few = np.minimum(p.accumulation, p.pp)
    plain = whole * (p.pp + (few - 1) / p.vpp - few)
    forward = part.layers * part.block["F"] + 0.5 * part.traffic
    way = whole - part.weights  # forward and inputs' backward of a micro-batch on one rank
    late = np.where(p.v_shaped, np.maximum(forward, way - forward), np.maximum(forward, (p.accumulation <= p.pp) * (way - part.weights)))
    filled = (p.pp - 1) / p.vpp * late
    first = p.pp * way + (part.weights + (p.accumulation - 1) * way) / p.vpp - p.accumulation * whole
    return np.asarray(np.where(p.parted, np.maximum(filled, first), plain) * (p.pp > 1))


def kernels_alone(p: Any, device: Device) -> Array:
    """Seconds that the busiest stage's blocks need in a step: no mesh with these kernels is faster."""
    spent = _spent(p, device)
    return np.asarray(p.crowd * p.accumulation * _layers_a_stage(p) * (spent["forward"] + spent["backward"]))


def _exposed(p: Any, device: Device, part: SimpleNamespace) -> Array:
    """Traffic of data parallelism that the rank waits for.

    Beside a GPU's kernels it hides in the step under FSDP and in one micro-batch where gradients are reduced once;
    without sharding they are reduced after the backward pass. What hides slows the kernels beside it.
    """
    compute = part.forward + part.backward
    stretched = compute / (1 - device["slowdown"])
    micro = stretched + part.traffic
    window = micro * np.where(p.zero == 3, p.accumulation, np.where(p.zero > 0, 1.0, 0.0))
    hidden = np.minimum(part.sharding, window)
    slower = device["slowdown"] * hidden * stretched / micro
    waiting = np.where(p.dp > 1, _largest(p.dp) * device["jitter"] * p.accumulation * compute, 0.0)
    return np.asarray(np.where(p.beside, part.sharding - hidden + slower, part.sharding + waiting))


def _largest(ranks: Array) -> Array:
    """Standard deviations by which the slowest of some ranks exceeds their mean: ranks that wait for each other after
    every unit pay it every time (Blom 1958's approximation of the normal order statistic)."""
    return np.asarray(np.vectorize(lambda n: NormalDist().inv_cdf((n - 0.375) / (n + 0.25)), otypes=[float])(ranks))


def _layers_a_stage(p: Any) -> Array:
    """Blocks of the busiest stage; where layers do not divide by pp, embedding and head count as layers if that divides."""
    with_ends = np.where((p.layers + 2) % p.pp == 0, (p.layers + 2) / p.pp, np.ceil(p.layers / p.pp))
    return np.asarray(np.where(p.layers % p.pp == 0, p.layers / p.pp, with_ends))


def _spared(p: Any) -> Array:
    """Blocks that the last stage has less than the others: one where embedding and head count as layers; where nothing divides,
    frameworks whose stages are laid out by hand leave it what is missing."""
    missing = np.ceil(p.layers / p.pp) * p.pp - p.layers
    return np.where((p.layers + 2) % p.pp == 0, 1.0 * (missing > 0), np.where(p.zero < 3, missing, 0.0))


def block_work(p: Any, stage: str) -> list[Work]:
    """The operations of one block on one micro-batch, forward or backward, as the trainer's eager code runs them.

    Where some blocks are dense and others mixed, the mean of the two.
    """
    tokens, size, h = p.micro_batch * p.seq_len / p.cp, p.size, p.hidden
    mixed = expert_layers(p) / p.layers
    *into, out = attention_matrices(p)
    work = [matmul(tokens, n / p.tp, k, size, stage) * there for n, k, there in into if some(there)]
    work.append(matmul(tokens, out[0], out[1] / p.tp, size, stage))
    whole = np.where(p.fused_attention, 1, 2)  # without fusion the masked half is computed too, and every score is written and read
    work.append(attention(tokens, p.seq_len, (query_width(p) + value_width(p)) / 2 / p.tp, size, stage, p.head_dim) * whole)
    work.append(moved("scores", tokens * p.seq_len * p.heads / p.tp, size, stage) * (whole - 1))
    work.append(moved("norm", tokens * h / p.tp, size, stage) * 2)
    latent = p.mla.kv_rank > 0
    turned = np.where(latent, p.heads * p.mla.rope, value_width(p)), np.where(latent, p.mla.rope, p.kv_heads * p.head_dim)
    work += [moved("rotary", tokens * width / p.tp, size, stage) * p.rope for width in turned]
    work += [part * (1 - mixed) for part in _feed_forward(p, tokens, p.ffn, size, stage)]
    work += [part * mixed for part in _mixture(p, tokens, size, stage)] if some(mixed) else []
    quantised = moved("quantise", tokens * (_operands(p) + (h + value_width(p)) / p.tp), size, stage)
    work.append(quantised * p.narrow * np.where(p.blocked, BLOCKED[stage], 1.0))
    eager, fused, old = ADDS[stage]
    adds = np.where(p.compiled, np.where(p.fused_attention > 0, fused, old), eager)
    work.append(moved("add", tokens * h / p.tp, size, "forward") * adds)
    if some(p.size - p.stored):
        work.append(replace(moved("dequantise", layers_parameters(p) / p.layers / p.tp, 4.0, stage), trained=True))
    work += [part for inputs, outputs, count in p.thin for part in _adapter(p, tokens, inputs, outputs, count, stage)]
    return [part for part in work if some(part.times)]  # what none of the plans does costs nothing


def _adapter(p: Any, tokens: Any, inputs: float, outputs: float, count: float, stage: str) -> list[Work]:
    """Two thin products beside a matrix, scaled and added to its outputs; backward the gradients of both and of their input."""
    thin = [matmul(tokens, p.rank, inputs, p.size, stage), matmul(tokens, outputs, p.rank, p.size, stage)]
    wide = moved("add", tokens * (outputs if stage == "forward" else inputs), p.size, "forward") * 2
    return [replace(part, trained=True) * count for part in (*thin, wide)]


def _operands(p: Any) -> Any:
    """Width of the feed-forward's inputs to matrix products, a token."""
    mixed, moe = expert_layers(p) / p.layers, p.moe
    visited = np.where(p.fused_experts, 0.0, moe.top_k) + moe.shared
    return (1 - mixed) * (p.hidden + p.ffn / p.tp) + mixed * visited * (p.hidden + moe.ffn) / p.tp


def _feed_forward(p: Any, tokens: Any, width: Any, size: Any, stage: str) -> list[Work]:
    up, down = matmul(tokens, width / p.tp, p.hidden, size, stage), matmul(tokens, p.hidden, width / p.tp, size, stage)
    swiglu, gelu = (moved(kind, tokens * width / p.tp, size, stage) for kind in ("swiglu", "gelu"))
    return [up * (1 + p.gated), down, swiglu * p.gated, gelu * (1 - p.gated)]


def _mixture(p: Any, tokens: Any, size: Any, stage: str) -> list[Work]:
    """Router, shared experts, and the routed ones in grouped products; tokens are spread evenly over experts, and over tp."""
    moe, width = p.moe, p.moe.ffn / p.etp
    visits = tokens / p.tp * moe.top_k * p.etp * moe.imbalance  # ranks that share experts see each other's tokens
    local = moe.experts / p.ep
    each = np.where((p.zero < 3) & ~p.fused_experts, local, 1.0)  # Megatron launches every expert by itself, torch's product is one kernel
    apart = np.where(p.fused_experts, 0.0, 1.0)
    up = matmul(visits, width, p.hidden, size, stage, local, each) * (1 + p.gated)
    down = matmul(visits, p.hidden, width, size, stage, local, each)
    routed = [up, down, moved("swiglu", visits * width, size, stage) * apart, moved("permute", visits * p.hidden, size, stage) * apart]
    quantised = (2 if stage == "forward" else 4) * each * p.narrow * apart  # its input for two products forward, and both gradients'
    routed.append(Work(f"quantise.{stage}", 0.0, 0.0, quantised))
    shared = [part * (moe.shared > 0) for part in _feed_forward(p, tokens, moe.shared * moe.ffn, size, stage)]
    return [matmul(tokens / p.tp, moe.experts, p.hidden, size, stage), *routed, *shared]


def _spent(p: Any, device: Device) -> dict[str, Array]:
    """Seconds on one micro-batch of a block, forward and backward, of its forward operations besides matrix products and
    attention (which selective recomputation does again), of its attention
    and waiting for the host (beside which keys may travel), of attention and scores (which may be done again alone), of its weights'
    gradients, and of the model's ends."""
    parts = {name: block_work(p, name) for name in ("forward", "backward")}
    parts |= {f"ends.{stage}": _ends(p, stage) for stage in ("forward", "backward")}
    works = [work for part in parts.values() for work in part]
    kept, plain = np.where(p.frozen, 0.5, 1.0), ~p.compiled  # of two products frozen weights need the input's gradient alone
    share = [kept if len(work.products) > 1 and not work.trained else work.fused + (1 - work.fused) * plain for work in works]
    times = device["composition"] * device.each(works, share)
    stops = np.cumsum([len(part) for part in parts.values()])
    rows = dict(zip(parts, np.split(np.arange(len(works)), stops[:-1]), strict=True))
    spent = {name: times[mine[0] : mine[-1] + 1].sum(axis=0) for name, mine in rows.items()}
    spent["weights"] = 0.5 * times[[row for row in rows["backward"] if works[row].products]].sum(axis=0)
    for stage in ("forward", "backward"):
        spent[f"attention.{stage}"] = times[[row for row in rows[stage] if works[row].chain is not None]].sum(axis=0)
    spent["core"] = times[[row for row in rows["forward"] if works[row].kind in CORE]].sum(axis=0)
    spent["small"] = times[[row for row in rows["forward"] if not works[row].single]].sum(axis=0)
    products = {name: times[[row for row in mine if works[row].single]].sum(axis=0) for name, mine in rows.items()}
    spent |= {"arithmetic": products["forward"] + products["backward"], "arithmetic.forward": products["forward"]}
    spent |= {"ends.arithmetic": products["ends.forward"] + products["ends.backward"], "stalled": np.zeros(1)}
    spent["waiting"] = np.zeros(1)
    for name in ("forward", "backward"):
        alone, host = device["glue"] + spent[name], device["host"] * ~p.graphs * calls(p, parts[name])
        spent[name] = np.maximum(alone, host)
        spent[f"attention.{name}"] = spent[f"attention.{name}"] + spent[name] - alone
        spent["stalled"] = spent["stalled"] + spent[name] - alone
        spent["waiting"] = spent["waiting"] + np.where(host > alone, spent[name], 0.0)
    return spent


def calls(p: Any, works: list[Work]) -> Array:
    """Kernels that the host launches in a row, collectives of a tensor-parallel block included; compiling fuses half of
    those that only move tensors."""
    count, some = 4.0 * (p.tp > 1), 1 - 0.5 * p.compiled
    for work in works:
        count = count + work.launches * work.times * (1.0 if work.single else some)
    return np.asarray(count)


def _ends(p: Any, stage: str) -> list[Work]:
    """Embedding, last norm, head and loss on one micro-batch, once more for every further token that is predicted."""
    tokens, size, more = p.micro_batch * p.seq_len / p.cp, p.size, 1 + p.mtp
    work = [moved(kind, tokens * p.hidden / p.tp, size, stage) * times for kind, times in (("embedding", more), ("norm", 1 + 3 * p.mtp))]
    head = [matmul(tokens, p.vocab / p.tp, p.hidden, size, stage), moved("loss", tokens * p.vocab / p.tp, 4.0, stage)]
    joined = matmul(tokens, p.hidden / p.tp, 2 * p.hidden, size, stage) * p.mtp
    return [*work, *(part * more for part in head), *([joined] if some(p.mtp) else [])]


def _accumulate(p: Any, device: Device, weights: Array) -> Array:
    """Adding a micro-batch's weight gradients to those before, and clearing: a pass over all of them, which may ride on
    the products that make them."""
    again = (p.accumulation - 1) / p.accumulation
    added = device.seconds(moved("add", np.where(p.frozen, adapters_held(p), held(p)), 4.0, "forward"))
    return np.asarray(again * np.where(p.fused_gradients, np.maximum(0.0, added - weights), added))


def _optimizer(p: Any, device: Device) -> Array:
    """Clipping and AdamW on this rank's shard, fp32: nine tensors a block, the last norm and the tables."""
    tensors = np.where(p.frozen, 2 * len(p.thin) * p.layers / p.pp, 9 * p.layers / p.pp + 3 - p.tied)
    whole, spread = np.where(p.frozen, adapters_held(p), held(p)), np.where(p.zero > 0, p.dp_shard * p.cp, 1)
    shard = np.where(p.frozen | (p.zero == 0), whole / spread, parameters(p) / (p.pp * p.tp * p.dp_shard * p.cp))
    return np.asarray(tensors * device["optimizer_tensor"] + device.seconds(moved("optimizer", shard, 4.0, "step")))


def _units(p: Any, device: Device, layers: Array) -> Array:
    """What sharding adds to the compute of one micro-batch: hooks a unit, and copies in and out of flat buffers."""
    count = layers + np.where(p.tied > 0, 1, 2)
    copied = held(p) * np.where(p.frozen, p.stored, p.size)
    return np.where((p.dp > 1) & (p.zero == 3), count * device["shard_unit"] + copied / device["shard_copy"], 0.0)
