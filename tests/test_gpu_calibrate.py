"""Calibration of a GPU, as far as a machine without one can show it: what is timed and in which order, and that known numbers come back."""

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from analysis.calibrate import _work, calibrate, table
from analysis.gpu import _served, fit, held_out
from conf.plan import Plan
from conf.profile import Parameter, read_profile
from conf.program import load, to_yaml
from real import gpu, nvml, watts
from real.measure import _alone
from real.products import Task, shapes
from real.stopwatch import Stopwatch
from sim.kernels import KINDS, Device, attention, given, matmul, measured, rates
from sim.parallel import block_work, calls, columns, steps
from sim.power import Meter
from sim.rollout import cached, weights

H200 = ["experiment=h200", "data.path=null", "data.tokens=1000000", "train.compile=true"]
TRUE = {"gemm_efficiency": 0.78, "narrow_efficiency": 0.66, "gemm_depth": 130.0, "gemm_half": 12.0, "gemm_backward": 0.95, "gemm_odd": 0.6,
        "grouped_efficiency": 0.75, "overlap": 0.6, "attention_efficiency": 0.55, "attention_backward": 0.42, "attention_head": 30.0,
        "memory_efficiency": 0.86}  # fmt: skip
DECODE, DECODED, KEYS = 1.3e-3, 4e-4, 0.35
LAUNCH, EVENTS, HOST, TENSOR = 1.8e-6, 2.2e-6, 21e-6, 1.1e-6
WATTS = {"idle": 115.0, "products": 690.0, "copies": 480.0, "spinning": 210.0, "waiting": 190.0, "training": 640.0}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load(H200)


@pytest.fixture(scope="module")
def record(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPU that obeys the formula: every row that an H200 would be asked for, with 3% of noise and one in forty hit by something."""
    folder, dice = tmp_path_factory.mktemp("runs") / plan.id / "measure", np.random.default_rng(3)
    for task in gpu.tasks(plan, torch.device("cuda"), folder):
        noise = np.exp(0.03 * dice.standard_normal()) * (2.0 if dice.random() < 0.025 else 1.0)
        noise = 1.0 if task.op in ("launch", "host", "copy") else noise
        seconds = spent(plan, task) * noise + EVENTS * (task.op not in ("launch", "host", "optimizer", "copy", "decode"))
        gpu.append(folder / gpu.TABLE, gpu.line(plan, task, {"time_us": seconds * 1e6, "cv": 0.01}))
    for phase, drawn in WATTS.items():
        gpu.append(folder / gpu.TABLE, gpu.line(plan, Task("power", phase, "bf16", {}, dict), {"time_us": 3e6, "watts": drawn}))
    (folder / "plan.yaml").write_text(to_yaml(plan))
    return folder


@cache
def true_device(precision: str) -> Device:
    found = {name: Parameter(value, "1") for name, value in TRUE.items()} | {"launch": Parameter(LAUNCH, "s")}
    return Device([given(load([*H200, f"train.precision={precision}"]), found)])


def spent(plan: Plan, task: Task) -> float:
    """Seconds of a task by the simulator's formulas, written down a second time."""
    n, stage = task.shape, task.stage
    device = true_device(task.precision if task.precision == "fp8" else "bf16")
    if task.op == "matmul":
        if stage == "forward":
            return float(device.seconds(matmul(n["m"], n["n"], n["k"], 2, stage))[0])
        both = matmul(n["m"], n["n"], n["k"], 2, "backward")
        one = both.products[0 if stage == "input" else 1]
        return float(device.seconds(replace(both, flops=both.flops / 2, bytes=both.bytes / 2, launches=1, products=(one,)))[0])
    if task.op == "grouped":
        return float(device.seconds(matmul(n["m"], n["n"], n["k"], 2, stage, n["batch"]))[0])
    if task.op == "attention":
        tokens, width = n["batch"] * n["seq"], n["qk_head_dim"]
        best = 1.4 if task.how == "cudnn" else 1.0
        return float(device.seconds(attention(tokens, n["seq"], n["heads"] * width, 2, stage, width))[0]) / best
    memory = TRUE["memory_efficiency"] * plan.gpu.memory_bandwidth
    if task.op == "optimizer":
        return n["m"] * TENSOR + 32 * n["k"] / memory
    if task.op == "copy":
        return 1e-5 + n["bytes"] / {"pinned": 52e9, "pageable": 11e9}[task.how]
    if task.op == "decode":
        one = _served(plan, {name: str(size) for name, size in n.items()})
        read = n["batch"] * n["seq"] * cached(one) / (KEYS * float(device["bandwidth.attention.forward"][0]))
        return DECODE + n["m"] * DECODED + float(weights(one, device, np.array([float(n["batch"])]))[0]) + read
    if task.op == "launch":
        return {"alone": LAUNCH + EVENTS, "queued": LAUNCH, "hosted": 4e-6}[stage]
    if task.op in ("host", "block"):
        model = plan.model.but(layers=1, hidden=n["k"], heads=n["heads"], kv_heads=n["kv_heads"], ffn=n["n"])
        p = columns([plan.but(model=model, **{"train.compile": False, "train.micro_batch": n["batch"], "train.seq_len": n["seq"]})])
        if task.op == "block":
            return 1.05 * sum(float(device.seconds(work)[0]) for work in block_work(p, stage))  # operations in a row cost a little more
        return HOST * float(np.ravel(calls(p, block_work(p, stage)))[0])
    if task.op == "cast":
        return LAUNCH + 6 * n["m"] * n["k"] / memory
    work = _work(f"{task.op}.{stage}", {name: str(size) for name, size in n.items()}, 2.0)
    return work.launches * LAUNCH + work.bytes / (memory * (0.7 if task.op == "quantise" else 1.0))


@pytest.fixture(scope="module")
def calibrated(record: Path) -> tuple[Path, dict[str, Any]]:
    """The profile, and what the command tells."""
    out, text = record.parent / "h200.yaml", io.StringIO()
    with redirect_stdout(text):
        assert calibrate({"runs": str(record.parents[1]), "out": str(out), "json": "true"}) == 0
    return out, json.loads(text.getvalue())


def test_known_numbers_come_back(calibrated, plan: Plan) -> None:
    found, told = read_profile(calibrated[0]).parameters, calibrated[1]
    for name, value in TRUE.items():
        assert 0 < found[name].standard_error < 0.3 * value, name
        assert abs(found[name].value - value) < 3 * found[name].standard_error, (name, found[name], value)
    assert found["launch"].value == pytest.approx(LAUNCH) and found["host_launch"].value == pytest.approx(HOST, rel=1e-6)
    for name, value in {"decode_host": DECODE, "decode_block": DECODED, "decode_keys": KEYS}.items():
        assert abs(found[name].value - value) < 3 * found[name].standard_error < value, (name, found[name])
    assert found["optimizer_tensor"].value == pytest.approx(TENSOR, rel=0.3)
    assert found["quantise.forward.bandwidth"].value == pytest.approx(0.7 * 0.86 * plan.gpu.memory_bandwidth, rel=0.05)
    assert found["snapshot"].value == pytest.approx(11e9, rel=0.01) and found["to_host.pinned"].value == pytest.approx(52e9, rel=0.01)
    assert found["cudnn.attention_efficiency"].value == pytest.approx(1.4 * 0.55, rel=0.05)
    assert found["power.compute"].value == pytest.approx(575 / 585) and found["power.bubble"].value == pytest.approx(75 / 585)
    assert told["error_pct"]["matmul.forward.bf16"] < 4


def test_a_third_of_the_products_is_held_out(calibrated) -> None:
    told = calibrated[1]["held_out"]
    held = {name: score["rows"] for name, score in told.items()}
    assert held["all"] == held["bf16"] + held["fp8"] == held["forward"] + held["input"] + held["weight"] and 150 < held["all"] < 500
    assert (
        1.5 < told["all"]["median"] < 3 and told["all"]["median"] < told["all"]["mean"] < 6
    )  # 3% of noise, and one in forty twice as long
    assert held["block, forward"] == held["block, backward"] == 6 and 2 < told["block, forward"]["median"] < 10
    assert held["odd"] > 10 and held["thin, in no part"] > 20


def test_the_blocks_for_the_tables(calibrated, plan: Plan) -> None:
    blocks = yaml.safe_load(calibrated[0].with_suffix(".gpu.yaml").read_text())
    own, relative = blocks["h200-sxm"], blocks["h100-sxm"]
    assert (
        own["gemm_odd"] == pytest.approx(0.6, rel=0.05) and own["calibrated"]["seq"] == [1024, 65536] and own["calibrated"]["k"][0] == 512
    )
    assert own["eager_attention"] == pytest.approx(1 / 1.4, rel=0.05)  # torch's kernel beside the best
    assert relative["gemm_efficiency"] == own["gemm_efficiency"] and not {"idle_power", "calibrated"} & relative.keys()
    assert blocks["power"]["memory"] == pytest.approx(365 / 585, rel=0.01)
    assert plan.gpu.but(**own).launch == pytest.approx(LAUNCH, rel=0.01) and not {"host_launch", "snapshot"} & own.keys()


def test_a_profile_takes_the_place_of_the_tables_numbers(calibrated, plan: Plan) -> None:
    out, _ = calibrated
    found = read_profile(out).parameters
    told = {compiled: load([*H200, f"profile={out}", f"train.compile={compiled}"]) for compiled in ("true", "false")}
    fused, eager = (rates(told[compiled]) for compiled in ("true", "false"))
    assert fused.units == 132 and fused.host == found["host_launch"].value and fused.snapshot == found["snapshot"].value
    assert fused.rate["attention.forward"] == eager.rate["attention.forward"]  # the trainer's own kernel, compiled or not
    assert fused.rate["matmul.backward"] == pytest.approx(found["gemm_backward"].value * fused.rate["matmul.forward"])
    assert eager.bandwidth["rotary.forward"] == found["rotary.forward.bandwidth"].value
    assert fused.bandwidth["rotary.forward"] == found["memory_efficiency"].value * plan.gpu.memory_bandwidth
    assert told["true"].id != plan.id and measured(plan) is plan
    by = steps([told["true"], plan]).step_time
    assert 0.5 < by[0] / by[1] < 2
    meter, before = Meter(told["true"], {}), Meter(plan, {})
    assert meter.device("detect") == pytest.approx(WATTS["spinning"]) and before.device("detect") > 300


def test_a_first_part_of_the_table_is_a_calibration(record: Path, plan: Plan) -> None:
    rows = table(record / gpu.TABLE)
    part = [row for row in rows if row["op"] == "power"] + rows[: len(rows) // 5]
    parameters, _ = fit(plan, part)
    assert TRUE.keys() <= parameters.keys()
    assert parameters["gemm_efficiency"].value == pytest.approx(0.78, rel=0.05)
    assert held_out(plan, part, parameters)["all"].median < 4
    alone, _ = fit(plan, [row for row in rows if row["op"] == "attention"])
    assert "attention_head" in alone and not {"gemm_efficiency", "launch", "memory_efficiency"} & alone.keys()
    assert fit(plan, []) == ({}, {}) and held_out(plan, [], {}) == {}


def test_the_command_says_it_in_words(record: Path, plan: Plan, tmp_path: Path, foretold) -> None:
    folder = tmp_path / "runs" / plan.id / "measure"
    folder.mkdir(parents=True)
    for name in ("plan.yaml", gpu.TABLE):
        lines = (record / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:200] if name == gpu.TABLE else lines))
    status, text, error = foretold("analysis", "calibrate")
    assert status == 0 and "gemm_efficiency" in text and "error on products that took no part in the fit" in text, error
    assert "blocks for conf/gpu and conf/power: runs/profile.gpu.yaml" in text and (tmp_path / "runs" / "profile.gpu.yaml").is_file()


def test_what_the_form_has_new_changes_nothing_unless_it_is_given(plan: Plan) -> None:
    odd, even = matmul(4096, 4095, 4096, 2, "backward"), matmul(4096, 4096, 4096, 2, "backward")
    plain, slow = (Device([rates(plan.but(**{"gpu.gemm_odd": value}))]) for value in (1.0, 0.5))
    assert plain.seconds(even)[0] == slow.seconds(even)[0] and slow.seconds(odd)[0] > 1.8 * plain.seconds(odd)[0]
    assert [product.odd for product in odd.products] == [True, True]
    tokens = matmul(4095, 4096, 4096, 2, "backward")  # how many tokens there are is no row's length
    assert not any(product.odd for product in tokens.products)
    wide = Device([rates(plan.but(**{"gpu.attention_head": 64.0}))])
    narrow, usual = attention(65536, 4096, 4096, 2, "forward", 64), attention(65536, 4096, 4096, 2, "forward", 128)
    assert float(wide.seconds(narrow)[0] / wide.seconds(usual)[0]) == pytest.approx(2 / 1.5, rel=0.05)
    assert float(Device([rates(plan)]).seconds(narrow)[0] / Device([rates(plan)]).seconds(usual)[0]) == pytest.approx(1, rel=0.01)


def test_shapes_are_many_and_mixed() -> None:
    found = shapes()
    assert len(found) >= 150 and found == shapes()
    half = found[: len(found) // 2]
    assert sum(n % 8 > 0 for _, n, _ in half) > 3 and max(half) > (30000,) and min(half) < (100,)


@pytest.fixture
def small() -> Iterator[Plan]:
    """A plan for one core, whose other may be at work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = ["model=tiny_llama3", "model.layers=1", "train.seq_len=16", "train.global_batch=2", "train.micro_batch=2", "data.path=null"]
    yield load([*words, "data.tokens=100000", "cluster.gpus_per_node=1"])
    torch.set_num_threads(threads)


def test_every_kind_is_timed_and_nothing_twice(small: Plan, tmp_path: Path, capfd, monkeypatch) -> None:
    """The code that a GPU runs, on small tensors of this machine."""
    watch = Stopwatch(torch.device("cpu"), 32, 1 << 12)
    assert gpu.measure(small, tmp_path, watch, limit=0.0) > 20  # no time, nothing done
    assert not (tmp_path / gpu.TABLE).exists()
    asked = gpu.tasks(small, torch.device("cpu"), tmp_path)
    gpu.append(tmp_path / gpu.TABLE, gpu.line(small, asked[0], {"time_us": 123.0}))
    with (tmp_path / gpu.TABLE).open("a") as file:
        file.write("cpu-core,bf16,1,matm")  # a line that was cut
    monkeypatch.setattr(gpu, "Stopwatch", lambda where: watch)
    _alone(small, tmp_path)
    rows = table(tmp_path / gpu.TABLE)
    assert rows[0]["time_us"] == "123.0" and len({gpu._key(row) for row in rows if row["op"] != "storage"}) == len(asked)
    assert all(float(row["time_us"]) > 0 for row in rows)
    kinds = {f"{row['op']}.{row['stage']}" for row in rows}
    assert {"matmul.forward", "matmul.input", "matmul.weight", "grouped.backward", "attention.backward", "launch.queued", "host.backward",
            "optimizer.step", "copy.to_host", "copy.to_device", "storage.save",
            "storage.load", "cast.forward", "loss.backward", "decode.step"} <= kinds  # fmt: skip
    assert {row["precision"] for row in rows if row["op"] == "matmul"} == {"bf16", "fp8"}
    assert {kind for kind in KINDS if kind.split(".")[0] in ("norm", "swiglu", "rotary", "embedding", "quantise")} <= kinds
    size = (tmp_path / gpu.TABLE).stat().st_size
    capfd.readouterr()
    _alone(small, tmp_path)
    assert (tmp_path / gpu.TABLE).stat().st_size == size
    out = capfd.readouterr().out
    assert out.splitlines()[0] == watts.NONE and "timed 0 operations" in out and len(out.splitlines()) == 2


class Queue:
    """A GPU's queue and clock: what was done, and how long each takes."""

    def __init__(self) -> None:
        self.at, self.order = 0.0, list[str]()

    def does(self, name: str, seconds: float) -> Callable[..., None]:
        def call(*_: Any) -> None:
            self.at += seconds
            self.order.append(name)

        return call

    def event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.at)
        event.elapsed_time = lambda later: (later.at - event.at) * 1e3
        return event


def test_a_gpus_clock_is_read_among_load(monkeypatch) -> None:
    """The branches for a GPU, with its queue replaced: what runs around the timed call, and that only it counts."""
    watch, queue = Stopwatch(torch.device("cpu"), 8, 8), Queue()
    watch.cuda = True
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.does("sync", 0.001))
    monkeypatch.setattr(torch.cuda, "_sleep", queue.does("sleep", 0.02))
    monkeypatch.setattr(watch, "busy", queue.does("busy", 0.002))
    work = queue.does("work", 0.02)
    assert watch.time(work).seconds == pytest.approx(0.02)
    assert queue.order == ["work", *["busy"] * 10, *["busy", "work"] * 3, "sync", *["busy", "work"] * 2, "sync"]  # two more fit into 50 ms
    monkeypatch.setattr("real.stopwatch.CALLS", 4)
    queue.order.clear()
    assert watch.queued(work).seconds == pytest.approx(0.02)
    assert queue.order == ["sleep", *["work"] * 4, "sync"] * 6
    queue.order.clear()
    watch.hosted(work, 3)
    assert queue.order == ["sleep", *["work"] * 3, "sync"] * 6
    monkeypatch.setattr("real.stopwatch.WARM", 0.0)
    queue.order.clear()
    watch.warm()
    assert queue.order == [*["busy"] * 20, "sync"]


def test_what_a_device_has_not_is_a_row_without_a_time(small: Plan, tmp_path: Path, capfd) -> None:
    def fail(watch: Stopwatch) -> dict[str, float]:
        raise torch.OutOfMemoryError("out of memory\nand more")

    task = Task("matmul", "forward", "bf16", {"m": 8, "n": 8, "k": 8}, fail)
    gpu.append(tmp_path / gpu.TABLE, gpu.line(small, task, gpu._run(task, Stopwatch(torch.device("cpu"), 8, 8))))
    assert gpu.done(tmp_path / gpu.TABLE) == {task.key} and table(tmp_path / gpu.TABLE)[0]["time_us"] == ""
    assert capfd.readouterr().out == "matmul forward bf16 k=8 m=8 n=8: out of memory\n"


def test_power_of_a_phase_is_energy_over_time(small: Plan, tmp_path: Path, monkeypatch) -> None:
    """A counter that counts 300 W; the plan's own steps run beside the samples."""
    where = torch.device("cpu")
    assert watts.phases(small, where, tmp_path) == []
    monkeypatch.setattr(nvml, "joules", lambda device: 300.0 * time.perf_counter())
    monkeypatch.setattr(watts, "STEPS", 0.2)
    tasks = {task.stage: task for task in watts.phases(small, where, tmp_path, held=0.05, settle=0.0)}
    assert list(tasks) == ["idle", "products", "copies", "spinning", "waiting", "training"]
    watch = Stopwatch(where, 32, 1 << 12)
    for stage in ("idle", "products", "copies", "waiting", "training"):
        assert tasks[stage].run(watch)["watts"] == pytest.approx(300, rel=0.1)
    monkeypatch.setattr(nvml, "watts", lambda device: None)
    with watts.sampled(where, tmp_path / "power.csv"):
        time.sleep(0.2)
    head, *samples = (tmp_path / "power.csv").read_text().splitlines()
    at, joules = np.array([[float(number) for number in line.split(",,")] for line in samples]).T
    assert head == "at,watts,joules" and len(at) >= 2 and np.ptp(joules) == pytest.approx(300 * np.ptp(at), rel=0.1)
