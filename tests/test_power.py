"""Power, grid and money: what the meter shows, what the hours cost the air, and what the bill says."""

import json
import math
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest

from analysis import caps, nodes
from analysis.figures import figures
from analysis.pair import open_pair
from conf.errors import Refused
from conf.plan import Limit, Plan
from conf.program import load
from conf.units import read
from sim.feed import feed_of
from sim.grid import best_pauses, best_start, carbon, full_hour, intensities
from sim.kernels import capped, rates
from sim.life import History, live
from sim.load import ramp, swing
from sim.pace import Pace, pace
from sim.power import DRAWS, Meter
from sim.story import tell
from sim.summary import summary
from tests.conftest import SHARED

HOUR = 3600.0
SECOND = Pace(1.0, {"compute": 0.7, "communication": 0.1, "bubble": 0.1, "optimizer": 0.1}, 0.0, 1e9, 0.4, 1e3)


@pytest.fixture(scope="module")
def llama() -> Plan:
    return load(["experiment=llama3_405b"])


@pytest.fixture(scope="module")
def laptop() -> Plan:
    return load(["data.path=null", "data.tokens=1000000", "train.evaluate_sequences=0", "checkpoint.every=0"])


def told(history: History) -> dict[str, float]:
    return {name: value.value for name, value in summary(history).items()}


def limited(plan: Plan, **limits: Limit) -> Plan:
    return plan.but(**{"power.limits": limits})


# -- the meter


def test_every_state_draws_what_its_work_draws(llama: Plan) -> None:
    meter = Meter(llama, {"compute": 0.5, "communication": 0.5}, arithmetic=0.8, stalled=0.1)
    power = llama.power
    assert meter.share("compute") == pytest.approx(0.8 * power.compute + 0.1 * power.memory + 0.1 * power.bubble)
    assert meter.share("evaluate") == meter.share("compute") and meter.share("optimizer") == power.memory
    assert meter.share("detect") == power.hang and meter.share("queue") == meter.share("paused") == 0
    assert meter.table["replay"] == pytest.approx((meter.table["compute"] + meter.table["communication"]) / 2)
    assert all(meter.table[state] == pytest.approx(sum(parts)) for state, parts in meter.parts.items())


def test_the_limit_of_a_device_holds_for_the_mean_of_its_kernels(llama: Plan) -> None:
    hot = llama.but(**{"power.compute": 1.2})
    assert Meter(hot, {}, arithmetic=1.0).device("compute") == 700
    assert Meter(hot, {}, arithmetic=0.5).device("compute") == pytest.approx(100 + 600 * (0.5 * 1.2 + 0.5 * hot.power.memory))


def test_hosts_follow_their_devices_and_the_building_its_load(llama: Plan) -> None:
    plan = llama.but(**{"power.pue": 1.05, "power.pue_fixed": 0.1, "cluster.spares": 0, "power.network": 0.0, "power.storage": 5e4})
    meter = Meter(plan, {})
    half = dict(zip(DRAWS, meter._parts(400.0), strict=True))
    assert half["hosts"] == pytest.approx(plan.cluster.nodes * (plan.power.host + plan.power.host_idle) / 2)
    assert half["network"] == 5e4 and half["spares"] == 0
    servers, most = sum(half.values()) - half["overhead"], plan.ranks * 700 + plan.cluster.nodes * plan.power.host + 5e4
    assert sum(half.values()) / servers == pytest.approx(1.05 + 0.1 / (servers / most))  # PUE = a + b / load
    assert meter._parts(meter.cap_for(12e6)).sum() == pytest.approx(12e6)


def test_phases_of_the_step_decide_the_draw() -> None:
    """Small products and much traffic draw less than large ones; the parts of compute fill it."""
    for words in (["experiment=llama3_405b"], ["experiment=gpt3_175b"], ["experiment=deepseek_v3"], []):
        step = pace(load(words))
        assert 0 < step.arithmetic <= 1 and 0 <= step.stalled < 1 and step.arithmetic + step.stalled <= 1 + 1e-9
    few = ["train.warmup=1", "checkpoint.every=0"]
    wide, narrow = (pace(load(["experiment=llama3_8b", f"train.seq_len={s}", "train.steps=9", *few])) for s in (8192, 256))
    assert narrow.stalled > 0.1 and wide.stalled < 0.01  # blocks of few tokens wait for the host


# -- limits, caps and pauses


def test_a_limit_is_kept_and_costs_what_the_cap_costs(llama: Plan) -> None:
    plan = limited(llama, evening=Limit(start=10 * 86400.0, length=12 * HOUR, most=14e6, answer="cap"))
    free, life = live(llama), live(plan)
    (stretch,) = life.feed.stretches
    watts = life.meter.draw(life.timeline)
    inside = [w for w, s in zip(watts, life.timeline.segments, strict=True) if stretch.start <= s.start < stretch.stop]
    assert stretch.meter is not None and stretch.meter.peak(life.pace.mix) == pytest.approx(14e6)
    assert 0.7 < stretch.speed < 1 and max(inside) <= 14e6 < max(watts)
    lost = (1 - stretch.speed) * 12 * HOUR  # of steps, but for those that faults take anyway
    assert (free.steps - life.steps) * life.pace.stride == pytest.approx(lost, rel=0.6)
    assert told(life)["run.wall_clock"] == pytest.approx(54 * 86400, rel=1e-4)
    loose = limited(llama, evening=Limit(start=0.0, length=HOUR, most=30e6))
    assert feed_of(loose, life.pace, life.meter).stretches == []


def test_fewer_groups_work_where_the_limit_feeds_no_more(llama: Plan) -> None:
    plan = limited(llama, night=Limit(start=86400.0, length=86400.0, most=12e6, answer="shrink")).but(**{"train.stop_after": 3 * 86400.0})
    free, life = live(plan.but(**{"power.limits": {}})), live(plan)
    works = next(s for s in life.feed.stretches if s.share < 1)
    assert works.share * 128 == 64  # groups, of 128, that divide the batch and take less than 12 MW
    assert works.speed == pytest.approx(pace(plan).step_time / pace(plan.but(**{"mesh.dp_shard": 64, "cluster.nodes": 1024})).step_time)
    watts = life.meter.draw(life.timeline)
    assert max(w for w, s in zip(watts, life.timeline.segments, strict=True) if works.start <= s.start < works.stop) < 12e6
    idle = life.timeline.states()["idle"] / plan.ranks
    assert idle == pytest.approx((1 - works.share) * (works.stop - works.start), rel=1e-6)
    assert free.steps > life.steps > 0.75 * free.steps
    with pytest.raises(Refused, match=r"power\.limits\.night\.answer=shrink: no legal mesh has at most"):
        live(plan.but(**{"train.global_batch": 2048, "power.limits": {"night": Limit(start=0.0, length=9.0, most=5.7e6, answer="shrink")}}))


def test_a_pause_saves_first_and_comes_back_after(laptop: Plan) -> None:
    """500 steps of a second: a pause of 100 s from 200 s on, with 2 s to save, 3 s to start and 4 s to load."""
    plan = limited(laptop.but(**{"train.steps": 500}), storm=Limit(start=200.0, length=100.0, most=1e3, answer="pause"))
    size = 12 * summary(live(laptop.but(**{"train.steps": 1}), 0, SECOND))["pretrain.parameters"].value
    speed = replace(rates(plan), storage_write=size / 2, storage_read=size / 4, init=3.0)
    life = live(plan, 0, SECOND, speed)
    states = {state: seconds / plan.ranks for state, seconds in life.timeline.states().items()}
    assert states["paused"] == 100 and states["init"] == 3 + 3 and states["load"] == 4 and states["checkpoint"] == 2 + 2
    assert life.timeline.until == pytest.approx(3 + 500 + 2 + 100 + 2 + 3 + 4) and life.steps == 500
    assert [(h.at, h.event) for h in life.timeline.happenings] == [
        (0.0, "start"),
        (0.0, "start"),
        (200.0, "pause"),
        (614.0, "checkpoint"),
        (614.0, "end"),
        (614.0, "end"),
    ]
    assert all(one.stop == other.start for one, other in pairwise(life.timeline.segments))


@pytest.mark.parametrize("seed", range(8))
def test_joules_and_dollars_add_up_in_every_run(llama: Plan, seed: int) -> None:
    draw = np.random.default_rng(seed)
    plan = llama.but(**{
        "train.stop_after": 5 * 86400.0, "power.pue_fixed": float(draw.uniform(0, 0.2)), "power.storage": 1e5,
        "price.owned": bool(seed % 2), "price.capex": {"h100-sxm": 3e4},
        "price.hours": [float(x) for x in draw.uniform(0.5, 1.5, 24)], "price.taken": 1e12,
        "price.storage.mid": 1e-14, "price.storage.high": 2e-14, "price.egress.high": 1e-10, "grid.market": 1e-5,
        "power.limits": {"a": Limit(start=float(draw.uniform(0, 1e5)), length=5e4, most=float(draw.uniform(11e6, 16e6))),
                         "b": Limit(start=2e5, length=float(draw.uniform(1e3, 1e5)), most=9e6, answer="pause")},
    })  # fmt: skip
    life = live(plan, seed)
    q, foot = told(life), life.footprint
    parts = [q[f"run.energy_{name}"] for name in DRAWS]
    assert math.fsum(parts) == pytest.approx(q["run.energy"], rel=1e-9) == math.fsum(foot.energy_in.values())
    assert math.fsum(q.get(f"run.cost_{item}", 0.0) for item in foot.bill._fields) == pytest.approx(q["run.cost"], rel=1e-9)
    stops = np.array([0.0, *(s.stop for s in life.timeline.segments)])
    assert life.meter.draw(life.timeline) @ np.diff(stops) == pytest.approx(q["run.energy"], rel=1e-9)
    assert q["run.energy_steps"] < q["run.energy"] and q["run.carbon_market"] == pytest.approx(1e-5 * q["run.energy"])
    assert sum(life.timeline.states().values()) == pytest.approx(plan.ranks * q["run.wall_clock"], rel=1e-9)


def test_without_limits_the_life_is_untouched_and_with_them_the_same_faults_strike(llama: Plan) -> None:
    life = live(llama, 3)
    assert life.feed.stretches == () and life.feed.told(life.timeline, life.pace) is life.timeline
    plan = limited(llama, storm=Limit(start=10 * 86400.0, length=86400.0, most=1e7, answer="pause"))
    late = live(plan, 3)
    hits, later = ([(h.at, h.detail["cause"]) for h in x.timeline.happenings if h.event == "failure"] for x in (life, late))
    before = [hit for hit in hits if hit[0] < 10 * 86400 - 60]
    assert later[: len(before)] == before and len(before) > 60
    assert [cause for _, cause in later] == [cause for _, cause in hits][: len(later)]


# -- the load on the grid


def test_the_ramp_is_between_seconds_and_the_swing_is_that_of_fourier() -> None:
    assert ramp(np.array([0.0, 5.0, 9.0]), np.array([3e6, 1e6])) == 2e6
    assert ramp(np.array([0.0, 0.5]), np.array([1.0])) == 0
    table = {"compute": 9.0, "communication": 5.0, "bubble": 2.0}
    mix = {"compute": 0.6, "communication": 0.3, "bubble": 0.1}
    wave = np.repeat(list(table.values()), [6000, 3000, 1000])
    assert swing(table, mix) == pytest.approx(2 * abs(np.fft.rfft(wave)[1]) / len(wave), rel=1e-3)


def test_the_file_of_power_holds_the_energy_and_the_hours(llama: Plan, tmp_path) -> None:
    life = live(llama.but(**{"train.stop_after": 3 * 86400.0}), 1)
    tell(life, tmp_path)
    rows = pd.read_csv(tmp_path / "power.csv")
    joules = (rows.power[:-1] * np.diff(rows["at"])).sum()
    assert joules == pytest.approx(life.footprint.energy, rel=1e-9)
    grams = (rows.power[:-1] * np.diff(rows["at"]) * rows.intensity[:-1] / 3.6e6).sum()
    assert grams == pytest.approx(life.footprint.carbon_location, rel=1e-5)  # six digits of the intensity are written
    q = told(life)
    assert q["run.swing_frequency"] == 1 / life.pace.step_time and q["run.peak_to_mean"] > 1
    assert 0 < q["run.ramp"] <= q["run.peak_power"] and 0 < q["run.swing"] < q["run.peak_power"]


def test_the_report_draws_power_limits_and_the_grids_hours(tmp_path, foretold) -> None:
    limits = "power.limits={evening: {start: 10 h, length: 4 h, most: 14 MW}}"
    words = ["sim", f"runs={tmp_path / 'runs'}", "experiment=llama3_405b", "train.stop_after=2 d", "grid=us_caiso", limits]
    assert foretold(*words)[0] == 0
    shown = {figure.title: figure for figure in figures(open_pair(str(tmp_path / "runs"), ""))}
    assert "us_caiso, 2022" in shown["How dirty the grid is"].caption and "<svg" in shown["How dirty the grid is"].svg
    assert "How much power it draws" in shown and "cap: 1 predicted" in shown["What happens when"].caption


# -- the grid


def hourly(path, year: int, count: int = 8760, drop: tuple[int, ...] = ()):
    hours = np.datetime64(f"{year}-01-01T00", "h") + np.arange(count)
    lines = [f"{hour},{100 + index % 24}" for index, hour in enumerate(hours) if index not in drop]
    path.write_text("\n".join(["time,HERE", *lines]) + "\n")
    return path


def test_hours_of_a_file_are_those_of_the_run(tmp_path) -> None:
    path = hourly(tmp_path / "a.csv", 2022)
    plan = load([f"grid.hourly={path}", "grid.year=2022", "start=2024-02-29T22:30"])
    found = intensities(plan.grid, full_hour(plan.start)[0], 5) * 3.6e6
    assert found == pytest.approx([122, 123, 100, 101, 102])  # 22 h, 23 h of a 29th of February that 2022 lacks, then March
    assert carbon(plan.grid, plan.start, np.array([0.0, HOUR]), np.array([1e3])) * 3.6e6 == pytest.approx(1e3 * HOUR * 122.5)
    again = load([f"grid.hourly={path}", "grid.year=2022", "start=2024-02-29T22:30"]).id
    path.write_text(path.read_text().replace(",100\n", ",300\n"))
    assert load([f"grid.hourly={path}", "grid.year=2022", "start=2024-02-29T22:30"]).id != again  # the content is part of the plan


def test_gaps_are_filled_only_when_asked_and_the_table_says_so(tmp_path, foretold) -> None:
    path = hourly(tmp_path / "a.csv", 2022, drop=(5, 6))
    words = ["sim", "data.path=null", "data.tokens=1000", f"grid.hourly={path}", "grid.year=2022"]
    status, _, error = foretold(*words)
    assert status == 2 and "lacks 2 of the 8,760 hours of 2022, the first at 2022-01-01T05:00" in error and "grid.fill=true" in error
    status, out, _ = foretold(*words, "grid.fill=true")
    assert status == 0 and "hourly from a.csv, 2 missing hours interpolated" in out and "prices                 of 2026-06-01" in out


def test_the_best_start_and_the_best_pauses_are_the_best_of_all() -> None:
    for seed in range(20):
        hours = np.random.default_rng(seed).uniform(10, 500, 9)
        start, pauses = best_start(hours, 4), best_pauses(hours, 4)
        assert hours[start.delay : start.delay + 4].sum() == min(hours[i : i + 4].sum() for i in range(6))
        worked = [hour for hour in range(pauses.delay, 9) if hour - pauses.delay not in pauses.paused][:4]
        assert hours[worked].sum() == pytest.approx(min(sum(choice) for choice in combinations(hours, 4)))
        assert pauses.saved == pytest.approx(1 - hours[worked].sum() / hours[:4].sum()) and pauses.saved >= start.saved


@pytest.mark.skipif(not (SHARED / "data" / "carbon").exists(), reason="the hourly data are not here")
def test_what_waiting_can_save_at_most() -> None:
    """Perfect foresight over 2022, runs of 30 days, the mean over a start every week; the notes' measured bounds (percent)."""
    frame = pd.read_csv(SHARED / "data" / "carbon" / "us_2022_hourly_gco2_per_kwh.csv").drop(columns="timestamp_utc").interpolate().bfill()
    bounds = {"CISO": (4.2, 8.7, 15.0, 23.2), "ERCO": (3.1, 6.4, 10.5, 15.6), "PJM": (1.0, 2.2, 3.7, 6.1), "SOCO": (1.0, 1.9, 3.0, 4.5)}
    for region, published in bounds.items():
        hours = frame[region].to_numpy()
        for slack, percent in zip((0.1, 0.25, 0.5, 1.0), published, strict=True):
            window = int(720 * (1 + slack))
            saved = [best_pauses(hours[at : at + window], 720).saved for at in range(0, len(hours) - window + 1, 168)]
            assert 100 * np.mean(saved) == pytest.approx(percent, abs=0.3), (region, slack)


def test_a_run_starts_later_or_pauses_for_a_cleaner_grid() -> None:
    california = load(["experiment=llama3_405b", "grid=us_caiso", "train.stop_after=20 d", "start=2024-12-20"])
    intensity = {}
    for shift in ("none", "start", "pause"):
        life = live(california.but(**{"grid.deadline": "2025-01-14", "grid.shift": shift}))
        q = told(life)
        intensity[shift] = q["run.carbon_location"] / q["run.energy"]
        assert q["run.wall_clock"] < 25.1 * 86400
        if shift == "start":
            assert 1 - intensity["start"] / intensity["none"] == pytest.approx(q["run.carbon_saved"], abs=0.005)
            assert 0 < q["run.delay"] <= 5 * 86400
    assert life.timeline.states()["paused"] > 0 and life.steps * life.pace.stride == pytest.approx(20 * 86400, rel=0.15)
    share = life.timeline.states()["paused"] / (life.plan.ranks * life.timeline.until)
    assert q["run.cost_paused"] == pytest.approx(share * q["run.cost_devices"]) and q["run.energy_paused"] > 0
    assert intensity["pause"] < intensity["start"] < intensity["none"]


# -- money


def test_owned_devices_cost_their_wear_and_their_electricity(laptop: Plan) -> None:
    plan = laptop.but(**{"train.steps": 7000, "price.owned": True, "price.capex": {"cpu-core": 100.0}, "price.lifetime": 1e8})
    day = [0.0] * 24
    day[0], day[1] = 2.0, 1.0
    life = live(
        plan.but(**{"price.hours": day, "start": "2026-01-01T00:00"}), 0, SECOND, replace(rates(plan), init=0.0, storage_write=math.inf)
    )
    q, power = told(life), life.meter.watts(SECOND.mix)
    assert q["run.cost_devices"] == pytest.approx(100 * plan.ranks * 7000 / 1e8)
    assert q["run.cost_electricity"] == pytest.approx(power * (2 * 3600 + 3400) * plan.price.tariff.mid)
    assert q["run.cost"] == pytest.approx(q["run.cost_devices"] + q["run.cost_electricity"] + q["run.cost_storage"])


def test_stored_and_taken_bytes_are_paid(laptop: Plan) -> None:
    plan = laptop.but(**{"price.storage.mid": read("0.02 USD/GB/month", "USD/B/s"), "price.storage.high": 1.0, "price.taken": 1e9,
                         "price.egress.mid": read("0.09 USD/GB", "USD/B"), "price.egress.high": 1.0})  # fmt: skip
    life = live(plan, 0, SECOND)
    kept = plan.checkpoint.keep * told(life)["pretrain.checkpoint_bytes"] + 4 * 1e6
    months = told(life)["run.wall_clock"] / (365.25 / 12 * 86400)
    assert life.footprint.bill.storage[0] == pytest.approx(kept / 1e9 * 0.02 * months)
    assert life.footprint.bill.egress[0] == pytest.approx(0.09)


# -- published tables


def test_servers_of_the_benchmark_draw_what_was_measured(foretold, tmp_path) -> None:
    status, out, _ = foretold("analysis", "published", "table=node_power", "json=true", f"out={tmp_path / 'o.csv'}")
    found, rows = json.loads(out), pd.read_csv(tmp_path / "o.csv")
    assert status == 0 and found["predicted"] == found["rows"] == 8 and found["failed"] == []
    assert found["mean_abs_pct"] < 6 and rows.error.abs().max() < 0.08


def test_rows_of_servers_that_no_plan_can_say_have_their_reason(foretold, tmp_path) -> None:
    row = {"submitter": "x", "system": "8x8 H100", "workload": "llama2-70B LoRA", "nodes": 8, nodes.MEASURED: 6000}
    rows = [row, row | {"system": "8x8 Abacus"}, row | {"workload": "chess"}, row | {"system": "H100"}, row | {nodes.MEASURED: None}]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    found = json.loads(foretold("analysis", "published", f"table={tmp_path / 't.csv'}", "json=true")[1])
    reasons = {entry["id"]: entry["reason"] for entry in found["failed"]}
    assert found["predicted"] == 1 and reasons.keys() == {"2", "3", "4", "5"}
    assert "is not in conf/gpu" in reasons["2"] and "no model of conf/model" in reasons["3"] and "does not say how many" in reasons["4"]


def test_more_traffic_draws_less_and_the_dc_side_sees_less() -> None:
    row = {"submitter": "", "system": "8x8 H100", "workload": "llama2-70B LoRA", "nodes": 8}
    one, many = (nodes.node(row | {"nodes": n, "system": f"{n}x8 H100"})[0] for n in (1, 64))
    assert many < one - 500
    assert nodes.node(row | {"system": "8x8 H100 DC"})[0] == pytest.approx(nodes.RECTIFIER * nodes.node(row)[0])
    assert nodes.node(row | {"system": "8x8 H100 immersion"})[0] < nodes.node(row)[0] - 500


def test_claims_multiply_and_one_contradicts_itself(foretold, tmp_path) -> None:
    status, out, _ = foretold("analysis", "published", "table=energy", "json=true", f"out={tmp_path / 'o.csv'}")
    found, rows = json.loads(out), pd.read_csv(tmp_path / "o.csv").set_index("id")
    assert status == 0 and found["rows"] == 44
    assert found["by_kind"]["given hours"]["mean_abs_pct"] < 1 and found["by_kind"]["from the plan"]["mean_abs_pct"] < 10
    wrong = [entry for entry in found["failed"] if "contradicts itself" in entry["reason"]]
    assert [entry["id"] for entry in wrong] == ["30 tco2e"] and "161 times off the 12.9 printed" in wrong[0]["reason"]
    assert rows.predicted["5 energy_mwh"] == pytest.approx(3.552e6 * 330 * 1.1 / 1e6)  # after PUE
    assert rows.predicted["33 energy_mwh"] == pytest.approx(3768320 * 283 / 1e6)  # Gopher's, before PUE
    assert rows.predicted["33 tco2e"] == pytest.approx(3768320 * 283 * 1.08 * 330 / 1e9)
    assert rows.predicted["38 tco2e"] == pytest.approx(131 * 1.2 * 332 / 1e3)  # from the energy printed, without hours


def test_anybody_can_check_a_claim(foretold) -> None:
    status, out, _ = foretold("analysis", "check", "hours=7e6", "power=700", "tco2e=12.9")
    assert status == 1 and "contradicts every grid: 2.63 gCO2e/kWh is not between" in out
    status, out, _ = foretold("analysis", "check", "hours=7e6", "power=700", "pue=1.1", "intensity=385", "energy=5390", "tco2e=2040")
    assert status == 0 and "consistent" in out and "2,075" in out
    status, out, _ = foretold("analysis", "check", "hours=7e6", "power=700", "energy=49")
    assert status == 1 and "contradicts itself: 7,000,000 h × 700 W make energy_mwh=4,900, 100 times off the 49 printed" in out
    for words, said in (
        (["hours=7"], "needs hours=… and power=…"),
        (["hours=many"], "hours=many is no number"),
        (["power=-1"], "negative"),
    ):
        status, _, error = foretold("analysis", "check", *words)
        assert status == 2 and said in error and len(error.strip().splitlines()) == 1


@pytest.mark.skipif(not (SHARED / "data" / "power").exists(), reason="the traces of power caps are not here")
def test_the_law_of_caps_on_measured_curves(foretold, tmp_path) -> None:
    tables = ",".join(str(SHARED / "data" / "power" / f"summary_power_{gpu}.csv") for gpu in ("v100", "a40", "rtx6000", "p100"))
    status, out, _ = foretold("analysis", "caps", f"tables={tables}", f"out={tmp_path / 'o.csv'}")
    found = pd.read_csv(tmp_path / "o.csv").set_index("gpu")
    assert status == 0 and "all together: static 0.32 of the limit, exponent 3.21" in out
    assert (found.curve < 5).all() and (found.workload_left_out < 8).all()
    assert (found.drop("a40").error < 5).all() and found.error["a40"] < 7.5  # asked: 5
    assert (found.gpu_left_out < 15).all() and (found.drop("a40").gpu_left_out < 6).all()
    v100 = load(["gpu=v100_sxm", "train.precision=fp32"]).gpu
    assert (v100.cap_static, v100.cap_exponent) == pytest.approx((found.static["v100"], found.exponent["v100"]), rel=0.02)


def test_a_law_is_found_again(tmp_path, foretold) -> None:
    rows = []
    for natural in (180.0, 220.0, 250.0):
        for cap in (100, 150, 200, 250):
            rate = float(capped(cap, natural, 0.2 * 250, 2.5))
            rows.append((f"net{natural}", 8, cap, 1 / rate, min(cap, natural)))
    pd.DataFrame(rows, columns=list(caps.NEEDED)).to_csv(tmp_path / "gpu_x.csv", index=False)
    law = caps.fitted(caps.points_of(tmp_path / "gpu_x.csv"))
    assert law == pytest.approx((0.2, 2.5), rel=1e-3)
    for words, said in (([], "needs tables="), (["tables=nowhere.csv"], "is no CSV table")):
        status, _, error = foretold("analysis", "caps", *words)
        assert status == 2 and said in error


# -- bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["~grid.intensity"], "grid.intensity is missing"),
        (["grid=atlantis"], "grid=atlantis is no grid"),
        (["grid.hourly=nowhere.csv"], "grid.hourly=nowhere.csv is no file"),
        (["grid.hourly=FILE", "grid.year=2019"], "is of 2022, but grid.year=2019; set grid.year=2022"),
        (["grid.hourly=FILE", "grid.year=2022", "grid.region=MARS"], "grid.region=MARS is no column of grid.hourly="),
        (["~price.as_of"], "price.as_of is missing"),
        (["price.as_of=recently"], "price.as_of=recently is not a date"),
        (["price.gpu_hours.cpu-core.mid=3"], "'3' has no unit; expected USD/h"),
        (["price.gpu_hours.cpu-core.mid=3 EUR/h"], "unknown unit 'EUR'"),
        (["price.gpu_hours.cpu-core.low=1 USD/h"], "price.gpu_hours.cpu-core must have low ≤ mid ≤ high"),
        (["price.owned=true", "~price.capex.cpu-core"], "price.owned=true needs price.capex.cpu-core"),
        (["price.hours=[1,2]"], "price.hours must hold 24 values"),
        (["grid.shift=pause"], "needs to know until when"),
        (["grid.deadline=2025-01-01"], "is not after start=2026-01-01T00:00"),
        (["grid.deadline=2026-01-01T00:01", "train.steps=100000"], "cannot be met: the run is expected to take"),
        (["power.host_idle=90 W"], "power.host_idle=90 W exceeds power.host=10 W"),
        (["power.limits={a: {start: 1 h, length: 1 h, most: 1 W, answer: cap}}"], "power.limits.a.most=1 W is below"),
        (["power.limits={a: {start: 1 h, length: 1 h, most: 1 W, answer: pause}}"], "what the building draws with its devices idle"),
        (["power.limits={a: {start: 0 h, length: 2 h, most: 1 W}, b: {start: 1 h, length: 1 h, most: 1 W}}"], "limits.b begins before"),
        (["power.cap=1 W"], "power.cap=1 W must lie above"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, foretold) -> None:
    path = hourly(tmp_path / "hours.csv", 2022)
    words = [word.replace("FILE", str(path)) for word in words]
    status, _, error = foretold("sim", "data.path=null", "data.tokens=1000000", *words)
    assert status == 2 and said in error and len(error.strip().splitlines()) == 1, error


def test_a_limit_needs_its_numbers() -> None:
    with pytest.raises(Refused, match=r"power\.limits\.a\.most is missing"):
        load(["power.limits={a: {start: 1 h, length: 1 h}}"])


def test_json_names_every_part(tmp_path, foretold) -> None:
    status, out, _ = foretold("sim", "json=true", "data.path=null", "data.tokens=1000000")
    names = json.loads(out)["quantities"]
    assert status == 0 and {f"run.energy_{name}" for name in DRAWS} <= names.keys()
    assert {"run.energy", "run.carbon_location", "run.carbon_market", "run.carbon_embodied", "run.water", "run.cost"} <= names.keys()


def test_states_that_the_provider_does_not_bill_cost_nothing() -> None:
    plan = load(["experiment=llama3_405b", "train.stop_after=4 d"])
    step = pace(plan)
    all_paid = live(plan, 0, step)
    states = ("detect", "diagnose", "reallocate", "queue")
    some = live(plan.but(price=plan.price.but(unbilled=list(states))), 0, step)
    free = sum(some.timeline.states().get(state, 0.0) for state in states) / 3600 * plan.price.gpu_hours["h100-sxm"].mid
    assert free > 0 and all_paid.footprint.cost[0] - some.footprint.cost[0] == pytest.approx(free, rel=1e-9)
    assert some.footprint.gpu_hours == all_paid.footprint.gpu_hours  # held all the same
    with pytest.raises(Refused, match=r"price\.unbilled: detct is no state of a rank; did you mean detect\?"):
        load(["price.unbilled=[detct]"])
