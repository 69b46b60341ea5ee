"""Ways to start: this process, torchrun, and the installed wheel from another folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conf.errors import Refused
from conf.program import load, main
from conf.record import read

ROOT = Path(__file__).parents[1]


def losses(runs: Path) -> list[float]:
    return [r["value"] for r in read(next(runs.glob("*/real")), "ledger") if r["quantity"] == "loss" and r["stage"] == "pretrain"]


def test_torchrun_gives_the_same_losses(tiny, tmp_path):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "real", f"runs={tmp_path / 'torchrun'}", *tiny]
    done = subprocess.run(ranks, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert main(["real", f"runs={tmp_path / 'own'}", *tiny]) == 0
    assert losses(tmp_path / "own") == losses(tmp_path / "torchrun") and len(losses(tmp_path / "own")) == 8
    summary = json.loads(next((tmp_path / "torchrun").glob("*/real/summary.json")).read_text())
    assert summary["quantities"]["run.tokens"]["value"] == 8 * 256


def agents(count: int, ranks: int, *args: str) -> list[tuple[int, str]]:
    """Status and output of torchrun agents on this machine, each as if it were a server."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes", str(count), "--rdzv-id", "test", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", str(ranks), "-m", "real", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) for _ in range(count)]
    try:
        output = [agent.communicate(timeout=120)[0] for agent in running]
    finally:
        for agent in running:
            agent.terminate()
    return [(agent.returncode, text) for agent, text in zip(running, output, strict=True)]


def said(told: list[tuple[int, str]]) -> list[str]:
    """Lines of our own complaints; torchrun adds its report of the failed processes."""
    return [line for _, text in told for line in text.splitlines() if line.startswith("foretold real: ")]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_servers_give_the_same_losses_as_one(tiny, tmp_path, ranks):
    """Both with all ranks, to the last bit; one record, without a false interruption."""
    two = agents(2, ranks, f"runs={tmp_path / 'two'}", "cluster.nodes=2", f"cluster.gpus_per_node={ranks}", *tiny)
    assert {status for status, _ in two} == {0}, two
    assert main(["real", f"runs={tmp_path / 'one'}", f"cluster.gpus_per_node={2 * ranks}", *tiny]) == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and len(losses(tmp_path / "two")) == 8
    two, one = (json.loads(next((tmp_path / n).glob("*/real/summary.json")).read_text())["quantities"] for n in ("two", "one"))
    assert two["pretrain.final_loss"] == one["pretrain.final_loss"]
    assert two["run.interruptions"]["value"] == 0


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again(tiny, tmp_path):
    """Its agent keeps one table through all restarts; the losses are those of an undisturbed run."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "-m", "real"]
    kills = "failures.script=['kill rank=1 step=5','kill rank=0 step=7 phase=saving']"
    for name, words in (("killed", [kills, "checkpoint.every=2"]), ("whole", ["checkpoint.every=2"])):
        done = subprocess.run([*ranks, f"runs={tmp_path / name}", *tiny, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert set(losses(tmp_path / "killed")) == set(losses(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("count", "ranks", "args", "part"),
    [
        pytest.param(
            1, 1, [], "torchrun started 1 ranks, the plan has 2; change --nnodes, --nproc-per-node or the plan", marks=pytest.mark.slow
        ),
        (1, 2, ["cluster.nodes=2", "cluster.gpus_per_node=1"], "cluster.gpus_per_node=1; set cluster.nodes=1 cluster.gpus_per_node=2, or"),
        pytest.param(
            2,
            1,
            ["cluster.nodes=2", "cluster.gpus_per_node=1", "data.path=/nowhere"],
            "data.path=/nowhere does not exist",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            1,
            ["cluster.nodes=2", "cluster.gpus_per_node=1", "train.learning_rate=1e38"],
            "training diverged; lower train.learning_rate",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_all_ranks_refuse_with_one_line(tiny, tmp_path, count, ranks, args, part):
    """What is wrong with the ranks, with the data stages, and with training."""
    told = agents(count, ranks, f"runs={tmp_path}", *tiny, *args)
    assert all(status for status, _ in told)
    (line,) = said(told)
    assert part in line


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["model.positions=alibi"], "model.positions=alibi: real cannot execute it, sim predicts it; set model.positions=rope"),
        (
            ["train.precision=fp16", "gpu=h100_sxm"],
            "train.precision=fp16: real cannot execute it, sim predicts it; set train.precision=bf16",
        ),
        (["train.optimizer=adamw8bit"], "train.optimizer=adamw8bit on a CPU: real cannot execute it"),
        (["gpu.kind=tpu"], "gpu.kind=tpu: real cannot execute it, sim predicts it; choose a gpu of kind cpu or cuda"),
        (["train.fused_attention=false"], "train.fused_attention=false: real cannot execute it"),
        (["mesh.tp=2", "model.vocab=513"], "on mesh.tp=2 ranks: real cannot execute it, sim predicts it; set model.vocab=514"),
        (["mesh.cp=2", "mesh.cp_kind=ulysses", "model.kv_heads=1"], "1 heads of keys a rank: real cannot execute it"),
        (["mesh.cp=2", "train.seq_len=258"], "no multiple of 2 × mesh.cp=2"),
    ],
)
def test_what_is_not_built_is_refused(args, part):
    from real.parallel import refuse_unbuilt

    with pytest.raises(Refused) as refused:
        refuse_unbuilt(load(args))
    (line,) = refused.value.problems
    assert part in line


def test_a_head_of_the_usual_width_is_built():
    from real.parallel import refuse_unbuilt

    refuse_unbuilt(load(["model.head=32"]))


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(tiny, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheel", ROOT], check=True)
    wheel = next((tmp_path / "wheel").glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def run(*args: str) -> str:
        command = [sys.executable, str(tmp_path / "site" / "bin" / "foretold"), *args]
        done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import conf; print(conf.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "site") in found.stdout
    for verb in ("sim", "real"):
        assert "step" in run(verb, *tiny)
    assert "pretrain.step_time" in run("analysis", "compare")
    assert "report.html" in run("analysis", "report")
