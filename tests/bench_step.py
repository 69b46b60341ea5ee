"""Benchmarks of the step model: `python -m tests.bench step accuracy`. Processor seconds, so that other work beside does not count."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from analysis import fit as fitting
from analysis.published import FACTS
from conf.plan import Plan
from conf.program import load
from sim import search as searching
from sim.parallel import steps
from sim.step import lived

TABLES = Path(__file__).parents[2] / "shared" / "validation"
GPT3 = ["model=gpt3_175b", "gpu=a100_80", "cluster=dgx_a100", "cluster.nodes=64", "train=large", "train.precision=bf16", "data=prepared",
        "train.seq_len=2048", "train.global_batch=1536", "train.micro_batch=1", "train.compile=true", "train.steps=100000"]  # fmt: skip


def seconds(work: Callable[[], object], times: int) -> float:
    """Median processor seconds of some work."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def step() -> None:
    """How long predictions take: one plan, many, the best mesh, and one step event by event."""
    plan, large = load([*GPT3, "mesh.tp=8", "mesh.pp=8"]), load(["experiment=llama3_405b"])
    steps([plan])
    print(f"one plan: {seconds(lambda: steps([plan]), 200) * 1e3:.2f} ms (asked: at most 1)")
    print(_searched(plan))
    events = seconds(lambda: lived(large), 3)
    print(f"Llama 3 405B's step event by event, 16 stages of 8 GPUs: {events:.2f} s (asked: at most 2)")
    print(_own_mesh(large))


def _searched(plan: Plan) -> str:
    whole, pruned = searching.search(plan, prune=False), searching.search(plan)
    took = {prune: seconds(lambda prune=prune: searching.search(plan, prune=prune), 5) for prune in (False, True)}  # type: ignore[misc]
    same = _same(whole, pruned)
    return (
        f"GPT-3 175B on 512 GPUs: {whole.predicted:,} meshes in {took[False]:.2f} s (asked: at most 10), "
        f"{whole.predicted / took[False]:,.0f} plans/s (asked: 1,000,000); pruned {took[True]:.2f} s (asked: at most 0.5), "
        f"{'the same winner' if same else 'ANOTHER WINNER'}"
    )


def _same(one: searching.Search, other: searching.Search) -> bool:
    return bool((one.meshes.iloc[0] == other.meshes.iloc[0]).all())


def _own_mesh(plan: Plan) -> str:
    found = searching.search(plan).meshes
    mesh = plan.mesh
    own = steps([plan]).step_time[0]
    first = found["step_time"].iloc[0]
    near = found[(found["tp"] == mesh.tp) & (found["pp"] == mesh.pp) & (found["cp"] == mesh.cp)]
    return (
        f"Llama 3 405B on {plan.cluster.ranks:,} GPUs: the published mesh takes {own:.2f} s, {own / first - 1:.1%} more than the best "
        f"({first:.2f} s; asked: at most 10%); {len(near)} of the {len(found)} meshes within 10% share its tp, cp and pp"
    )


def accuracy() -> None:
    """Errors with every source left out in turn, where the tables are here."""
    names = ("step_time", "step_time_single_node", "kernel_efficiency")
    tables = [TABLES / f"{name}.csv" for name in names if (TABLES / f"{name}.csv").is_file()] or [FACTS / "step_time.csv"]
    fitting.fit({"tables": ",".join(map(str, tables)), "out": ""})
