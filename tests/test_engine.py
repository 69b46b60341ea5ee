"""The same digests from every engine, whatever is killed on the way."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.errors import Refused
from conf.files import sweep
from conf.program import main
from real.stage import Manifest, Task, run, workers
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
STAGES = ("extract", "dedup", "tokens")
NEAR = "data.dedup=minhash"


@pytest.fixture
def many(tmp_path, corpus):
    """Some shards of text with repeats, and the words of the command over them."""
    folder, dice = tmp_path / "many", random.Random(3)
    folder.mkdir()
    words = min(corpus.iterdir()).read_text().split()
    texts = [" ".join(dice.choices(words, k=4000)) for _ in range(60)]
    for number in range(240):
        text = texts[number % 60].split()
        for _ in range(number // 60 * 20):
            text[dice.randrange(len(text))] = f"w{dice.randrange(10**6)}"
        (folder / f"{number:03}.txt").write_text(" ".join(text))
    return ["real", f"only={','.join(STAGES)}", *TINY, NEAR, f"data.path={folder}", "data.limit=1 GB"]


def digests(runs: Path) -> dict[str, str]:
    folder = next(runs.glob("*/real"))
    manifests = [Manifest.read(folder / stage) for stage in STAGES]
    return {f"{m.folder.name}/{o['path']}": o["sha256"] for m in manifests for o in m.outputs}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def finish(words: list[str]) -> None:
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _dies(folder: Path, name: str) -> dict[str, int]:
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / name).write_text(name)
    return {}


def test_a_lost_worker_is_one_line_and_costs_one_task(tmp_path):
    tasks = [Task(name, _dies, (), ()) for name in "ab"]
    with (
        workers(1) as pool,
        pytest.raises(Refused, match=r"^stage: a worker was killed, most likely because memory ran out"),
    ):
        run(tmp_path / "stage", tasks, {}, pool, {}, lambda _: None)
    assert (tmp_path / "stage" / "a").read_text() == "a" and not (tmp_path / "stage" / "b").exists()
    assert len(list((tmp_path / "stage" / "receipts").iterdir())) == 1


def test_a_cluster_that_is_not_there_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    status = main(["real", "only=extract", *TINY, "data.runner=ray", "data.limit=10 kB"])
    assert status == 2 and "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there" in capfd.readouterr().err


def test_what_a_killed_writer_left_aside_goes_and_what_is_being_written_stays(tmp_path):
    old, new = tmp_path / "a" / ".summary.json.7.tmp", tmp_path / ".receipt.json.8.tmp"
    old.parent.mkdir()
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (1e9, 1e9))
    sweep(tmp_path, time.time() - 60)
    assert not old.exists() and new.exists()


@pytest.mark.slow
def test_a_ray_cluster_leaves_the_same_files(many, tmp_path):
    finish([*many, f"runs={tmp_path / 'local'}"])
    finish([*many, f"runs={tmp_path / 'ray'}", "data.runner=ray"])
    assert digests(tmp_path / "local") == digests(tmp_path / "ray") and len(digests(tmp_path / "local")) > 8


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_files(many, tmp_path):
    """Twenty SIGKILLs of the command and all its workers, at random moments; work that has a receipt is not done again."""
    began = time.monotonic()
    finish([*many, f"runs={tmp_path / 'whole'}"])
    usual, dice, words = time.monotonic() - began, random.Random(5), [*many, f"runs={tmp_path / 'killed'}"]
    kept: dict[Path, int] = {}
    for kill in range(20):
        process = subprocess.Popen(command(*words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(dice.uniform(0.4, 0.9) * usual if kill % 4 else dice.uniform(0.1, 0.4) * usual)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        receipts = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("receipts/*.json")}
        assert kept.items() <= receipts.items(), "work that had a receipt was done again"
        kept = receipts
    finish(words)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.tmp"))
