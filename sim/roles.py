"""Roles, foretold: what each of them holds on a device at its fullest.

    trainer     the step's own peak (sim/memory.py); with a critic its state beside the policy's
    generator   weights, logits of a step, the cache of its completions
    scorer      weights of reference and reward model, its logits: whole on ranks of its own, else in shards, one block of them whole

Where roles share devices, what one of them keeps lies there while another works, unless it is offloaded.
"""

from typing import NamedTuple

from conf.arithmetic import adapter_parameters, block_parameters, embedding_parameters, parameters
from conf.plan import Plan
from conf.units import show
from sim.memory import held, memory
from sim.parallel import columns
from sim.rollout import cached, width
from sim.room import room

FP32 = 4


class Held(NamedTuple):
    """Bytes on a device, and the tokens whose keys and values an engine has room for."""

    trainer: float
    generator: float
    scorer: float
    room: float
    kept: float  # of the trainers, while another role works on their devices


def roles(plan: Plan, twin: Plan) -> Held:
    """What each role holds; `twin` is the plan whose training is the alignment's."""
    align, tp = plan.align, plan.align.engine_tp
    trainer, kept = _trainer(plan, twin)
    scorer = _scorer(plan, twin)
    if not align.rollouts:
        return Held(trainer + (0.0 if align.placement == "split_ref" else scorer), 0.0, scorer, 0.0, kept)
    shared = 0.0 if align.apart or align.offload else kept
    weights = width(plan) * parameters(plan.model) / tp + FP32 * align.slots * plan.model.vocab / tp + shared
    most = max(0.0, room(plan) - weights) * tp / cached(plan)
    cache = min(most, align.slots * align.longest) * cached(plan) / tp
    beside = width(plan) * parameters(plan.model) / tp if shared else 0.0  # the engine's weights stay too
    return Held(trainer + beside, weights + cache, scorer, most, kept)


def misfits(plan: Plan) -> list[str]:
    """A line for each role that does not fit its devices: what it needs, what there is, what would help."""
    align = plan.align
    if align.method == "none":
        return []
    told, there = roles(plan, plan.aligned), room(plan)
    where = f"of {show(there, 'B')} usable on each {plan.gpu.name}"
    fewer = [] if align.adapters else ["align.tune=lora"]
    less = [*(["train.recompute=full"] if plan.train.recompute != "full" else []), *fewer, "a mesh that cuts more, as mesh.tp=8"]
    lines = []
    if told.trainer > there:
        lines.append(f"alignment does not fit: training needs {show(told.trainer, 'B')} {where}; set {' or '.join(less)}")
    if told.scorer > there:
        lines.append(f"alignment does not fit: scoring needs {show(told.scorer, 'B')} {where}; set align.micro_batch lower")
    if align.rollouts and told.room < align.longest:
        have = f"beside its weights a generator has room for {told.room:,.0f} tokens {where}, and a completion with its prompt may have"
        lines.append(f"alignment does not fit: {have} {align.longest:,}; set {_roomier(plan)}")
    return lines


def _roomier(plan: Plan) -> str:
    """What leaves room for a completion: more ranks an engine, or the devices to itself."""
    count = len(plan.roles.generators)
    for tp in (size for size in range(plan.align.engine_tp + 1, count + 1) if count % size == 0):
        wider = plan.but(**{"align.engine_tp": tp})
        if roles(wider, wider.aligned).room >= plan.align.longest:
            return f"align.engine_tp={tp}"
    return "more servers" if plan.align.offload or plan.align.apart else "align.offload=true"


def critic(plan: Plan) -> bool:
    return plan.align.method == "ppo"


def _trainer(plan: Plan, twin: Plan) -> tuple[float, float]:
    """The peak, and what is left between two steps: weights, moments and what else is state."""
    p = columns([twin], plan.align.adapters)
    told = memory(p)
    state, peak = float(told.part("state").max()), float(told.total.max())
    return peak + critic(plan) * state, (1 + critic(plan)) * state


def _scorer(plan: Plan, twin: Plan) -> float:
    """Reference and reward model where they are copies of their own."""
    align = plan.align
    copies = (align.anchored and align.reference == "model") + (align.reward == "model" and align.rollouts)
    if not copies:
        return 0.0
    size, p = 4 if plan.train.precision == "fp32" else 2, columns([twin])
    tokens = align.micro_batch * align.longest
    if plan.roles.scorers != plan.roles.trainers:
        return copies * size * float(parameters(plan.model)) + FP32 * tokens * plan.model.vocab
    spread = max(1, len(plan.roles.scorers) // (twin.mesh.tp * twin.mesh.pp))
    whole = float(block_parameters(plan.model) + embedding_parameters(plan.model)) / twin.mesh.tp
    return copies * size * float(held(p)) / spread + size * whole + FP32 * tokens * plan.model.vocab / twin.mesh.tp


def trained(plan: Plan) -> float:
    """Parameters that training changes."""
    align = plan.align
    return float(adapter_parameters(plan.model, align.targets, align.rank) if align.adapters else parameters(plan.model))
