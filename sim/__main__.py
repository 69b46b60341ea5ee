"""`foretold sim`: predict a plan."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import Refused
from conf.files import write
from conf.hourly import dated
from conf.plan import Plan
from conf.program import count, explain, flag, load, run, split
from conf.record import QUANTITIES, STATES, read_fact, summarise
from conf.rules import meshless_problems
from conf.sweep import expand, varied
from conf.units import show
from sim import whatif
from sim.expect import banded
from sim.kernels import outside, rates
from sim.life import live
from sim.lives import clocked, others
from sim.memory import PARTS
from sim.pace import pace
from sim.parallel import block_work, columns
from sim.roles import misfits
from sim.room import line, verdict
from sim.story import tell
from sim.summary import spread, summary

USAGE = """
foretold sim [options] [group=option] [key=value]   predict a plan

  foretold sim                                   the default plan: this machine's Python library, eight hundred thousand parameters
  foretold sim experiment=llama3_405b            54 days of 16,384 GPUs in a second
  foretold sim experiment=llama3_405b checkpoint.every=20   the same faults under another policy
  foretold sim experiment=llama3_405b vs="cluster.nodes=1024"   what if: both, the difference and its causes
  foretold sim -m experiment=llama3_405b cluster.nodes=512,1024,2048     a sweep; with fast=true in closed form, thousands of points
  foretold sim -m experiment=llama3_8b_grpo align.placement=colocated,async align.rollout_share=0.25,0.5     who generates, who trains
  foretold sim search=true experiment=llama3_405b          the best meshes for its model, cluster and batch, and why
  foretold sim events=true experiment=llama3_405b          one step event by event, with a timeline for Perfetto
  foretold sim replicas=20                       twenty seeds: the median, with the 10th and 90th percentile
  foretold sim costs=true experiment=llama3_405b           what costs most: causes, spares, checkpoints, recovery
"""
OPTIONS = {
    "plan": ("", "file of a plan that another command wrote; overrides still apply"),
    "json": ("false", "print summary.json and nothing else"),
    "vs": ("", "overrides of a second plan, with blanks between: both columns, the difference and its causes"),
    "fast": ("false", "with -m: the runs in closed form instead of simulated lives, thousands of points in this process"),
    "search": ("false", "the best mesh for the plan's model, cluster and batch; mesh.… words pin a choice"),
    "events": ("false", "one step event by event instead of the run: both fidelities, and step.json for Perfetto"),
    "replicas": ("1", "lives to simulate, one a seed, over all cores; the first writes the record"),
    "precision": ("", "lives until the means are known within this share, as in precision=0.01"),
    "costs": ("false", "what costs most: every cause taken away, every knob turned, under the same faults"),
    "runs": ("runs", "folder of the records"),
}
SHOWN = {
    "a step": ("pretrain.step_time", "pretrain.tokens_per_s", "pretrain.mfu", "pretrain.peak_memory"),
    "fine-tuning": ("finetune.step_time", "finetune.tokens_per_s", "finetune.mfu", "finetune.peak_memory", "finetune.parameters",
                    "finetune.seconds", "finetune.cost", "finetune.energy", "finetune.carbon_location"),
    "alignment": ("align.step_time", "align.tokens_per_s", "align.tokens_per_s_per_gpu", "align.generate_time", "align.score_time",
                  "align.logprob_time", "align.train_time", "align.sync_time", "align.queue_time", "align.idle_time",
                  "align.generator_utilisation", "align.trainer_utilisation", "align.tail", "align.staleness_mean", "align.staleness_max",
                  "align.discarded", "align.preempted", "align.trainer_memory", "align.generator_memory", "align.scorer_memory",
                  "align.sync_bytes", "align.sync_seconds", "align.goodput", "align.interruptions", "align.lost",
                  "align.seconds", "align.cost", "align.energy"),
    "the run": (
        "run.wall_clock",
        "run.tokens",
        "pretrain.final_loss",
        "run.ettr",
        "run.interruptions",
        "pretrain.checkpoint_interval",
        "pretrain.best_interval",
    ),
    "its price": ("run.gpu_hours", "run.cost", "run.energy", "run.peak_power", "run.ramp", "run.carbon_location", "run.carbon_market",
                  "run.carbon_embodied", "run.water", "run.delay", "run.carbon_saved", "run.energy_paused", "run.cost_paused"),
}  # fmt: skip
NAMES = {"ettr": "effective time (ETTR)", "mfu": "MFU", "gpu_hours": "device-hours", "wall_clock": "wall clock"}
BAR = 30  # characters of a bar that stands for all of the time


def main(args: list[str]) -> int:
    wish = next((i for i, arg in enumerate(args) if arg in ("-h", "--help")), None)
    if wish is not None:
        print(explain("sim", USAGE, OPTIONS, next(iter(args[wish + 1 :]), "")))
        return 0
    options, overrides = split(args, OPTIONS)
    if "-m" in overrides or "--multirun" in overrides:
        return many([word for word in overrides if word not in ("-m", "--multirun")], options)
    if flag(options, "search"):
        return best(overrides, options)
    quiet, lives = flag(options, "json"), count(options, "replicas")
    plan = load(overrides, options["plan"])
    if flag(options, "events"):
        return one_step(plan, Path(options["runs"]) / plan.id / "sim", quiet)
    if options["vs"]:
        return versus(plan, load([*overrides, *words(options["vs"])], options["plan"]), options)
    folder = Path(options["runs"]) / plan.id / "sim"
    if flag(options, "costs"):
        return costs(plan, lives, quiet)
    told = predict(plan, folder, lives, share(options, "precision"))
    fits = verdict(plan)
    if not fits["fits"]:
        print(line(plan, fits), file=sys.stderr)
    for said in misfits(plan):
        print(said, file=sys.stderr)
    again = [f"plan={options['plan']}"] * bool(options["plan"]) + overrides
    beyond = outside(plan, [work for stage in ("forward", "backward") for work in block_work(columns([plan]), stage)])
    told |= {"outside_calibration": beyond} if beyond else {}
    print(json.dumps(told) if quiet else table(plan, told["quantities"]) + _beyond(beyond) + farewell(folder, again))
    return 0


def many(overrides: list[str], options: Mapping[str, str]) -> int:
    """Predict every point of a sweep; status 1 when some were passed over."""
    from sim import sweep

    settings = [word for word in overrides if word.startswith("hydra")]
    points = expand([word for word in overrides if word not in settings])
    frame, path = sweep.run(points, options, predict, settings, flag(options, "fast"), count(options, "replicas"))
    if flag(options, "json"):
        print(json.dumps({"points": json.loads(frame.to_json(orient="records")), "table": str(path)}))
    else:
        print(f"{sweep.told(frame, varied(points))}\n\ntable: {path}\nnext:  foretold analysis sweep table={shlex.quote(str(path))}")
    return int(frame["problem"].notna().any())


def best(overrides: list[str], options: Mapping[str, str]) -> int:
    """Search for the best mesh; what the words say of it is kept."""
    from sim import advice

    pins, rest = advice.pinned(overrides)
    plan = load(rest, options["plan"], meshless_problems)
    told = advice.advise(plan, pins)
    if flag(options, "json"):
        print(json.dumps(told))
        return 0
    print(advice.page(plan, told))
    again = [f"plan={options['plan']}"] * bool(options["plan"]) + rest
    print(f"\nnext:   {shlex.join(['foretold', 'sim', *again, *advice.words(told['meshes'][0])])}")
    return 0


def one_step(plan: Plan, folder: Path, quiet: bool) -> int:
    """One step of the plan, event by event."""
    from sim import step

    lived = step.lived(plan)
    record = step.told(plan, lived, pace(plan).step_time)
    write(folder / "step.json", step.trace(lived))
    print(json.dumps(record) if quiet else f"{step.page(plan, record)}\n\ntimeline: {folder / 'step.json'}  (opens in ui.perfetto.dev)")
    return 0


def costs(plan: Plan, lives: int, quiet: bool) -> int:
    """What each cause and knob costs."""
    from sim import sensitivity

    found = sensitivity.gains(plan, lives)
    print(json.dumps([vars(one) for one in found]) if quiet else sensitivity.table(found))
    return 0


def share(options: Mapping[str, str], name: str) -> float | None:
    """A share above 0 that an option asks for, or None.

    Raises Refused for anything else.
    """
    if not options[name]:
        return None
    try:
        value = float(options[name])
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise Refused(f"{name}={options[name]} is no share between 0 and 1; write for example {name}=0.01")
    return value


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Refused(f"vs={text}: {str(error).lower()}; write for example vs='cluster.nodes=1024 mesh.tp=4'") from error


def versus(one: Plan, other: Plan, options: Mapping[str, str]) -> int:
    """Predict two plans and print them side by side."""
    plans, lives = (one, other), count(options, "replicas")
    told = [predict(plan, Path(options["runs"]) / plan.id / "sim", lives) for plan in plans]
    if flag(options, "json"):
        print(json.dumps({"plans": told}))
        return 0
    for plan in plans:
        if not (fits := verdict(plan))["fits"]:
            print(f"{plan.id} {line(plan, fits)}", file=sys.stderr)
    print(whatif.table(plans, (pace(one), pace(other)), (told[0]["quantities"], told[1]["quantities"])))
    return 0


def predict(plan: Plan, folder: Path, lives: int = 1, precision: float | None = None) -> dict[str, Any]:
    """Simulate, write the record, return the summary."""
    step, speed = pace(plan), rates(plan)
    first, each = clocked(lambda: live(plan, plan.seed, step, speed))
    told = others(plan, lives, precision, summary(first), each)
    tell(first, folder)
    return summarise(folder, plan.id, "sim", spread(told) if len(told) > 1 else banded(plan, step, told[0]))


def table(plan: Plan, quantities: Mapping[str, Mapping[str, Any]]) -> str:
    """The prediction for a person: what runs, what it comes to, where the time goes."""
    mesh = " × ".join(f"{axis} {degree}" for axis, degree in plan.axes.items() if degree > 1) or "one rank"
    size = _size(quantities["pretrain.parameters"]["value"])
    lines = [f"plan {plan.id}   {plan.model.name}, {size} parameters   {plan.ranks:,} × {plan.gpu.name}   {mesh}"]
    stages = {name: tuple(q for q in quantities if q.startswith(name + ".")) for name in ("crawl", "extract", "dedup", "tokens")}
    for title, names in {**stages, **SHOWN}.items():
        known = [name for name in names if name in quantities]
        lines += ["", title] if known else []
        lines += [f"  {_words(name):22} {_shown(quantities[name]):21}   {_published(plan, name)}".rstrip() for name in known]
        lines += [_parts(quantities)] if "pretrain.peak_memory" in known else []
        lines += _ages(quantities) if title == "alignment" else []
    lines += [f"  {name:22} {said}" for name, said in dated(plan).items()]
    return "\n".join([*lines, "", "where the time goes", *_where(quantities), *_struck(quantities)])


def _parts(quantities: Mapping[str, Mapping[str, Any]]) -> str:
    """The parts of the peak memory, largest first; those below 1% are left out."""
    sizes = {part: quantities[f"pretrain.memory_{part}"]["value"] for part in PARTS}
    shown = [part for part in sorted(PARTS, key=lambda part: -sizes[part]) if sizes[part] >= 0.01 * sum(sizes.values())]
    return f"    {'of which':20} " + ", ".join(f"{part} {show(sizes[part], 'B')}" for part in shown)


def _ages(quantities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many samples are how many updates old when they are trained on, where they can differ."""
    shares = {name.removeprefix("align.stale_"): told["value"] for name, told in quantities.items() if name.startswith("align.stale_")}
    return ["  " + f"{'samples by staleness':22} " + ", ".join(f"{age}: {share:.0%}" for age, share in shares.items())] if shares else []


def _beyond(beyond: list[str]) -> str:
    return f"\n\noutside the calibrated range: {'; '.join(beyond)}" if beyond else ""


def _size(parameters: float) -> str:
    """
    >>> _size(405_853_388_800), _size(1_966_272)
    ('406 B', '1.97 M')
    """
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _words(name: str) -> str:
    plain = name.split(".")[1]
    return NAMES.get(plain, plain.replace("_per_s", " a second").replace("_", " "))


def _shown(quantity: Mapping[str, Any]) -> str:
    value, unit, low, high = (quantity[key] for key in ("value", "unit", "low", "high"))
    told = "1" if unit in ("count", "1/s", "h") else unit  # the words say it
    shown, *ends = (show(number, told) for number in (value, low, high) if number is not None)
    return shown + (f"   {' … '.join(ends)}" if set(ends) - {shown} else "")


def _published(plan: Plan, name: str) -> str:
    """What was published of this quantity of the plan, as it was or before it was varied."""
    if name not in plan.published:
        return ""
    unit = QUANTITIES[name.split(".")[1]][0]
    relation, value = read_fact(plan.published[name].value, unit)
    return f"published {'' if relation == '=' else relation + ' '}{show(value, '1' if unit in ('count', 'h') else unit)}"


def _where(quantities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    spent = {state: quantities[f"state.{state}"]["value"] for state in STATES if f"state.{state}" in quantities}
    shares = {state: seconds / sum(spent.values()) for state, seconds in sorted(spent.items(), key=lambda item: -item[1])}
    return [f"  {state:22} {share:6.1%}  {'█' * round(BAR * share)}".rstrip() for state, share in shares.items()]


def _struck(quantities: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What struck, how often, and the wall clock that it cost."""
    names = [name.removesuffix(".lost") for name in quantities if name.endswith(".lost")]
    lost = sorted(((quantities[f"{name}.lost"], name) for name in names), key=lambda row: -row[0]["value"])
    lines = [
        f"  {name.removeprefix('cause-'):22} {_shown(quantities[f'{name}.interruptions']):24}{_shown(seconds)}" for seconds, name in lost
    ]
    return ["", "what struck, how often, and what the way back up took", *lines] if lines else []


def farewell(folder: Path, overrides: list[str]) -> str:
    return f"\n\nrecord: {folder}\nnext:   {shlex.join(['foretold', 'real', *overrides])}"


if __name__ == "__main__":
    run("sim")
