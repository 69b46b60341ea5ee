"""What a run measured, from its ledger alone: the same for a run that ended and for one that was cut."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from conf.arithmetic import flops_per_token
from conf.plan import Plan
from conf.record import STATES, Value, state_totals

Rows = Iterable[Mapping[str, Any]]
DATA = ("crawl", "extract", "dedup", "tokens")


def summary(plan: Plan, ledger: Rows, events: Rows) -> dict[str, float | Value]:
    """Quantities of summary.json."""
    rows = list(ledger)
    told: dict[str, float | Value] = {}
    for row in rows:
        if row["stage"] in DATA and row["quantity"] not in STATES:
            told[f"{row['stage']}.{row['quantity']}"] = row["value"]
    states = state_totals(rows)
    told |= {f"state.{name}": seconds for name, seconds in states.items()}
    wall = sum(states.values()) / plan.ranks
    if states:  # none where only a stage with a record of its own ran
        told |= {"run.wall_clock": wall, "run.gpu_hours": wall * plan.ranks / 3600}
        told["run.cost"] = wall * plan.ranks / 3600 * plan.price.gpu_hours[plan.gpu.name].mid
    if any(row["quantity"] == "step_time" for row in rows):
        told |= _training(plan, rows, list(events))
        seconds = [row["value"] for row in rows if row["stage"] in DATA and row["quantity"] == "seconds"]
        if "tokens.tokens" in told:
            told["tokens.supply"] = told["tokens.tokens"] / sum(seconds) / told["pretrain.tokens_per_s"]
    return told


TRAINING = ("data", "compute", "communication", "bubble", "optimizer")  # states of updates with what belongs to them
PARTS = {"generate": ("generate",), "score": ("score",), "logprob": ("logprob",), "train": TRAINING, "sync": ("sync",)}


def aligned(plan: Plan, ledger: Rows, events: Rows) -> dict[str, float | Value]:
    """Quantities of an alignment, from its own record: a step's time and tokens, where the ranks' time went, and what was learned."""
    rows = [row for row in ledger if row["stage"] != "run"]
    found = defaultdict[str, dict[int, float]](dict)
    for row in rows:  # a step done again counts as it was done last
        if row["step"] is not None and (row["rank"] or 0) == 0 and row["value"] is not None:
            found[row["quantity"]][row["step"]] = row["value"]
    times = sorted(found["step_time"].values())
    states = state_totals(rows)
    wall = sum(states.values()) / plan.ranks
    told: dict[str, float | Value] = {"seconds": wall, "cost": wall * plan.ranks / 3600 * plan.price.gpu_hours[plan.gpu.name].mid}
    if times:
        rate = sum(found["tokens"].values()) / sum(times)
        told |= {"step_time": Value(statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10]),
                 "tokens_per_s": rate, "tokens_per_s_per_gpu": rate / plan.ranks} | _shares(plan, rows)  # fmt: skip
        stops = sum(event["event"] == "failure" for event in events)
        told |= {"goodput": sum(times) / wall, "interruptions": stops} if stops or plan.failures.causes else {}
    told |= {"checkpoint_bytes": max(found["checkpoint_bytes"].values())} if found["checkpoint_bytes"] else {}
    told |= {"failed": sum(found["failed"].values())} if found["failed"] else {}
    if ages := found["staleness"].values():
        told |= {"staleness_max": max(ages), "staleness_mean": statistics.fmean(found["staleness_mean"].values())}
        told["discarded"] = max(found["discarded"].values())
        told |= {name: statistics.fmean(found[name].values()) for name in found if name.startswith("stale_")}
    for name in ("held_out_accuracy", "held_out_error", "longer_wins", "held_out_reward"):
        told |= {name: found[name][max(found[name])]} if found[name] else {}
    for name in ("reward", "accuracy", "kl", "completion_tokens", "sync_bytes", "sync_seconds"):  # noise of a step averages out
        told |= {name: statistics.fmean(list(found[name].values())[-10:])} if found[name] else {}
    for role, ranks in plan.roles._asdict().items():
        peak = [row["value"] for row in rows if row["quantity"] == "peak_memory" and row["rank"] in ranks]
        told |= {f"{role.removesuffix('s')}_memory": max(peak)} if peak else {}
    return {f"align.{name}": value for name, value in told.items()}


def _shares(plan: Plan, rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of a step by what was done, means over all ranks, and how much of the time generators and trainers work.

    Of trainers what was booked in steps; of the others, who know no steps, what was booked meanwhile. A trainer's queue is waiting for
    samples, another rank's is idle.
    """
    trainers, generators, _ = plan.roles
    first = {row["step"]: row["at"] - row["value"] for row in rows if row["quantity"] == "step_time" and row["rank"] == 0}
    began, ended = min(first.values()), max(row["at"] for row in rows if row["quantity"] == "step_time" and row["rank"] == 0)
    spent = defaultdict[tuple[str, bool], float](float)
    for row in rows:
        trains = row["rank"] in trainers
        if row["quantity"] in STATES and row["rank"] is not None and (row["step"] is not None if trains else began < row["at"] <= ended):
            spent[row["quantity"], trains] += row["value"]
    each = {name: sum(spent[state, who] for state in states for who in (True, False)) for name, states in PARTS.items()}
    each["queue"] = spent["queue", True]
    each["idle"] = spent["queue", False] + sum(spent[state, who] for state in ("idle", "load") for who in (True, False))
    whole = sum(value for (_, trains), value in spent.items() if trains) / len(trainers)
    works = sum(spent[state, True] for state in (*TRAINING, "logprob", "score"))
    told = {f"{name}_time": seconds / len(first) / plan.ranks for name, seconds in each.items()}
    told["trainer_utilisation"] = works / len(trainers) / whole
    if plan.align.rollouts:
        told["generator_utilisation"] = (spent["generate", True] + spent["generate", False]) / len(generators) / whole
    return told


def _training(plan: Plan, rows: list[Mapping[str, Any]], events: list[Mapping[str, Any]]) -> dict[str, float | Value]:
    def of(quantity: str) -> list[float]:
        return [row["value"] for row in rows if row["stage"] == "pretrain" and row["quantity"] == quantity]

    by_step: dict[int, float] = {}
    for row in rows:  # the slowest rank makes the step; a step done again counts as it was done last
        if row["quantity"] == "step_time" and (row["rank"] == 0 or row["step"] not in by_step):
            by_step[row["step"]] = row["value"]
    times = sorted(by_step.values())
    step_time = Value(statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10])
    rate = plan.tokens_per_step / step_time.value
    peak = plan.gpu.peak(plan.train.precision) or math.nan
    wall = sum(r["value"] for r in rows if r["stage"] == "pretrain" and r["quantity"] in STATES) / plan.ranks
    tokens = sum(plan.batch(step - 1) for step in by_step) * plan.train.seq_len
    stops = sum((event["stage"], event["event"]) in (("run", "start"), ("pretrain", "failure")) for event in events) - 1
    told: dict[str, float | Value] = {
        "pretrain.step_time": step_time,
        "pretrain.tokens_per_s": rate,
        "pretrain.tokens_per_s_per_gpu": rate / plan.ranks,
        "pretrain.mfu": rate * flops_per_token(plan.model, plan.train.seq_len) / (peak * plan.ranks),
        "run.tokens": tokens,
        "run.interruptions": stops,
        "run.interruptions_unexpected": stops,
        "run.ettr": sum(by_step.values()) / wall,
        "run.goodput": tokens / (rate * wall),
    }
    for name in ("peak_memory", "reserved_memory", "parameters", "checkpoint_bytes"):
        told |= {f"pretrain.{name}": max(of(name))} if of(name) else {}
    for name in ("held_out_bits_per_byte", "bigram_bits_per_byte"):
        told |= {f"pretrain.{name}": of(name)[-1]} if of(name) else {}
    told |= {"pretrain.final_loss": of("held_out_loss")[-1]} if of("held_out_loss") else {}
    told |= {"run.energy": sum(of("energy"))} if of("energy") else {}
    return told
