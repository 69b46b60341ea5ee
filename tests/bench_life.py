"""Benches of a run's life: how fast it is simulated, and how close many are to the closed forms. `python -m tests.bench life forms`"""

import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

from scipy.stats import t

from conf.plan import Cause
from conf.program import load
from sim.kernels import rates
from sim.life import live
from sim.lives import others
from sim.pace import pace
from sim.summary import summary
from tests.closed_forms import FORMS, told


def life() -> None:
    """Seconds of one life on one core: Llama 3's 54 days, AIReSim's default scenario, the same faults on more GPUs; 1,000 lives."""

    def timed(plan, lives: int) -> tuple[float, int]:
        step, speed = pace(plan), rates(plan)
        times, falls = [], 0
        for seed in range(lives):
            began = time.process_time()
            history = live(plan, seed, step, speed)
            summary(history)
            times.append(time.process_time() - began)
            falls += sum(history.falls.values())
        return statistics.median(times), falls // lives

    llama = load(["experiment=llama3_405b"])
    print("Llama 3, 16,384 GPUs, 54 days: {:.3f} s a life, {} interruptions (asked: at most 0.25 s)".format(*timed(llama, 9)))
    fleet = load(["experiment=llama3_405b", "cluster.nodes=4096", "cluster.spares=256", "train.stop_after=256 d"])
    server = Cause(per="node", rate=11_175 / 256 / 86_400 / 4_096)
    fleet = fleet.but(**{"failures.causes": {"server": server}})
    print("4,096 servers, 256 days: {:.3f} s a life, {} failures (asked: at most 1 s; AIReSim 68 s)".format(*timed(fleet, 3)))
    for nodes in (128, 2_048, 16_384, 125_000):
        plan = llama.but(**{"cluster.nodes": nodes, "cluster.spares": min(nodes, 256)})
        plan = plan.but(**{"failures.causes": {"server": Cause(per="node", rate=466 / 54 / 86_400 / nodes)}})
        step, speed = pace(llama), rates(llama)
        began = time.process_time()
        falls = [sum(live(plan, seed, step, speed).falls.values()) for seed in range(3)]
        print(f"{nodes * 8:>9,} GPUs: {(time.process_time() - began) / 3:.3f} s a life, {statistics.fmean(falls):.0f} failures")
    began = time.perf_counter()
    first = summary(live(llama, 0, pace(llama)))
    count = len(others(llama, 1_000, None, first, 0.2))
    print(f"{count:,} lives of Llama 3: {time.perf_counter() - began:.0f} s on {os.cpu_count()} cores (asked: at most 150 s on 2)")


def forms() -> None:
    """Simulated lives against the closed forms: 20 settings at 100,000 failures, 200 at 2,000. Half an hour on two cores."""
    with ProcessPoolExecutor() as pool:
        for each, failures, lives in ((4, 100_000, 20), (40, 2_000, 10)):
            jobs = {(form, n): pool.submit(told, form, n, failures, lives) for form in FORMS for n in range(each)}
            results = {key: job.result() for key, job in jobs.items()}
            for form in FORMS:
                errors = [abs(found / expected - 1) for (name, _), (expected, found, _) in results.items() if name == form]
                print(f"{form}: {each} settings at {failures:,} failures, largest error {max(errors):.3%}", flush=True)
            inside = sum(abs(score) < t.ppf(0.995, lives - 1) for _, _, score in results.values())
            print(f"inside the 99% interval: {inside} of {len(results)} (asked: 95%); errors at most 0.5% asked at 100,000", flush=True)
