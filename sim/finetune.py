"""Fine-tuning, foretold: training, of the plan's `tuned` twin, with its model frozen but for adapters where the plan says so.

Bytes and FLOPs of adapters are those of their own products, gradients and moments: there is no factor for them. In closed form: the stage
is short beside pre-training, and failures in it are left out.
"""

from conf.arithmetic import FP32, adapter_parameters, flops_per_token, parameters, tuned_flops_per_token
from conf.plan import Plan
from sim.checkpoint import tiers
from sim.kernels import rates
from sim.pace import Pace, pace


def finetune(plan: Plan) -> dict[str, float]:
    """Quantities of the stage; none where it is off."""
    tune, twin = plan.finetune, plan.tuned
    if tune.method == "none":
        return {}
    step = pace(twin, tune.adapters)
    trained = float(adapter_parameters(plan.model, tune.targets, tune.rank) if tune.adapters else parameters(plan.model))
    flops = tuned_flops_per_token(plan.model, tune.seq_len, trained) if tune.adapters else flops_per_token(plan.model, tune.seq_len)
    seconds = _seconds(twin, step)
    return {
        "step_time": step.step_time,
        "tokens_per_s": step.tokens_per_s,
        "tokens_per_s_per_gpu": step.tokens_per_s / plan.ranks,
        "mfu": step.tokens_per_s * flops / ((plan.gpu.peak(plan.train.precision) or float("nan")) * plan.ranks),
        "peak_memory": step.memory,
        "parameters": trained,
        "checkpoint_bytes": 3 * FP32 * trained,
        "seconds": seconds,
        "cost": seconds * plan.ranks / 3600 * plan.price.gpu_hours[plan.gpu.name].mid,
    }


def _seconds(twin: Plan, step: Pace) -> float:
    """Start, steps, evaluations and checkpoints; the tokens are made in passing."""
    steps, every = twin.train.steps or 0, twin.train.evaluate_every
    evaluations = -(-steps // every) if every and twin.train.evaluate_sequences else 1 * bool(twin.train.evaluate_sequences)
    saved = tiers(twin, rates(twin), step.stride)[-1].block * (-(-steps // twin.checkpoint.every) if twin.checkpoint.every else 1)
    return rates(twin).init + steps * step.step_time + evaluations * step.evaluate + saved
