"""The world of `sim`: what it conserves, and where mathematics knows the answer."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest

from conf.errors import Refused
from conf.plan import Cause, Plan
from conf.program import from_yaml, load, main
from conf.record import QUANTITIES, read, state_totals
from sim.cluster import World
from sim.expect import banded
from sim.failures import Fault, faults
from sim.grid import carbon
from sim.kernels import Rates, rates
from sim.life import History, live
from sim.pace import Pace, pace, uncertain
from sim.pretrain import Pretraining
from sim.story import tell
from sim.summary import spread, summary

SECOND = Pace(1.0, {"compute": 0.7, "communication": 0.1, "bubble": 0.1, "optimizer": 0.1}, 0.0, 1e9, 0.4, 1e3)
HOUR = 3600.0


@pytest.fixture(scope="module")
def laptop() -> Plan:
    return load(["data.path=null", "data.tokens=1000000"])


@pytest.fixture(scope="module")
def llama() -> Plan:
    return load(["experiment=llama3_405b"])


def speeds(plan: Plan, save: float = 0.0, load: float = 0.0, init: float = 0.0) -> Rates:
    """Rates under which a checkpoint takes `save` and `load` seconds."""
    size = 12 * summary(live(plan, 0, SECOND))["pretrain.parameters"].value
    write, back = (size / seconds if seconds else math.inf for seconds in (save, load))
    return replace(rates(plan), storage_write=write, storage_read=back, init=init)


def failing(plan: Plan, mtbf: float, per: str = "job", **changes: object) -> Plan:
    """The plan with one cause that stops the job every `mtbf` seconds, and recovery that takes no time unless said."""
    count = {"job": 1, "node": plan.cluster.nodes, "gpu": plan.cluster.ranks}[per]
    free = {f"failures.{phase}": 0.0 for phase in ("detect", "diagnose", "reallocate", "init")}
    cause = Cause(per=per, rate=1 / (mtbf * count))
    return plan.but(**free, **{"failures.causes": {"fault": cause}, "train.evaluate_sequences": 0}).but(**changes)


def told(history: History) -> dict[str, float]:
    return {name: value.value for name, value in summary(history).items()}


# -- conservation


@pytest.mark.parametrize("seed", range(12))
def test_every_life_conserves_time_tokens_energy_and_money(laptop: Plan, seed: int) -> None:
    draw = np.random.default_rng(seed)
    plan = failing(
        laptop.but(**{"cluster.nodes": int(draw.integers(1, 9)), "cluster.spares": int(draw.integers(0, 3))}),
        mtbf=float(draw.uniform(50, 500)), per=str(draw.choice(["job", "node", "gpu"])),
        **{"train.steps": int(draw.integers(100, 2000)), "checkpoint.every": int(draw.integers(5, 50)), "train.evaluate_every": 70,
           "train.stop_after": [None, 900.0][seed % 2], "failures.detect": float(draw.uniform(0, 30)), "failures.repair": 200.0,
           "grid.market": 1e-5},
    )  # fmt: skip
    step = replace(SECOND, evaluate=float(draw.uniform(0, 5)))
    life = live(plan, seed, step, speeds(plan, save=1.5, load=2.5, init=3.0))
    q = told(life)
    states = {name.split(".")[1]: seconds for name, seconds in q.items() if name.startswith("state.")}
    assert sum(states.values()) == pytest.approx(plan.ranks * q["run.wall_clock"], rel=1e-9)
    assert sum(states.get(s, 0) for s in step.mix) >= life.steps * plan.ranks * (1 - 1e-9)
    power = {state: life.meter.watts({state: 1.0}) for state in states}
    assert sum(power[s] * seconds / plan.ranks for s, seconds in states.items()) == pytest.approx(q["run.energy"], rel=1e-9)
    assert q["run.carbon_location"] == pytest.approx(q["run.energy"] * plan.grid.intensity, rel=1e-9)  # a flat grid
    assert q["run.carbon_market"] == pytest.approx(q["run.energy"] * 1e-5, rel=1e-9)
    assert q["run.cost_devices"] == pytest.approx(q["run.gpu_hours"] * plan.price.gpu_hours[plan.gpu.name].mid)
    assert q["run.tokens"] == life.steps * plan.tokens_per_step
    assert q["run.goodput"] == pytest.approx(q["run.tokens"] / (1e3 * life.trained))
    assert all(one.stop == other.start for one, other in pairwise(life.timeline.segments))


def test_the_record_says_what_the_summary_says(laptop: Plan, tmp_path) -> None:
    life = live(failing(laptop, mtbf=100.0, **{"checkpoint.every": 20}), 3, SECOND, speeds(laptop, save=1.0, init=2.0))
    tell(life, tmp_path)
    tell(life, tmp_path)  # again, over the first
    ledger, events = read(tmp_path, "ledger"), read(tmp_path, "events")
    assert state_totals(ledger) == pytest.approx(life.timeline.states())
    assert Counter(e["event"] for e in events)["failure"] == told(life)["run.interruptions"] > 0
    assert from_yaml(tmp_path / "plan.yaml").id == life.plan.id
    bars = [b for b in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if b["tid"] == "job"]
    assert sum(b["dur"] for b in bars) / 1e6 == pytest.approx(life.timeline.until, rel=1e-6)
    powers = [(row["at"], row["value"]) for row in ledger if row["quantity"] == "power"]
    ends = [*(at for at, _ in powers[1:]), life.timeline.until]
    joules = sum(watts * (end - at) for (at, watts), end in zip(powers, ends, strict=True))
    assert joules == pytest.approx(life.footprint.energy, rel=1e-9)


def test_a_long_story_is_thinned_and_still_adds_up(laptop: Plan, tmp_path) -> None:
    plan = laptop.but(**{"checkpoint.every": 1, "train.steps": 12_000})
    life = live(plan, 0, SECOND, speeds(plan, save=0.1))
    tell(life, tmp_path)
    ledger, events = read(tmp_path, "ledger"), read(tmp_path, "events")
    assert len(life.timeline.segments) == 24_000 and len(ledger) < 50_000 and len(events) < 10_000
    assert state_totals(ledger) == pytest.approx(life.timeline.states(), rel=1e-9)


# -- closed forms (reliability notes, section 3): mean wall clock over seeds against the formula, within its own error


def walls(plan: Plan, save: float, seeds: int = 12) -> np.ndarray:
    return np.array([live(plan, seed, SECOND, speeds(plan, save=save)).trained for seed in range(seeds)])


def agrees(found: np.ndarray, expected: float) -> bool:
    error = found.std(ddof=1) / math.sqrt(len(found))
    return bool(abs(found.mean() - expected) < 3.5 * error and error < 0.02 * expected)


@pytest.mark.parametrize(("mtbf", "every", "save", "restart"), [(200.0, 50, 5.0, 20.0), (120.0, 20, 10.0, 60.0)])
def test_f2_failures_also_during_restart(laptop: Plan, mtbf: float, every: int, save: float, restart: float) -> None:
    """Daly (2006): eta = tau / (M exp(R/M) (exp((tau+C)/M) - 1))."""
    steps = 200 * every
    plan = failing(laptop, mtbf, **{"train.steps": steps, "checkpoint.every": every, "failures.detect": restart})
    eta = every / (mtbf * math.exp(restart / mtbf) * math.expm1((every + save) / mtbf))
    assert agrees(walls(plan, save, 16), steps / eta)


def test_f1_no_failures_while_the_job_waits(laptop: Plan) -> None:
    """eta = lambda tau / ((1 + lambda D) (exp(lambda (tau+C)) - 1)), with D the repair that a job without spares waits for."""
    mtbf, every, save, repair, steps = 200.0, 40, 4.0, 50.0, 12_000
    changes = {"train.steps": steps, "checkpoint.every": every, "failures.repair": repair, "cluster.spares": 0}
    plan = failing(laptop, mtbf, "node", **changes)
    eta = every / mtbf / ((1 + repair / mtbf) * math.expm1((every + save) / mtbf))
    assert agrees(walls(plan, save, 16), steps / eta)


def erlang_b(servers: int, load: float) -> float:
    """Blocking probability by the stable recursion."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked


@pytest.mark.parametrize(("spares", "load"), [(2, 2.0), (6, 4.0)])
def test_f7_spares_stall_the_job_as_erlang_says(laptop: Plan, spares: int, load: float) -> None:
    """A job with S spares stands still for ErlangB(S+1, N r R) of its time."""
    cluster = {"cluster.nodes": 64, "cluster.spares": spares, "failures.repair": 100.0 * load}
    plan = failing(laptop, 1.0, "node", **cluster, **{"train.steps": None, "train.stop_after": 40_000.0})
    plan = plan.but(**{"failures.causes": {"fault": Cause(per="node", rate=1 / 100.0 / 64)}})
    stalls = [told(live(plan, seed, SECOND, speeds(plan))) for seed in range(10)]
    found = np.array([q.get("state.queue", 0.0) / (q["run.wall_clock"] * plan.ranks) for q in stalls])
    assert found.mean() == pytest.approx(erlang_b(spares + 1, load), abs=3.5 * found.std(ddof=1) / math.sqrt(10))


def test_an_undisturbed_run_has_the_ettr_that_a_hand_computes(laptop: Plan) -> None:
    """300 steps of 1 s, 3 evaluations of 4 s, 6 checkpoints of 2 s, 5 s of start: 300 / 329."""
    plan = laptop.but(**{"train.steps": 300, "checkpoint.every": 50, "train.evaluate_every": 100})
    q = told(live(plan, 0, replace(SECOND, evaluate=4.0), speeds(plan, save=2.0, init=5.0)))
    assert q["run.wall_clock"] == pytest.approx(329.0) and q["run.ettr"] == pytest.approx(300 / 329)
    assert q["run.goodput"] == pytest.approx(plan.tokens_per_step / 1e3 * 300 / 329)
    assert q["state.evaluate"] == pytest.approx(12 * plan.ranks) and q["state.checkpoint"] == pytest.approx(12 * plan.ranks)
    assert q["run.interruptions"] == 0 and "state.replay" not in q


def test_the_last_step_before_the_deadline_is_whole(laptop: Plan) -> None:
    plan = laptop.but(**{"train.steps": None, "train.stop_after": 100.5, "checkpoint.every": 0})
    life = live(plan, 0, SECOND, speeds(plan, save=2.0, init=10.0))
    assert life.steps == 91 and life.trained == pytest.approx(103.0)


# -- the story


def test_the_whole_log_of_a_small_disaster(laptop: Plan) -> None:
    """Two servers and one spare: the second fault finds no spare, the third strikes on the way up."""
    plan = failing(laptop, 1e9, "node", **{"cluster.nodes": 2, "cluster.spares": 1, "train.steps": 30, "checkpoint.every": 10})
    plan = plan.but(**{"failures.detect": 3.0, "failures.diagnose": 2.0, "failures.reallocate": 1.0, "failures.repair": 60.0})
    plan = plan.but(**{"failures.causes": plan.failures.causes | {"software": Cause(per="job", rate=1e-9)}})
    world = World(plan, speeds(plan, save=1.0, load=4.0, init=5.0))
    storm = [Fault(20.0, "fault", 1), Fault(50.0, "fault", 0), Fault(52.0, "fault", 0), Fault(88.0, "software", 0)]
    job = Pretraining(world, SECOND, iter(storm))
    world.env.run(until=world.env.process(job.run()))
    assert [(h.at, h.event, h.step) for h in world.timeline.happenings] == [
        (0.0, "start", None),
        (16.0, "checkpoint", 10),
        (20.0, "failure", 14),  # server 1: spare 2 steps in
        (23.0, "detection", 10),
        (26.0, "replacement", 10),
        (35.0, "restart", 10),
        (46.0, "checkpoint", 20),
        (50.0, "failure", 24),  # server 0: no spare is left; the fault at 52 hits the empty slot
        (53.0, "detection", 20),
        (80.0, "repaired", None),  # server 1 is a spare now
        (81.0, "replacement", 20),
        (88.0, "failure", 20),  # while loading; no server is lost
        (91.0, "detection", 20),
        (102.0, "restart", 20),
        (110.0, "repaired", None),
        (113.0, "checkpoint", 30),
        (113.0, "end", 30),
    ]
    assert [dict(h.detail) for h in world.timeline.happenings if h.event == "replacement"] == [
        {"server": 1, "spare": 2},
        {"server": 0, "spare": 1},
    ]
    seconds = {state: s / plan.ranks for state, s in world.timeline.states().items()}
    assert seconds["replay"] == pytest.approx(4.0 + 4.0) and seconds["queue"] == 25.0
    assert sum(seconds[s] for s in SECOND.mix) == pytest.approx(30.0)
    assert job.falls == {"fault": 2, "software": 1}


def test_a_planned_stop_needs_no_detective(laptop: Plan) -> None:
    plan = failing(laptop, 100.0, **{"failures.detect": 5.0, "failures.diagnose": 5.0})
    plan = plan.but(**{"failures.causes": {"firmware": Cause(per="job", rate=0.01, planned=True)}})
    q = told(live(plan, 1, SECOND, speeds(plan)))
    assert q["run.interruptions"] > 0 == q["run.interruptions_unexpected"] and "state.detect" not in q


def test_one_seed_is_one_weather_under_every_policy(llama: Plan) -> None:
    often, seldom = (live(llama.but(**{"checkpoint.every": every}), 5) for every in (20, 500))
    hits = [[(h.at, h.detail["cause"]) for h in life.timeline.happenings if h.event == "failure"] for life in (often, seldom)]
    first, second = (hit[: min(map(len, hits))] for hit in hits)
    assert len(first) > 300 and first == second and often.steps != seldom.steps
    assert list(islice(faults(llama, 5), 9)) == list(islice(faults(llama.but(**{"train.seq_len": 4096}), 5), 9))
    assert list(islice(faults(llama, 5), 9)) != list(islice(faults(llama, 6), 9))


def test_a_hopeless_run_is_refused(laptop: Plan) -> None:
    plan = failing(laptop, 5.0, **{"train.steps": 300, "checkpoint.every": 0})
    with pytest.raises(Refused, match=r"checkpoint\.every=0: 10,000 failures"):
        live(plan, 0, SECOND, speeds(plan))


def test_the_data_stages_by_hand(tmp_path) -> None:
    """Shards of 6 and 3 MB on two workers: the longer one decides."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x" * 3_000_000)
    plan = load([f"data.path={tmp_path}", "data.duplicates=0.1", "train.evaluate_sequences=0"])
    life = live(plan, 0, SECOND, replace(rates(plan), extract_rate=3e6, dedup_rate=6e6, train_rate=1e6, encode_rate=1e6))
    q = told(life)
    assert (q["extract.seconds"], q["dedup.seconds"]) == (2.0, 1.0)
    assert q["tokens.seconds"] == pytest.approx(4e6 / 2e6 + 5.4)  # the sample on two cores, then the shard
    assert q["extract.documents_per_s"] == 1.5 and q["dedup.documents"] == pytest.approx(2.7)
    assert q["tokens.tokens"] == pytest.approx(8.1e6 / plan.tokenizer.bytes_per_token)
    assert q["state.data"] == pytest.approx(plan.ranks * 10.4) and q["run.wall_clock"] == pytest.approx(
        rates(plan).workers + 10.4 + life.trained
    )


# -- energy and carbon


@pytest.mark.parametrize(("start", "days"), [("2024-03-01T00:00", 54), ("2026-11-20T17:20", 400)])
def test_carbon_is_the_sum_over_hours(llama: Plan, start: str, days: int) -> None:
    draw = np.random.default_rng(days)
    stops = np.concatenate([[0.0], np.sort(draw.uniform(0, days * 86400, 200))])
    watts = draw.uniform(1e6, 2e7, 200)
    profile = np.array(llama.grid.profile)
    grams, epoch = 0.0, np.datetime64(start, "s")
    for begin, end, power in zip(stops[:-1], stops[1:], watts, strict=True):
        at = begin
        while at < end:
            moment = epoch + np.timedelta64(int(at), "s")
            into = (moment - moment.astype("datetime64[h]")) / np.timedelta64(1, "s") + at % 1
            until = min(end, at + HOUR - into)
            month, hour = moment.astype("datetime64[M]").astype(int) % 12, moment.astype("datetime64[h]").astype(int) % 24
            grams += power * (until - at) * llama.grid.intensity * profile[month, hour]
            at = until
    assert carbon(llama.grid, start, stops, watts) == pytest.approx(grams, rel=1e-9)


# -- the published run, and the command


def test_llama_3_is_interrupted_as_often_as_its_paper_says(llama: Plan) -> None:
    """466 interruptions in 54 days (table 5): the mean of five seeds lies in the 95% band of 5 × 466 Poisson events."""
    assert llama.failures.causes.keys() >= {"gpu", "planned"}
    lives = [told(live(llama, seed, pace(llama), rates(llama))) for seed in range(5)]
    assert abs(sum(q["run.interruptions"] for q in lives) - 5 * 466) < 1.96 * math.sqrt(5 * 466)
    assert abs(sum(q["run.interruptions_unexpected"] for q in lives) - 5 * 419) < 1.96 * math.sqrt(5 * 419)
    for q in lives:
        assert 54 * 86400 <= q["run.wall_clock"] < 54 * 86400 + 2 * HOUR
        assert q["run.carbon_location"] / q["run.energy"] == pytest.approx(llama.grid.intensity, rel=0.1)
        assert q["pretrain.final_loss"] == pytest.approx(1.9, abs=0.05)


def test_replicas_become_a_band(laptop: Plan) -> None:
    plan = failing(laptop, 80.0, **{"checkpoint.every": 20})
    lives = [summary(live(plan, seed, SECOND, speeds(plan))) for seed in range(9)]
    band = spread(lives)["run.wall_clock"]
    times = sorted(life["run.wall_clock"].value for life in lives)
    assert band.value == times[4] and times[0] < band.low < band.value < band.high < times[-1]


def test_the_command_prints_json_and_leaves_a_record(tmp_path, capsys) -> None:
    words = ["sim", "json=true", "replicas=3", f"runs={tmp_path}", "data.path=null", "data.tokens=1000000", "failures=llama3"]
    assert main([*words, "cluster.nodes=0"]) == 2
    assert "cluster.nodes=0 must be above 0" in capsys.readouterr().err
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    folder = tmp_path / said["plan"] / "sim"
    assert said == json.loads((folder / "summary.json").read_text()) and said["program"] == "sim"
    assert all(name.split(".")[1] in QUANTITIES for name in said["quantities"])
    assert {p.name for p in folder.iterdir()} == {
        "plan.yaml",
        "ledger.parquet",
        "events.parquet",
        "trace.json",
        "power.csv",
        "summary.json",
    }


def test_the_command_speaks_to_a_person(tmp_path, capsys) -> None:
    assert main(["sim", f"runs={tmp_path}", "experiment=llama3_405b", "gpu.memory=1 GB"]) == 0
    said = capsys.readouterr()
    assert "16,384 × h100-sxm" in said.out and "where the time goes" in said.out
    assert said.out.endswith("foretold real experiment=llama3_405b 'gpu.memory=1 GB'\n") and "does not fit: needs" in said.err
    assert main(["sim", "--help"]) == 0 and "replicas" in capsys.readouterr().out
    assert main(["sim", "--help", "cluster"]) == 0 and "cluster.spares" in capsys.readouterr().out
    assert main(["sim", "replicas=0"]) == 2 and "replicas=0" in capsys.readouterr().err


def test_the_error_of_the_step_model_reaches_every_quantity_that_it_moves():
    plan = load(["experiment=llama3_405b"])
    step = pace(plan)
    told = summary(live(plan, plan.seed, step))
    bands = banded(plan, step, told)
    width = math.exp(1.2816 * step.error)
    step_time, tokens, memory = (bands[name] for name in ("pretrain.step_time", "run.tokens", "pretrain.peak_memory"))
    assert step_time == pytest.approx((step.step_time, step.step_time / width, step.step_time * width))
    assert tokens.high / tokens.value == pytest.approx(width, rel=0.05)  # 54 days hold fewer of longer steps
    assert memory.low is None and bands["run.cost"].low == told["run.cost"].low  # the days are given, and so is their price
    fixed = plan.but(train=plan.train.but(steps=100_000, stop_after=None))
    wall = banded(fixed, step, summary(live(fixed, plan.seed, step)))["run.wall_clock"]
    assert wall.high / wall.value == pytest.approx(width, rel=0.05)
    assert banded(plan, replace(step, error=0.0), told) == told


def test_lives_spread_over_the_step_models_error():
    plan = load(["experiment=llama3_405b"])
    error = pace(plan).error
    factors = np.log(uncertain(plan, 1001, error)) / error
    assert np.mean(factors) == pytest.approx(0, abs=1e-9) and np.std(factors) == pytest.approx(1, rel=0.01)
    assert np.quantile(factors, 0.9) == pytest.approx(1.2816, rel=0.01)
    assert abs(np.corrcoef(factors, np.arange(1001))[0, 1]) < 0.1 and uncertain(plan, 0, error) == []
