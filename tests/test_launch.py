"""Ways to start: this process, torchrun, and the installed wheel from another folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.record import read

ROOT = Path(__file__).parents[1]


def losses(runs: Path) -> list[float]:
    return [r["value"] for r in read(next(runs.glob("*/real")), "ledger") if r["quantity"] == "loss" and r["stage"] == "pretrain"]


def test_torchrun_gives_the_same_losses(tiny, tmp_path):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "real"]
    for name, command in (("own", [sys.executable, "-m", "real"]), ("torchrun", ranks)):
        done = subprocess.run([*command, f"runs={tmp_path / name}", *tiny], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "own") == losses(tmp_path / "torchrun") and len(losses(tmp_path / "own")) == 8
    summary = json.loads(next((tmp_path / "torchrun").glob("*/real/summary.json")).read_text())
    assert summary["quantities"]["run.tokens"]["value"] == 8 * 256


def test_torchrun_with_the_wrong_number_of_ranks(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "real", f"runs={tmp_path}", *tiny]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "torchrun started 1 ranks, the plan has 2" in done.stderr


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
