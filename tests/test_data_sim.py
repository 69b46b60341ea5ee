"""The data stages foretold: in closed form, with stragglers and failed tasks, over a shared storage, and for a corpus of the web."""

from dataclasses import replace

import numpy as np
import pytest

from conf.errors import Refused
from conf.program import load
from sim.cluster import MANY, World, crew, pool
from sim.dedup import BANDS, EXACT
from sim.extract import HELD, LIBRARIES
from sim.kernels import rates
from sim.life import live
from sim.summary import data
from tests.test_world import SECOND


def spent(plan, seconds, moved=0.0):
    """How long a pool takes, and how long its workers worked in all."""
    world = World(plan, rates(plan))
    world.env.run(until=world.env.process(pool(world, "extract", seconds, moved)))
    return world.now, sum(bar.stop - bar.start for bar in world.timeline.bars)


def cluster(nodes=2, cores=4, *words):
    return load(["data.runner=ray", f"cluster.nodes={nodes}", f"cluster.cores_per_node={cores}", f"train.global_batch={4 * nodes}", *words])


def test_equal_tasks_go_in_rounds():
    plan = cluster()
    assert crew(plan) == 8 and spent(plan, [3.0] * 16) == (6.0, 48.0) and spent(plan, [3.0] * 17) == (9.0, 51.0)
    assert crew(load(["cluster.gpus_per_node=2", "cluster.cores_per_node=4"])) == 2  # without a cluster engine one server works


def test_a_workers_first_task_takes_longer():
    plan = cluster()
    world = World(plan, rates(plan))
    world.env.run(until=world.env.process(pool(world, "extract", [3.0] * 16, 0.0, first=0.5)))
    assert world.now == 6.5 and sum(bar.stop - bar.start for bar in world.timeline.bars) == 16 * 3 + 8 * 0.5


def test_a_slow_storage_sets_the_pace():
    slow = cluster(2, 4, "cluster.storage_read=10 B/s")
    assert spent(slow, [3.0] * 16, moved=120.0)[0] == pytest.approx(12.0) and spent(slow, [3.0] * 16, moved=50.0)[0] == 6.0


def test_stragglers_have_the_same_mean_and_a_longer_end():
    even, uneven = cluster(2, 4), cluster(2, 4, "data.spread=0.5")
    wall, work = spent(uneven, [1.0] * 4000)
    assert work == pytest.approx(4000, rel=0.03) and work / 8 < wall < work / 8 * 1.01
    assert spent(even, [1.0] * 4000)[0] == 500
    drawn = np.random.default_rng(0).lognormal(-(0.5**2) / 2, 0.5, (400, 8)).max(1).mean()  # of one round of eight the slowest counts
    found = np.mean([spent(uneven.but(seed=seed), [1.0] * 8)[0] for seed in range(200)])
    assert found == pytest.approx(drawn, rel=0.15)


def test_a_failed_task_costs_what_was_done_of_it():
    _, work = spent(cluster(2, 4, "data.failing=0.2"), [1.0] * 4000)
    assert work == pytest.approx(4000 * 1.1, rel=0.03)  # a fifth of them half done, on average


@pytest.mark.parametrize("tasks", [MANY - 1, MANY + 1, 10 * MANY])
def test_gangs_do_the_same_work(tasks):
    plan = cluster(100, 8)
    wall, work = spent(plan, [2.0] * tasks)
    gang = -(-tasks // MANY)
    assert work * gang == pytest.approx(2.0 * tasks) and wall == pytest.approx(2.0 * -(-tasks // 800), rel=0.02)


def test_a_web_corpus_is_foretold_in_its_own_counts():
    """36T tokens, 20T after MinHash, of which C4's and its own rules leave 14.5T; published: 15T."""
    plan = load(["experiment=fineweb", "train.steps=10", "train.warmup=1", "train.schedule=constant", "checkpoint.every=0"])
    told = live(plan, 0, SECOND).told
    assert told["tokens"]["tokens"] == pytest.approx(36e12 * (20 / 36) * (1 - 0.2746), rel=0.001)
    cores = 1000 * 96
    assert told["extract"]["seconds"] == pytest.approx(8e15 / 1.4e6 / cores * 1.0025, rel=0.02)
    assert told["dedup"]["shuffle_bytes"] == pytest.approx(told["extract"]["documents"] * (EXACT + BANDS))
    assert told["extract"]["documents"] == pytest.approx(8e15 * 0.02025 / 3500 * (1 - 0.2746))


def test_what_a_stage_holds_and_costs_is_its_part_of_the_run():
    plan = load(["experiment=fineweb", "train.steps=10", "train.warmup=1", "train.schedule=constant", "checkpoint.every=0", "power.pue=1"])
    history = live(plan, 0, SECOND)
    told, foot = data(history), history.footprint
    spent = sum(values["seconds"] for values in told.values())
    assert sum(values["energy"] for values in told.values()) == pytest.approx(foot.energy_in["data"], rel=1e-3)
    assert sum(values["cost"] for values in told.values()) == pytest.approx(
        spent / 3600 * plan.cluster.servers * 8 * plan.price.gpu_hours["h100-sxm"].mid
    )
    assert told["tokens"]["supply"] == pytest.approx(told["tokens"]["tokens"] / spent / history.pace.tokens_per_s)
    shard = 8e15 / 8e6 * 0.02025  # bytes of text of a file
    assert told["extract"]["cores"] == 96_000 and told["extract"]["worker_memory"] == pytest.approx(LIBRARIES + HELD * shard, rel=1e-6)


def test_passages_that_stand_elsewhere_take_time_and_text():
    plan = load(["experiment=fineweb", "train.steps=10", "train.warmup=1", "train.schedule=constant", "checkpoint.every=0"])
    without, told = (live(p, 0, SECOND).told for p in (plan, plan.but(**{"data.substrings": 50, "data.cut": 0.2})))
    whole = without["tokens"]["bytes"]
    assert told["tokens"]["bytes"] == pytest.approx(0.8 * whole) and told["dedup"]["documents"] == without["dedup"]["documents"]
    longer = told["dedup"]["seconds"] - without["dedup"]["seconds"]
    cores, storage = 96_000, plan.cluster.storage_read
    assert told["dedup"]["substring_seconds"] == pytest.approx(longer)
    assert longer == pytest.approx(max(whole / plan.data.substring_rate / cores, 2 * whole / storage), rel=0.05)


def test_more_of_everything_takes_longer():
    plan = load(["experiment=fineweb", "train.steps=10", "train.warmup=1", "train.schedule=constant", "checkpoint.every=0"])
    usual = live(plan, 0, SECOND).told
    slow = live(plan, 0, SECOND, replace(rates(plan), extract_rate=0.7e6)).told
    assert slow["extract"]["seconds"] == pytest.approx(2 * usual["extract"]["seconds"], rel=0.01)
    assert slow["dedup"]["seconds"] == pytest.approx(usual["dedup"]["seconds"])


def test_what_is_not_here_is_either_raw_or_tokens():
    with pytest.raises(Refused, match="not here and not yet tokens"):
        load(["data=fineweb", "data.tokens=100"])
