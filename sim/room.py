"""Whether a plan fits its devices, by how much, and the smallest change that makes room."""

from collections.abc import Iterator
from typing import Any

from conf.plan import Plan
from conf.rules import problems
from conf.units import show
from sim.memory import USABLE, memory
from sim.parallel import columns, steps

MOST = 1024  # times as many servers that are tried


def room(plan: Plan) -> float:
    """Bytes of a device that a run can use."""
    return USABLE * plan.gpu.memory


def verdict(plan: Plan) -> dict[str, Any]:
    """What the fullest pipeline rank needs, what there is, and where it does not fit the changes that would: fastest step first, more
    servers last.

    A change is one word; each is predicted with the step model itself.
    """
    told = memory(columns([plan]))
    need, there = float(told.total.max()), room(plan)
    cures = [] if need <= there else _cures(plan, there)
    return {"need": need, "room": there, "fits": need <= there, "rank": int(told.rank.max()), "cures": cures}


def _cures(plan: Plan, there: float) -> list[dict[str, Any]]:
    tried = [(word, other) for word, other in _changes(plan) if not problems(other)]
    tried += [each for each in [_more_servers(plan, there)] if each]
    if not tried:
        return []
    told, now = steps([other for _, other in tried]), float(steps([plan]).step_time[0])
    found = [
        {"word": word, "need": float(told.memory[i]), "longer": float(told.step_time[i]) / now - 1}
        for i, (word, _) in enumerate(tried)
        if told.memory[i] <= there
    ]
    return sorted(found, key=lambda cure: (cure["word"].startswith("cluster."), cure["longer"]))


def _changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The plan with one thing changed that makes room, and the words for it."""
    mesh, train = plan.mesh, plan.train
    for how in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[train.recompute]:
        yield f"train.recompute={how}", plan.but(train=train.but(recompute=how))
    if train.micro_batch > 1:
        yield f"train.micro_batch={train.micro_batch // 2}", plan.but(train=train.but(micro_batch=train.micro_batch // 2))
    for axis in ("tp", "cp", "pp", "ep"):
        size = 2 * getattr(mesh, axis)
        yield f"mesh.{axis}={size}", plan.but(mesh=mesh.but(**{axis: size}, dp_shard=_left(plan, axis)))
    if mesh.zero < 3:
        yield "mesh.zero=3", plan.but(mesh=mesh.but(zero=3))
    if mesh.dp_replicate > 1:
        shard = plan.dp_shard * mesh.dp_replicate
        yield f"mesh.dp_replicate=1 mesh.dp_shard={shard}", plan.but(mesh=mesh.but(dp_replicate=1, dp_shard=shard))


def _left(plan: Plan, axis: str) -> int:
    """Ranks of dp_shard beside an axis of twice the size; experts lie on the ranks of the others."""
    return plan.mesh.dp_shard if axis == "ep" or plan.mesh.dp_shard == -1 else max(1, plan.mesh.dp_shard // 2)


def _more_servers(plan: Plan, there: float) -> tuple[str, Plan] | None:
    """The fewest servers, by doubling, among which the plan's shards fit."""
    times = 2
    while plan.mesh.dp_shard == -1 and times <= MOST:
        nodes = times * plan.cluster.nodes
        other = plan.but(cluster=plan.cluster.but(nodes=nodes))
        if not problems(other) and float(memory(columns([other])).total.max()) <= there:
            return f"cluster.nodes={nodes}", other
        times *= 2
    return None


def line(plan: Plan, told: dict[str, Any]) -> str:
    """The verdict of a plan that does not fit, for a person."""
    where = f" (pipeline rank {told['rank']})" if plan.mesh.pp > 1 else ""
    over = f"does not fit: needs {show(told['need'], 'B')}{where} of {show(told['room'], 'B')} usable on each {plan.gpu.name}, "
    over += f"{show(told['need'] - told['room'], 'B')} too much"
    if not told["cures"]:
        return f"{over}; no single change fits, foretold sim search=true finds the best mesh that does"
    ways = [f"{cure['word']} (needs {show(cure['need'], 'B')}, steps {_compared(cure['longer'])})" for cure in told["cures"][:3]]
    return f"{over}; set {' or '.join(ways)}"


def _compared(longer: float) -> str:
    return f"{abs(longer):.0%} {'longer' if longer >= 0 else 'shorter'}"
