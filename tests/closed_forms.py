"""Settings drawn at random, and what mathematics says of each (reliability notes, section 3): for tests and for the bench."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from conf.plan import Cause, Plan
from conf.program import load
from sim.kernels import Rates, rates
from sim.life import live
from sim.pace import Pace
from sim.summary import summary

SECOND = Pace(1.0, {"compute": 0.7, "communication": 0.1, "bubble": 0.1, "optimizer": 0.1}, 0.0, 1e9, 0.4, 1e3)
FREE = {f"failures.{phase}": 0.0 for phase in ("detect", "abort", "diagnose", "reallocate", "init")}


@dataclass(frozen=True)
class Setting:
    form: str
    plan: Plan
    rates: Rates
    mtbf: float  # [s]
    expected: float  # share of the time that is useful; of F7, in which the job has its servers

    def life(self, failures: int, seed: int) -> float:
        """The same share in one life of about so many failures."""
        if self.form in ("F7", "F8"):
            plan = self.plan.but(**{"train.stop_after": failures * self.mtbf / (self.expected if self.form == "F7" else 1.0)})
            life = live(plan, seed, SECOND, self.rates)
            if self.form == "F7":
                return 1 - life.timeline.states().get("queue", 0.0) / (life.timeline.until * plan.ranks)
            return life.steps / life.trained
        every = self.plan.checkpoint.every
        steps = max(1, round(failures * self.mtbf * self.expected / every)) * every
        life = live(self.plan.but(**{"train.steps": steps}), seed, SECOND, self.rates)
        return steps / life.trained


def base() -> Plan:
    plan = load(["data.path=null", "data.tokens=1000000"])
    return plan.but(**FREE, **{"train.evaluate_sequences": 0, "train.stop_after": None, "train.steps": None})


def one_cause(plan: Plan, mtbf: float, per: str = "job", **changes: object) -> Plan:
    count = {"job": 1, "node": plan.cluster.nodes}[per]
    return plan.but(**{"failures.causes": {"fault": Cause(per=per, rate=1 / mtbf / count)}} | changes)


def speeds(plan: Plan, save: float = 0.0) -> Rates:
    size = 12 * summary(live(plan.but(**{"failures.causes": {}, "train.steps": 1}), 0, SECOND))["pretrain.parameters"].value
    return replace(rates(plan), storage_write=size / save if save else math.inf, storage_read=math.inf, init=0.0)


def f1(draw: np.random.Generator) -> Setting:
    """Saves of C every tau, D down after each failure and no failures in it: a job without spares that waits for the repair."""
    mtbf, every, save, down = 500.0, int(draw.integers(50, 300)), float(draw.uniform(1, 20)), float(draw.uniform(5, 150))
    plan = one_cause(base(), mtbf, "node", **{"checkpoint.every": every, "failures.repair": down, "cluster.spares": 0})
    eta = every / mtbf / ((1 + down / mtbf) * math.expm1((every + save) / mtbf))
    return Setting("F1", plan, speeds(plan, save), mtbf, eta)


def f2(draw: np.random.Generator) -> Setting:
    """Failures also while the job restarts (Daly 2006)."""
    mtbf, every, save, restart = 500.0, int(draw.integers(50, 300)), float(draw.uniform(1, 20)), float(draw.uniform(5, 150))
    plan = one_cause(base(), mtbf, **{"checkpoint.every": every, "failures.detect": restart})
    return Setting("F2", plan, speeds(plan, save), mtbf, every / (mtbf * math.exp(restart / mtbf) * math.expm1((every + save) / mtbf)))


def f4(draw: np.random.Generator) -> Setting:
    """Saves that block for C and are safe only W later: exp(−W / M) of F1."""
    mtbf, every, block, down = 500.0, int(draw.integers(50, 300)), float(draw.uniform(0.5, 5)), float(draw.uniform(5, 150))
    later = float(draw.uniform(0.1, 0.95)) * every
    plan = one_cause(base(), mtbf, "node", **{"checkpoint.every": every, "checkpoint.asynchronous": True, "failures.repair": down,
                                              "cluster.spares": 0})  # fmt: skip
    speed = speeds(plan, later)
    size = speed.storage_write * later
    plan = plan.but(**{"gpu.snapshot": size / plan.ranks / block})
    eta = math.exp(-later / mtbf) * every / mtbf / ((1 + down / mtbf) * math.expm1((every + block) / mtbf))
    return Setting("F4", plan, speed, mtbf, eta)


def f7(draw: np.random.Generator) -> Setting:
    """A job with S spares stands still for ErlangB(S + 1, N r R) of its time, whatever the law of the repair."""
    spares, load_ = int(draw.integers(0, 8)), float(draw.uniform(1, 6))
    law = str(draw.choice(["fixed", "exponential", "lognormal 1.0"]))
    mtbf, nodes = 100.0, 64
    cluster = {"cluster.nodes": nodes, "cluster.spares": spares}
    plan = one_cause(base().but(**cluster), mtbf, "node", **{"checkpoint.every": 1000})
    mean = load_ * mtbf
    text = f"{mean} s" if law == "fixed" else f"{mean} s exponential" if law == "exponential" else f"{mean / math.exp(0.5)} s lognormal 1.0"
    plan = plan.but(**{"failures.repair": text, "failures.restart": "job"})
    return Setting("F7", plan, speeds(plan), mtbf, 1 - erlang_b(spares + 1, load_))


def f8(draw: np.random.Generator) -> Setting:
    """K replicas that restart alone: 1 / (1 + rate R / K) × 1 / (1 + rate d). Enough of them that never all are out at once."""
    count, outage, stall = int(draw.integers(8, 33)), float(draw.uniform(20, 200)), float(draw.uniform(1, 20))
    mtbf, outage, stall = 2000.0, 10 * outage, 5 * stall  # long beside a step, of which a failure tears half
    plan = base().but(**{"cluster.nodes": count, "cluster.spares": count, "mesh.dp_replicate": count, "mesh.dp_shard": 2})
    plan = one_cause(plan, mtbf, "node", **{"failures.restart": "replica", "failures.detect": stall, "failures.diagnose": outage,
                                            "checkpoint.every": 0, "cluster.nic_bandwidth": math.inf})  # fmt: skip
    plan = plan.but(**{"failures.repair": 0.0})
    return Setting("F8", plan, speeds(plan), mtbf, 1 / (1 + outage / mtbf / count) / (1 + stall / mtbf))


def erlang_b(servers: int, offered: float) -> float:
    """Blocking probability by the stable recursion."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    return blocked


def told(form: str, number: int, failures: int, lives: int) -> tuple[float, float, float]:
    """Expected and found share of one random setting over so many lives, and how many standard errors they are apart.

    A run to a fixed step is a sum of like parts, so there the wall clock is averaged; a run to a fixed hour has a share at once.
    """
    setting = FORMS[form](np.random.default_rng([number, ord(form[1])]))
    shares = np.array([setting.life(failures // lives, seed) for seed in range(lives)])
    sums = form in ("F1", "F2", "F4")
    values, target = (1 / shares, 1 / setting.expected) if sums else (shares, setting.expected)
    error = values.std(ddof=1) / math.sqrt(lives)
    found = values.mean()
    return setting.expected, 1 / found if sums else float(found), float((found - target) / error)


FORMS: dict[str, Callable[[np.random.Generator], Setting]] = {"F1": f1, "F2": f2, "F4": f4, "F7": f7, "F8": f8}
