"""Fine-tuning, foretold: training, of the plan's `tuned` twin, with its model frozen but for adapters where the plan says so.

Bytes and FLOPs of adapters are those of their own products, gradients and moments: there is no factor for them. In closed form: the stage
is short beside pre-training, and failures in it are left out.
"""

from pathlib import Path
from typing import NamedTuple

from conf.arithmetic import FP32, adapted, adapter_parameters, flops_per_token, parameters, tuned_flops_per_token
from conf.corpus import LINES
from conf.plan import Plan
from sim.checkpoint import load, tiers
from sim.cluster import crew
from sim.kernels import rates
from sim.pace import Pace, pace
from sim.power import Meter, footprint
from sim.timeline import WHOLLY, Timeline


def finetune(plan: Plan, start: str = "") -> dict[str, float]:
    """Quantities of the stage, which begins with the plan or at a later hour; none where it is off."""
    tune, twin = plan.finetune, plan.tuned
    if tune.method == "none":
        return {}
    step = pace(twin, tune.adapters)
    trained = float(adapter_parameters(plan.model, tune.targets, tune.rank) if tune.adapters else parameters(plan.model))
    flops = tuned_flops_per_token(plan.model, tune.seq_len, trained) if tune.adapters else flops_per_token(plan.model, tune.seq_len)
    tape = lived(twin, step)
    foot = footprint(twin, Meter(twin, step.mix, step.arithmetic, step.stalled), tape, start)
    return {
        "step_time": step.step_time,
        "tokens_per_s": step.tokens_per_s,
        "tokens_per_s_per_gpu": step.tokens_per_s / plan.ranks,
        "mfu": step.tokens_per_s * flops / ((plan.gpu.peak(plan.train.precision) or float("nan")) * plan.ranks),
        "peak_memory": step.memory,
        "parameters": trained,
        "checkpoint_bytes": 3 * FP32 * trained,
        "seconds": tape.until,
        "cost": foot.bill.devices[0] + foot.bill.electricity[0],
        "energy": foot.energy,
        "mean_power": foot.energy / tape.until,
        "carbon_location": foot.carbon_location,
        "carbon_market": foot.carbon_market,
    }


def lived(twin: Plan, step: Pace) -> Timeline:
    """The stage's own tape: tokens, start, the base, steps, evaluations and checkpoints, each bundled."""
    found, steps, every = conversations(twin), twin.train.steps or 0, twin.train.evaluate_every
    evaluations = -(-steps // every) if every and twin.train.evaluate_sequences else 1 * bool(twin.train.evaluate_sequences)
    saves = -(-steps // twin.checkpoint.every) if twin.checkpoint.every else 1
    tape = Timeline(twin.ranks)
    for mix, seconds in (
        (WHOLLY["data"], _tokens(twin, found)),
        (WHOLLY["init"], rates(twin).init),
        (WHOLLY["load"], load(twin, rates(twin)) / 3),  # weights without their moments
        (step.mix, steps * step.step_time),
        (WHOLLY["evaluate"], evaluations * step.evaluate * _held_out(twin, found)),
        (WHOLLY["checkpoint"], saves * _save(twin, step)),
    ):
        tape.spend("finetune", mix, tape.until, tape.until + seconds)
    return tape


class Conversations(NamedTuple):
    lines: int
    bytes: int


def conversations(plan: Plan) -> Conversations:
    """What the plan's file of them holds; nothing where it is not here."""
    path = Path(plan.finetune.data or "")
    if not path.is_file():
        return Conversations(0, 0)
    with path.open("rb") as file:
        return Conversations(sum(1 for _ in file), path.stat().st_size)


def _tokens(plan: Plan, found: Conversations) -> float:
    """Seconds until workers have started and made conversations into tokens: rounds of tasks of LINES lines each.

    A conversation goes through the tokenizers library piece by piece, whose rate the tokenizer's group has; a profile's is that of
    documents in the quickest library.
    """
    tasks = -(-found.lines // LINES)
    rounds = -(-tasks // crew(plan))
    return rates(plan).workers + rounds * found.bytes / tasks / plan.tokenizer.encode_rate if tasks else 0.0


def _held_out(plan: Plan, found: Conversations) -> float:
    """Share of an evaluation's sequences that a small file has: each holds a conversation or more."""
    tune = plan.finetune
    most = tune.held_out * min(found.lines, found.bytes / plan.tokenizer.bytes_per_token / tune.seq_len)
    return min(1.0, most / max(1, plan.train.evaluate_sequences)) if found.lines else 1.0


def _save(twin: Plan, step: Pace) -> float:
    """Seconds that training waits for a checkpoint; one of adapters is two matrices of each with their moments."""
    speed, tune = rates(twin), twin.finetune
    if not tune.adapters:
        return tiers(twin, speed, step.stride)[-1].block
    size = 3 * FP32 * float(adapter_parameters(twin.model, tune.targets, tune.rank))
    tensors = 3 * 2 * sum(count for *_, count in adapted(twin.model, tune.targets))
    copied, written = size / twin.ranks / speed.snapshot, speed.save_start + tensors * speed.save_tensor + size / speed.storage_write
    return copied if twin.checkpoint.asynchronous else written
