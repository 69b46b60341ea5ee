"""What strikes, and the way back up: the weather's laws, the whole log of a recovery, and where mathematics knows the answer."""

import doctest
import importlib
import math
import runpy
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise, takewhile
from pathlib import Path

import numpy as np
import pytest

from conf.duration import Duration
from conf.plan import Cause, Plan
from conf.program import from_yaml, load, to_yaml
from conf.record import STATES
from sim.checkpoint import best_interval
from sim.cluster import World
from sim.expect import useful
from sim.failures import Fault, faults, population, rate
from sim.life import live
from sim.pretrain import Pretraining
from tests.closed_forms import FORMS, SECOND, base, one_cause, speeds, told

EXAMPLES = Path(__file__).parent / "examples"
DAY = 86400.0


@pytest.fixture(scope="module")
def plan() -> Plan:
    return base().but(**{"cluster.nodes": 100, "cluster.gpus_per_node": 2, "cluster.spares": 0, "train.steps": 300})


def weather(plan: Plan, causes: dict[str, Cause], until: float, seed: int = 0, **changes: object) -> list[Fault]:
    stormy = plan.but(**{"failures.causes": causes} | {f"failures.{key}": value for key, value in changes.items()})
    return list(takewhile(lambda fault: fault.at < until, faults(stormy, seed)))


def near(count: float, expected: float, errors: float = 4) -> bool:
    return abs(count - expected) < errors * math.sqrt(expected)


# -- the weather


def test_every_population_strikes_at_its_rate(plan: Plan):
    """2,000 days of 100 servers of two devices: what fails together counts once, and a server's own rate stays."""
    causes = {
        "job": Cause(per="job", rate=1 / DAY),
        "node": Cause(per="node", rate=0.01 / DAY),
        "gpu": Cause(per="gpu", rate=0.01 / DAY),
        "burst": Cause(per="node", rate=0.04 / DAY, blast=4),
        "switch": Cause(per="switch", rate=0.02 / DAY, blast=10),
    }
    count = Counter(fault.cause for fault in weather(plan, causes, 2000 * DAY))
    expected = {"job": 2000, "node": 2000, "gpu": 4000, "burst": 2000, "switch": 400}
    assert all(near(count[name], events) for name, events in expected.items()), count
    assert sum(expected.values()) / 2000 / DAY == pytest.approx(rate(plan.but(**{"failures.causes": causes})))
    assert population(plan, causes["switch"]) == 10


def test_times_without_memory_are_exponential_and_places_even(plan: Plan):
    storm = weather(plan, {"node": Cause(per="node", rate=0.01 / DAY)}, 5000 * DAY)
    gaps = np.diff([fault.at for fault in storm])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    hits = np.bincount([fault.server for fault in storm], minlength=100)
    assert hits.var() == pytest.approx(hits.mean(), rel=0.5) and hits.size == 100


@pytest.mark.parametrize("shape", [0.6, 3.0])
def test_weibull_clocks_keep_their_rate_and_have_a_memory(plan: Plan, shape: float):
    """The mean time stays 1 / rate; its coefficient of variation is sqrt(Γ(1 + 2/k) / Γ(1 + 1/k)² − 1)."""
    storm = weather(plan, {"node": Cause(per="node", rate=0.1 / DAY, shape=shape)}, 3000 * DAY)
    assert len(storm) == pytest.approx(30_000, rel=0.03)
    gaps = np.concatenate([np.diff([f.at for f in storm if f.server == server]) for server in range(100)])
    variation = math.sqrt(math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.04)


def test_new_machines_fail_more_until_they_are_run_in(plan: Plan):
    """(factor − 1) × span more of them than mature ones have, spread as exp(−t / span)."""
    node = {"node": Cause(per="node", rate=0.01 / DAY)}
    usual, young = (weather(plan, node, 1000 * DAY, infant=f, infant_span=50 * DAY) for f in (1.0, 11.0))
    assert near(len(young) - len(usual), 10 * 50) and {f.at for f in usual} <= {f.at for f in young}
    extra = sorted({f.at for f in young} - {f.at for f in usual})
    assert near(sum(at < 50 * DAY for at in extra), 500 * (1 - math.exp(-1)))


def test_lemons_fail_more_and_the_fleet_as_often(plan: Plan):
    node = {"node": Cause(per="node", rate=0.01 / DAY)}
    for lemons in ({"lemons": 0.1, "lemon_factor": 9.0}, {"frailty": 2.0}):
        storm = weather(plan, node, 5000 * DAY, **lemons)
        hits = np.sort(np.bincount([f.server for f in storm], minlength=100))[::-1]
        assert near(len(storm), 5000) and hits[:10].sum() > 0.3 * len(storm)
    assert hits.var() / hits.mean() ** 2 == pytest.approx(2.0, rel=0.6)


def test_the_weather_knows_the_seed_and_the_machines_alone(plan: Plan):
    causes = {"node": Cause(per="node", rate=0.01 / DAY), "job": Cause(per="job", rate=1 / DAY)}
    stormy = plan.but(**{"failures.causes": causes})
    first = list(islice(faults(stormy, 5), 50))
    policies = ({"failures.detect": 7.0}, {"checkpoint.every": 9}, {"failures.restart": "replica"}, {"failures.without_spare": "shrink"},
                {"train.seq_len": 64}, {"failures.repair": "9 d"}, {"checkpoint.memory_every": 3})  # fmt: skip
    assert all(list(islice(faults(stormy.but(**policy), 5), 50)) == first for policy in policies)
    alone = stormy.but(**{"failures.causes": {"job": causes["job"]}})
    assert list(islice((f for f in faults(stormy, 5) if f.cause == "job"), 9)) == list(islice(faults(alone, 5), 9))
    assert list(islice(faults(stormy, 6), 50)) != first


def test_policies_differ_only_where_they_should(plan: Plan):
    """Slower detection changes the time in detection of every fault, and nothing about when and where they strike."""
    stormy = one_cause(plan.but(**{"train.steps": None, "train.stop_after": 20_000.0, "checkpoint.every": 100}), 900.0)
    lives = [live(stormy.but(**{"failures.detect": text}), 3, SECOND) for text in ("10 s exponential", "20 s exponential")]
    hits = [[(h.at, h.detail["cause"]) for h in life.timeline.happenings if h.event == "failure"] for life in lives]
    assert hits[0] == hits[1] and len(hits[0]) > 10
    detected = [life.timeline.states()["detect"] for life in lives]
    assert detected[1] == pytest.approx(2 * detected[0], rel=0.02)


# -- durations


@pytest.mark.parametrize("text", ["90 s", "3 min exponential", "2 h lognormal 1.2"])
def test_durations_are_read_spelt_and_drawn(text: str):
    span = Duration.read(text)
    assert Duration.read(span.spelt()) == span
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    drawn = np.array([span.at(float(q)) for q in quantiles])
    assert drawn.mean() == pytest.approx(span.mean, rel=0.01) and span.of_mean(7.0).mean == pytest.approx(7.0)


def test_a_plan_keeps_its_durations(tmp_path):
    told_ = load(["failures=llama3", "failures.detect=2 min lognormal 1.5"])
    (tmp_path / "plan.yaml").write_text(to_yaml(told_))
    assert from_yaml(tmp_path / "plan.yaml").id == told_.id != load(["failures=llama3", "failures.detect=2 min"]).id


# -- the way back up


def test_the_example_is_what_it_says(capsys):
    runpy.run_module("tests.examples.recovery", run_name="__main__")
    out = capsys.readouterr().out
    assert out == (EXAMPLES / "recovery.out").read_text(), "run: python -m tests.examples.recovery > tests/examples/recovery.out"
    shown = {word for line in out.splitlines() for word in line.split() if word in STATES}
    recovery = {"detect", "abort", "diagnose", "reallocate", "queue", "init", "load", "replay", "checkpoint", "idle"}
    assert recovery <= shown
    events = {"failure", "detection", "replacement", "restart", "straggler", "resize", "repaired", "rejoin", "spike", "rollback"}
    assert events <= set(out.split())


def scripted(plan: Plan, storm: list[Fault], save: float = 0.0) -> Pretraining:
    world = World(plan, speeds(plan, save))
    job = Pretraining(world, SECOND, iter(storm))
    world.env.run(until=world.env.process(job.run()))
    return job


def moments(job: Pretraining, *events: str) -> list[tuple[float, str, int | None]]:
    return [(round(h.at, 6), h.event, h.step) for h in job.world.timeline.happenings if h.event in events]


def test_a_save_that_is_not_yet_safe_does_not_hold(plan: Plan):
    """Copies at 100 and 200 block for 1 s and are safe 80 s later: a fall at 250 ends at 100, and 200 is saved again."""
    slow = plan.but(**{"checkpoint.every": 100, "checkpoint.asynchronous": True})
    slow = slow.but(**{"gpu.snapshot": 9_647_616 / slow.ranks})
    job = scripted(one_cause(slow, 1e9), [Fault(250.0, "fault", 0)], save=80.0)
    size = job.checkpoints.bytes
    assert job.checkpoints.remote.block == pytest.approx(size / 9_647_616)
    assert [(event, step) for _, event, step in moments(job, "checkpoint", "restart")] == [
        ("checkpoint", 100), ("restart", 100), ("checkpoint", 200), ("checkpoint", 300)]  # fmt: skip


def test_older_checkpoints_where_newer_ones_are_spoilt(plan: Plan):
    """Each checkpoint is unreadable with probability 0.1: the luck of 0.05 spoils one of them."""
    from sim.failures import Luck

    spoilt = one_cause(plan.but(**{"checkpoint.every": 100, "checkpoint.spoilt": 0.1, "checkpoint.keep": 3}), 1e9)
    for luck, step in ((0.5, 200), (0.05, 100), (0.005, 0)):
        job = scripted(spoilt, [Fault(250.0, "fault", 0, Luck(spoilt=luck))])
        assert moments(job, "restart") == [(250.0, "restart", step)]


def test_copies_nearby_hold_where_their_machines_do(plan: Plan):
    """A copy in memory every 10 steps outlives one server, but not neighbours; the server's disk only a fault of the job."""
    near_ = plan.but(**{"checkpoint.every": 100, "cluster.local_bandwidth": 1e12, "cluster.nic_bandwidth": math.inf,
                        "gpu.snapshot": math.inf})  # fmt: skip
    one, two, job = Cause(per="node", rate=1e-9), Cause(per="node", rate=1e-9, blast=2), Cause(per="job", rate=1e-9)
    near_ = near_.but(**{"failures.causes": {"one": one, "two": two, "job": job}, "failures.repair": 0.0})
    for tier, found in (("memory_every", (250, 200, 250)), ("local_every", (200, 200, 250))):
        for cause, step in zip(("one", "two", "job"), found, strict=True):
            run = scripted(near_.but(**{f"checkpoint.{tier}": 10}), [Fault(255.5, cause, 0)])
            assert [step for _, _, step in moments(run, "restart")] == [step], (tier, cause)


def test_a_straggler_drags_all_and_a_hang_waits_for_the_timeout(plan: Plan):
    """100 s at half speed cost 50; a hang at 200 costs its 600 s and the 50 steps since the checkpoint (150 were done by then)."""
    causes = {"slow": Cause(per="gpu", rate=1e-9, how="slow", factor=2.0, lasts="100 s"), "hang": Cause(per="job", rate=1e-9, how="hang")}
    job = scripted(plan.but(**{"failures.causes": causes, "checkpoint.every": 100}), [Fault(50.0, "slow", 3), Fault(200.0, "hang", 0)])
    assert moments(job, "straggler", "failure", "restart", "end") == [
        (50.0, "straggler", 50), (200.0, "failure", 150), (800.0, "restart", 100), (1000.0, "end", 300)]  # fmt: skip
    assert job.falls == {"hang": 1} and job.lost == {"hang": pytest.approx(600.0 + 50.0)}
    assert job.world.timeline.states()["detect"] == 600.0 * plan.ranks


def test_a_straggler_that_leaves_drags_nobody(plan: Plan):
    """Slow from 50 on, step 100 saved at 150; at 151 a server is replaced: the 200 left take 200 s if it was the slow one, 400 if not."""
    causes = {"slow": Cause(per="node", rate=1e-9, how="slow", factor=2.0, lasts="1 d"), "stop": Cause(per="node", rate=1e-9)}
    it = plan.but(**{"failures.causes": causes, "checkpoint.every": 100, "failures.repair": 0.0})
    for server, end in ((3, 351.0), (2, 551.0)):
        job = scripted(it, [Fault(50.0, "slow", 3), Fault(151.0, "stop", server)])
        assert moments(job, "restart", "end") == [(151.0, "restart", 100), (end, "end", 300)]


def test_corruption_spoils_what_is_saved_after_it(plan: Plan):
    """Struck at 150, found at 350: the checkpoints of 200 and 300 are not to be trusted. Fallen back before, nothing is left to find."""
    causes = {"corrupt": Cause(per="gpu", rate=1e-9, how="corrupt"), "stop": Cause(per="job", rate=1e-9)}
    it = plan.but(
        **{"failures.causes": causes, "failures.checksum": "200 s", "checkpoint.every": 100, "checkpoint.keep": 9, "train.steps": 600}
    )
    job = scripted(it.but(**{"failures.repair": 0.0}), [Fault(150.0, "corrupt", 3)])
    assert moments(job, "detection", "restart", "end") == [(350.0, "detection", 350), (350.0, "restart", 100), (850.0, "end", 600)]
    job = scripted(it, [Fault(150.0, "corrupt", 3), Fault(160.0, "stop", 0)])
    assert moments(job, "detection", "restart", "end") == [(160.0, "detection", 100), (160.0, "restart", 100), (660.0, "end", 600)]


def test_who_is_warned_saves_first(plan: Plan):
    """A notice of 5 s is enough for a save of 3 s, not for one of 8."""
    spot = plan.but(
        **{"failures.causes": {"spot": Cause(per="node", rate=1e-9, notice=5.0)}, "checkpoint.every": 100, "failures.repair": 0.0}
    )
    for save, step in ((3.0, 147), (8.0, 100)):
        assert [s for _, _, s in moments(scripted(spot, [Fault(150.0 + save - 3, "spot", 3)], save), "restart")] == [step]


def test_a_server_lost_on_the_way_up_does_not_cut_the_way_short(plan: Plan):
    """Replicas restart alone, but not while all come up together: after the hang all ranks start and load once more."""
    two = plan.but(**{"mesh.dp_replicate": 2, "mesh.dp_shard": 100, "failures.restart": "replica", "failures.timeout": "10 s",
                      "failures.repair": 0.0, "checkpoint.every": 100, "cluster.nic_bandwidth": math.inf})  # fmt: skip
    causes = {"hang": Cause(per="job", rate=1e-9, how="hang"), "server": Cause(per="node", rate=1e-9)}
    two = two.but(**{"failures.causes": causes, "failures.diagnose": "20 s"})
    job = scripted(two, [Fault(150.0, "hang", 0), Fault(170.0, "server", 3)])
    assert moments(job, "restart", "rejoin", "end") == [(190.0, "restart", 100), (390.0, "end", 300)]
    job = scripted(two, [Fault(150.0, "server", 3)])
    assert moments(job, "restart", "rejoin", "end") == [(150.0, "restart", 150), (170.0, "rejoin", None), (310.0, "end", 300)]


def wild(seed: int) -> Plan:
    """A plan with a bit of everything that can go wrong, and any policy."""
    draw = np.random.default_rng(seed)
    count = int(draw.choice([4, 6, 8]))
    replicas = int(draw.choice([1, 2]))
    laws = ["5 s", "20 s exponential", "10 s lognormal 1.5"]
    phases = {phase: str(draw.choice(laws)) for phase in ("detect", "timeout", "abort", "diagnose", "reallocate", "boot", "init")}
    words = [f"cluster.nodes={count}", "cluster.gpus_per_node=1", f"cluster.spares={draw.integers(0, 3)}",
             f"cluster.cold_spares={draw.integers(0, 3)}", f"mesh.dp_replicate={replicas}", "train.global_batch=24", "train.micro_batch=1",
             "data.path=null", "data.tokens=1000000", "train.steps=3000", "checkpoint.every=200", "train.evaluate_every=500",
             f"checkpoint.asynchronous={str(bool(draw.integers(2))).lower()}", f"checkpoint.memory_every={draw.choice([0, 50])}",
             "checkpoint.local_every=70", "cluster.local_bandwidth='1 GB/s'", f"checkpoint.spoilt={draw.choice([0, 0.2])}",
             f"failures.restart={'replica' if replicas == 2 and draw.integers(2) else 'job'}",
             f"failures.without_spare={draw.choice(['wait', 'shrink'])}", f"failures.spikes.every={draw.choice([0, 900])}",
             f"failures.frailty={draw.choice([0, 1])}", "failures.repair='400 s exponential'",
             "failures.checksum='150 s exponential'",
             f"failures.score={draw.choice(['null', '40 s'])}"]  # fmt: skip
    words += [f"failures.{phase}='{law}'" for phase, law in phases.items()]
    node = 1 / 4000.0
    causes = {
        "server": Cause(per="node", rate=node, shape=float(draw.choice([0.7, 1.0]))),
        "switch": Cause(per="switch", rate=node, blast=2),
        "hang": Cause(per="job", rate=node),
        "slow": Cause(per="gpu", rate=node, how="slow", factor=1.4, lasts="60 s lognormal 1.0"),
        "corrupt": Cause(per="gpu", rate=node / 2, how="corrupt"),
        "spot": Cause(per="node", rate=node, notice=float(draw.choice([0.1, 30.0]))),
        "planned": Cause(per="job", rate=node, planned=True),
    }
    return load(words).but(**{"failures.causes": causes})


@pytest.mark.parametrize("seed", range(16))
def test_whatever_goes_wrong_time_energy_money_and_steps_add_up(seed: int):
    """Every life asserts it (sim/life.py); here with all that can happen at once."""
    plan = wild(seed)
    life = live(plan, seed, replace(SECOND, evaluate=3.0), replace(speeds(plan, 4.0), init=5.0))
    assert life.steps == 3000 and len(life.falls) >= 4
    assert all(one.stop == other.start for one, other in pairwise(life.timeline.segments))
    assert sum(life.lost.values()) < life.trained
    again = live(plan, seed, replace(SECOND, evaluate=3.0), replace(speeds(plan, 4.0), init=5.0))
    assert again.timeline.segments == life.timeline.segments and again.timeline.happenings == life.timeline.happenings


@pytest.mark.parametrize("name", ["conf.duration", "sim.checkpoint", "sim.expect", "sim.failures", "sim.recovery", "analysis.reliability"])
def test_the_numbers_in_docstrings(name: str):
    tried = doctest.testmod(importlib.import_module(name))
    assert tried.attempted > 0 == tried.failed


# -- where mathematics knows the answer


@pytest.mark.parametrize("form", FORMS)
def test_lives_agree_with_the_closed_forms(form: str):
    """One random setting each at 2,400 failures; 20 at 100,000 in `tests.bench forms`."""
    expected, found, score = told(form, 0, failures=2400, lives=12)
    assert abs(score) < 4 and abs(found / expected - 1) < 0.03


@pytest.mark.parametrize(("save", "mtbf"), [(6.0, 11_136.0), (60.0, 10_800.0), (120.0, 1_080.0)])
def test_the_best_interval_is_where_the_closed_form_peaks(save: float, mtbf: float):
    best = best_interval(save, mtbf)
    grid = best * np.linspace(0.5, 2, 3001)
    peak = grid[np.argmax([useful(1 / mtbf, work, save, 300.0) for work in grid])]
    assert best == pytest.approx(peak, rel=0.002)


def test_shared_storage_makes_a_save_beside_training_last_longer(plan: Plan):
    from sim.checkpoint import tiers

    beside = plan.but(**{"checkpoint.asynchronous": True})
    speed = replace(speeds(plan, 80.0), storage_read=4 * 4.0 * plan.tokens_per_step)  # the loader takes a quarter of it
    assert tiers(beside, speed, stride=1.0)[0].later == pytest.approx(80.0 / 0.75)
