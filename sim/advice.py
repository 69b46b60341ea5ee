"""What a search says to a person: the best meshes, why their neighbours lose, where the plan's own stands, and what would make
room when nothing fits."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import pandas as pd

from conf.errors import Refused
from conf.plan import Plan
from conf.rules import problems
from conf.units import show
from sim.memory import USABLE
from sim.parallel import steps
from sim.search import KEYS, NAMES, NEAR, PARTS, Search, records, search

SHOWN = 10
MOST = 1024  # times as many servers that are tried when nothing fits
AXES = ("tp", "cp", "pp", "ep", "micro_batch", "vpp", "zero", "dp_replicate", "recompute")  # whose neighbours are told
FREE = {"schedule", "vpp", "zero", "dp_replicate", "recompute", "micro_batch"}  # chosen anew when an axis changes
Mesh: TypeAlias = Mapping[str, Any]  # NAMES and RECORD
RECORD = ("step_time", *PARTS, "memory", "mfu")


def pinned(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The choices that the words make for the search, and the other words.

    Raises Refused for a size that is no whole number.
    """
    names = {key: name for name, key in KEYS.items()}
    pins, rest = dict[str, Any](), list[str]()
    for word in words:
        key, _, value = word.partition("=")
        if key not in names:
            rest.append(word)
        elif names[key] in ("schedule", "recompute"):
            pins[names[key]] = value
        elif (value.isdigit() and int(value) > 0) or (key, value) == ("mesh.zero", "0"):
            pins[names[key]] = int(value)
        elif value != "-1":
            raise Refused(f"{word}: it must be a whole number above 0; or leave it out, and the search chooses")
    return {name: value for name, value in pins.items() if (name, value) != ("schedule", "auto")}, rest


def advise(plan: Plan, pins: Mapping[str, Any]) -> dict[str, Any]:
    """The search with its reasons, as one record.

    Raises Refused when no mesh is legal, or none fits: with what is nearest, and the smallest change that would fit.
    """
    found = search(plan, pins)
    if found.leanest is None:
        fixed = ", ".join(f"{KEYS[name]}={value}" for name, value in pins.items())
        raise Refused(f"no mesh of {plan.cluster.ranks} ranks keeps the plan's rules{' with ' + fixed if fixed else ''}; its data-parallel "
                      f"ranks must divide train.global_batch={plan.train.global_batch}, its shards the model: change one")  # fmt: skip
    if found.meshes.empty:
        raise Refused(no_room(plan, pins, found))
    meshes = records(found.meshes)
    best = meshes[0]
    return {
        "plan": plan.id, "model": plan.model.name, "gpu": plan.gpu.name, "ranks": plan.cluster.ranks, "predicted": found.predicted,
        "meshes": meshes,
        "neighbours": [_beside(best, mesh, name, value, plan) for name, value, mesh in _neighbours(plan, pins, best)],
        "own": _own(_with(plan, pins), best),
    }  # fmt: skip


def no_room(plan: Plan, pins: Mapping[str, Any], found: Search) -> str:
    """The line for a cluster that is too small, with the smallest change that would fit."""
    lean = found.leanest
    assert lean is not None
    need, room = show(float(lean["memory"]), "B"), show(USABLE * plan.gpu.memory, "B")
    cures = [cure for cure in (_more_servers(plan, pins), _shorter(plan, pins)) if cure]
    line = f"no mesh fits: the leanest ({_name(lean)}) needs {need}, of {room} usable on each {plan.gpu.name}"
    return f"{line}; {' or '.join(cures)} would fit" if cures else f"{line}; take a device with more memory, or a smaller model"


def _more_servers(plan: Plan, pins: Mapping[str, Any]) -> str | None:
    times = 2
    while times <= MOST:
        nodes = times * plan.cluster.nodes
        if not search(plan.but(cluster=plan.cluster.but(nodes=nodes)), pins).meshes.empty:
            return f"cluster.nodes={nodes}"
        times *= 2
    return None


def _shorter(plan: Plan, pins: Mapping[str, Any]) -> str | None:
    seq = plan.train.seq_len // 2
    while seq >= 128:
        if not search(plan.but(train=plan.train.but(seq_len=seq)), pins).meshes.empty:
            return f"train.seq_len={seq}"
        seq //= 2
    return None


def _neighbours(plan: Plan, pins: Mapping[str, Any], best: Mesh) -> Iterator[tuple[str, Any, Search]]:
    """The best meshes with one size of the winner's halved or doubled, or another recomputation; its inner choices made anew."""
    for name in AXES:
        if name in pins:
            continue
        at = best[name]
        values = [how for how in ("none", "selective", "full") if how != at] if name == "recompute" else [at // 2, at * 2]
        values = [value for value in (0, 1, 2, 3) if value != at] if name == "zero" else values
        for value in values:
            fixed = {kept: best[kept] for kept in NAMES if kept not in FREE | {"dp_shard"}}
            found = search(plan, {**fixed, **pins, name: value})
            if found.leanest is not None:
                yield name, value, found


def _beside(best: Mesh, found: Search, name: str, value: Any, plan: Plan) -> dict[str, Any]:
    """Why a neighbour loses: it does not fit, or its parts take longer."""
    if found.meshes.empty:
        assert found.leanest is not None
        over = float(found.leanest["memory"] - USABLE * plan.gpu.memory)
        return {"key": KEYS[name], "value": value, "slower": None, "over": over}
    mesh = records(found.meshes)[0]
    return {"key": KEYS[name], "value": value, **_slower(best, mesh), "mesh": _name(mesh)}


def _slower(best: Mesh, mesh: Mesh) -> dict[str, Any]:
    """How much longer a step is, in all and in each part, as shares of the best step."""
    whole = best["step_time"]
    return {"slower": float(mesh["step_time"] / whole - 1), "parts": {part: float((mesh[part] - best[part]) / whole) for part in PARTS}}


def _with(plan: Plan, pins: Mapping[str, Any]) -> Plan:
    """The plan's own mesh with what was pinned."""
    mesh = {name: value for name, value in pins.items() if KEYS[name].startswith("mesh.")}
    train = {name: value for name, value in pins.items() if KEYS[name].startswith("train.")}
    return plan.but(mesh=plan.mesh.but(**mesh), train=plan.train.but(**train))


def _own(plan: Plan, best: Mesh) -> dict[str, Any] | None:
    """The plan's own mesh beside the best, where it is a legal one."""
    if problems(plan):
        return None
    step = steps([plan])
    mesh, axes = plan.mesh, plan.axes
    told = {name: float(getattr(step, name)[0]) for name in RECORD}
    sizes = {"tp": mesh.tp, "cp": mesh.cp, "pp": mesh.pp, "ep": mesh.ep, "vpp": mesh.vpp, "zero": mesh.zero}
    sizes |= {"micro_batch": plan.train.micro_batch, "dp_replicate": axes["dp_replicate"], "dp_shard": axes["dp_shard"]}
    named = {"schedule": mesh.pipeline if mesh.pp > 1 else "auto", "recompute": plan.train.recompute}
    return {**sizes, **named, **told, **_slower(best, told), "over": max(0.0, told["memory"] - USABLE * plan.gpu.memory)}


def _name(mesh: Mesh) -> str:
    """A mesh in a few words: axes above 1, and what else was chosen."""
    axes = [f"{name}{mesh[name]:.0f}" for name in ("tp", "cp", "pp", "ep", "dp_replicate", "dp_shard") if mesh[name] > 1]
    folded = [f"{mesh['schedule']}×{mesh['vpp']:.0f}" if mesh["vpp"] > 1 else mesh["schedule"]] * (mesh["pp"] > 1)
    again = [f"{mesh['recompute']} recomputation"] * (mesh["recompute"] != "none")
    return " ".join([*axes, f"zero{mesh['zero']:.0f}", f"micro-batch {mesh['micro_batch']:.0f}", *folded, *again])


def words(mesh: Mapping[str, Any]) -> list[str]:
    """A mesh as words of a command."""
    return [f"{KEYS[name]}={mesh[name]}" for name in NAMES if name != "dp_shard"] + [f"mesh.dp_shard={mesh['dp_shard']}"]


def page(plan: Plan, told: Mapping[str, Any]) -> str:
    """The same for a person."""
    meshes = pd.DataFrame(told["meshes"])
    shown = meshes.drop_duplicates(["tp", "cp", "pp", "ep", "schedule"]).head(SHOWN)
    batch = f"{plan.train.global_batch:,} sequences of {plan.train.seq_len:,} a step"
    lines = [f"{plan.model.name} on {told['ranks']:,} × {plan.gpu.name}, {batch}: {told['predicted']:,} meshes predicted", ""]
    lines += [f"the best, of {len(meshes):,} that fit and are within {NEAR - 1:.0%} of it (one a mesh and schedule)", *_table(shown)]
    if own := told["own"]:
        verdict = f"{_compared(own['slower'])} the best" + (f", but {show(own['over'], 'B')} too large" if own["over"] else "")
        lines += [
            "",
            f"the plan's own   {_name(own)}",
            f"                 {show(own['step_time'], 's')} a step, {own['mfu']:.1%} MFU: {verdict}",
        ]
        lines += [f"                 {_why(own['parts'])}"] if _why(own["parts"]) else []
    lines += ["", "why its neighbours lose", *_reasons(told["neighbours"])]
    return "\n".join(lines)


def _table(meshes: pd.DataFrame) -> list[str]:
    head = ("tp", "cp", "pp", "ep", "dp", "zero", "micro-batch", "schedule", "recompute", "step", "MFU", "memory", "bubble", "exposed")
    rows = [head]
    for mesh in meshes.to_dict("records"):
        dp = f"{mesh['dp_shard']}" + (f"×{mesh['dp_replicate']}" if mesh["dp_replicate"] > 1 else "")
        folded = f"{mesh['schedule']}×{mesh['vpp']}" if mesh["vpp"] > 1 else mesh["schedule"]
        shares = [f"{mesh[part] / mesh['step_time']:.1%}" for part in ("bubble", "communication")]
        sizes = [str(mesh[name]) for name in ("tp", "cp", "pp", "ep")]
        told = (show(mesh["step_time"], "s"), f"{mesh['mfu']:.1%}", show(mesh["memory"], "B"))
        rows.append((*sizes, dp, str(mesh["zero"]), str(mesh["micro_batch"]), folded, mesh["recompute"], *told, *shares))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _compared(slower: float) -> str:
    return f"{slower:.1%} slower than" if slower >= 0 else f"{-slower:.1%} faster than"


def _why(parts: Mapping[str, float]) -> str:
    """The parts of a step that differ by half a percent of it or more."""
    return ", ".join(f"{part} {share:+.1%}" for part, share in sorted(parts.items(), key=lambda item: -abs(item[1])) if abs(share) >= 0.005)


def _reasons(neighbours: list[dict[str, Any]]) -> list[str]:
    lines = []
    for told in neighbours:
        choice = f"  {told['key']}={told['value']}"
        if told["slower"] is None:
            lines.append(f"{choice:26} does not fit: {show(told['over'], 'B')} too much")
        else:
            lines.append(f"{choice:26} {told['slower']:+6.1%}   {_why(told['parts']) or 'no difference in time'}   ({told['mesh']})")
    return lines
