"""What a life comes to: the quantities of summary.json, and their spread over many lives."""

from collections.abc import Mapping, Sequence

import numpy as np

from conf.arithmetic import flops_per_token, parameters, state_bytes
from conf.plan import Plan
from conf.record import Value
from sim.align import align
from sim.checkpoint import best_interval
from sim.cluster import per_second
from sim.failures import rate
from sim.finetune import finetune
from sim.life import History
from sim.load import load
from sim.memory import PARTS, memory
from sim.parallel import columns


def summary(history: History) -> dict[str, Value]:
    """Quantities of one life."""
    stages = data(history)
    told = {f"{stage}.{name}": Value(value) for stage, values in stages.items() for name, value in values.items()}
    told |= {f"pretrain.{name}": Value(value) for name, value in pretraining(history).items()}
    told |= {f"finetune.{name}": Value(value) for name, value in finetune(history.plan, history.end).items()}
    told |= {f"align.{name}": Value(value) for name, value in align(history.plan, history.seed).items()}
    told |= {f"run.{name}": Value(value) for name, value in run(history).items()}
    bill = history.footprint.bill
    told["run.cost"] = Value(*bill.total)
    told |= {f"run.cost_{item}": Value(*prices) for item, prices in bill._asdict().items() if prices[2]}
    told |= {f"cause-{name}.interruptions": Value(count) for name, count in history.falls.items()}
    told |= {f"cause-{name}.lost": Value(seconds) for name, seconds in history.lost.items()}
    told |= {f"state.{name}": Value(seconds) for name, seconds in history.timeline.states().items()}
    return told


def data(history: History) -> dict[str, dict[str, float]]:
    """What each data stage says of itself, with its part of the run's bill, by time, and of its energy in this state."""
    foot, wall, states = history.footprint, history.timeline.until, history.timeline.states()
    told: dict[str, dict[str, float]] = {}
    for stage, values in history.told.items():
        held = history.plan.ranks * values["seconds"]
        energy = foot.energy_in.get("data", 0.0) * held / states["data"] if held else 0.0
        electricity = foot.bill.electricity[0] * energy / foot.energy if foot.energy else 0.0
        told[stage] = values | {"energy": energy, "cost": foot.bill.devices[0] * values["seconds"] / wall + electricity}
    if "tokens" in told:
        made = per_second(told["tokens"]["tokens"], sum(values["seconds"] for values in told.values()))
        told["tokens"]["supply"] = made / history.pace.tokens_per_s
    return told


def pretraining(history: History) -> dict[str, float]:
    plan, pace = history.plan, history.pace
    told = {
        "step_time": pace.step_time,
        "tokens_per_s": pace.tokens_per_s,
        "tokens_per_s_per_gpu": pace.tokens_per_s / plan.ranks,
        "mfu": pace.mfu,
        "peak_memory": pace.memory,
        "parameters": float(parameters(plan.model)),
        "checkpoint_bytes": float(state_bytes(plan.model)),
    }
    held = memory(columns([plan]))
    told |= {f"memory_{part}": float(held.part(part).max()) for part in PARTS}
    if plan.checkpoint.every:
        told["checkpoint_interval"] = plan.checkpoint.every * pace.stride
    if (often := rate(plan)) and history.blocked:
        told["best_interval"] = best_interval(history.blocked, 1 / often)
    tokens = plan.samples(history.steps) * plan.train.seq_len
    return told | ({"final_loss": loss(plan, tokens)} if plan.law.name != "none" and tokens else {})


def loss(plan: Plan, tokens: float) -> float:
    """E + A / N**alpha + B / D**beta (Hoffmann et al. 2022, equation 10).

    >>> from conf.program import load
    >>> round(loss(load(["experiment=llama3_405b"]), 15.6e12), 3)
    1.893
    """
    law = plan.law
    return float(law.irreducible + law.A / parameters(plan.model) ** law.alpha + law.B / tokens**law.beta)


def run(history: History) -> dict[str, float]:
    """Of the whole run; goodput and ETTR are of pre-training."""
    plan, pace, foot, trained = history.plan, history.pace, history.footprint, history.trained
    tokens = plan.samples(history.steps) * plan.train.seq_len
    paused = history.timeline.states().get("paused", 0.0) / (plan.ranks * history.timeline.until)
    drawn = load(history.meter, history.timeline, pace, foot.peak_power)
    return {
        "wall_clock": history.timeline.until,
        "goodput": per_second(tokens, trained) / pace.tokens_per_s,
        "ettr": per_second(history.steps * pace.stride, trained),
        "interruptions": sum(history.falls.values()),
        "interruptions_unexpected": sum(history.falls.values()) - history.planned,
        "tokens": tokens,
        "flops": tokens * float(flops_per_token(plan.model, plan.train.seq_len)),
        "gpu_hours": foot.gpu_hours,
        "energy": foot.energy,
        "carbon_location": foot.carbon_location,
        "carbon_market": foot.carbon_market,
        "carbon_embodied": foot.carbon_embodied,
        "water": foot.water,
        "peak_power": foot.peak_power,
        **drawn._asdict(),
        **{f"energy_{name}": joules for name, joules in foot.energy_of.items()},
        **({"energy_paused": foot.energy_in["paused"], "cost_paused": foot.bill.devices[0] * paused} if paused else {}),
        **({"delay": history.feed.delay, "carbon_saved": history.feed.saved} if plan.grid.shift != "none" else {}),
        "energy_steps": sum(foot.energy_in.get(state, 0.0) for state in pace.mix),
    }


def spread(lives: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Median, 10th and 90th percentile over lives; a state that a life never entered took it no time.

    >>> spread([{"run.tokens": Value(n)} for n in (1, 2, 3)])["run.tokens"]
    Value(value=2.0, low=1.2, high=2.8)
    """
    if len(lives) == 1:
        return dict(lives[0])
    told = {}
    for name in dict.fromkeys(name for life in lives for name in life):
        values = [life.get(name, Value(0.0)) for life in lives if name in life or name.startswith(("state.", "cause-"))]
        low = np.quantile([v.value if v.low is None else v.low for v in values], 0.1)
        high = np.quantile([v.value if v.high is None else v.high for v in values], 0.9)
        told[name] = Value(float(np.median([v.value for v in values])), float(low), float(high))
    return told
