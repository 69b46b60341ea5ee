"""Many lives: over processes, until they know enough; and what costs most."""

import json

import pytest

from conf.plan import Plan
from conf.program import load
from sim.life import live
from sim.lives import interval, others, spread_out
from sim.pace import pace
from sim.sensitivity import gains, variants
from sim.summary import summary


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load(["experiment=llama3_405b", "train.stop_after=2 d"])


def test_processes_give_what_one_gives(plan: Plan):
    """However long a life takes: the same lives in the same order."""
    first = summary(live(plan, plan.seed, pace(plan)))
    here, there = (others(plan, 5, None, first, each) for each in (0.0, 100.0))
    assert here == there and len(here) == 5 and here[0] is first
    assert spread_out(abs, [-1, 2, -3], 9.0) == [1, 2, 3]


def test_lives_go_on_until_they_know_enough(plan: Plan):
    first = summary(live(plan, plan.seed, pace(plan)))
    few, many = (others(plan, 1, precision, first, 0.02) for precision in (0.5, 0.02))
    assert len(few) == 16 and len(many) > 16 and interval(many) <= 0.02
    assert interval(many[: len(many) // 2]) > 0.02


def test_what_costs_most(foretold):
    words = ["experiment=llama3_405b", "train.stop_after=2 d", "costs=true"]
    status, out, _ = foretold("sim", *words)
    assert status == 0 and "no gpu" in out and "the best interval" in out and "points" in out
    status, out, _ = foretold("sim", *words, "json=true")
    told = {one["change"]: one for one in json.loads(out)}
    assert told["no gpu"]["gain"] > told["no host"]["gain"] and told["no gpu"]["gain"] > 3 * told["no gpu"]["error"]
    assert list(told) == sorted(told, key=lambda name: -told[name]["gain"])


def test_changes_that_the_rules_forbid_are_passed_over(plan: Plan):
    names = [name for name, _ in variants(plan)]
    assert "replicas that restart alone" not in names and f"twice the spares ({2 * plan.cluster.spares})" in names
    assert gains(plan.but(**{"failures.causes": {}}), 4)[0].gain < 0.01


@pytest.mark.parametrize("text", ["0", "2", "much"])
def test_a_precision_is_a_share(foretold, text: str):
    status, _, err = foretold("sim", f"precision={text}")
    assert status == 2 and f"precision={text} is no share between 0 and 1; write for example precision=0.01" in err
