"""Replicas that restart alone, joined by torchft: two commands and a lighthouse, as on two servers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import Refused
from conf.program import load
from conf.record import read, read_all
from real.place import place
from tests.lived import PLAN, ROOT, Lived, prepare, script

pytestmark = pytest.mark.slow
STEPS = 60
TWO = ("mesh.dp_replicate=2", "cluster.nodes=2", "cluster.gpus_per_node=1", "failures.restart=replica", f"train.steps={STEPS}",
       "checkpoint.every=20", "failures.timeout=20 s")  # fmt: skip


@pytest.fixture
def lighthouse() -> Iterator[str]:
    light = "_torchft.LighthouseServer('[::]:0', min_replicas=1, join_timeout_ms=100, quorum_tick_ms=20, heartbeat_timeout_ms=300)"
    code = f"import time; from torchft import _torchft; light = {light}; print(light.address(), flush=True); time.sleep(999)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    yield process.stdout.readline().strip()
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(corpus, tmp_path_factory.mktemp("prepared"))


def live(lighthouse: str, corpus: Path, runs: Path, *words: str) -> Path:
    """Both replicas to their end; the folder of the run."""
    runs.mkdir()
    command = [sys.executable, "-m", "real", *PLAN, *TWO, f"data.path={corpus}", f"runs={runs}", *words]
    both = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | {"REPLICA_GROUP_ID": str(number), "TORCHFT_LIGHTHOUSE": lighthouse},
                         stdout=(runs / f"{number}.txt").open("w"), stderr=subprocess.STDOUT)
        for number in (0, 1)
    ]  # fmt: skip
    try:
        ended = [process.wait(timeout=150) for process in both]
    finally:
        for process in both:
            process.terminate()
    assert ended == [0, 0], "\n".join((runs / f"{number}.txt").read_text() for number in (0, 1))
    return next(runs.glob("*/real"))


def losses(folder: Path) -> dict[int, float]:
    rows = sorted(read_all(folder, "ledger"), key=lambda row: row["at"])
    return {row["step"]: row["value"] for row in rows if row["quantity"] == "loss"}


def test_the_others_go_on_and_who_comes_back_gets_their_state(lighthouse, corpus, prepared, tmp_path):
    """The same samples in the same steps as one job of two replicas; while one is away the other takes its samples too."""
    one = Lived(prepared, tmp_path / "one", "mesh.dp_replicate=2", f"train.steps={STEPS}", "checkpoint.every=20").live()
    usual = {step: seen[0] for step, seen in one.losses().items()}
    whole = losses(live(lighthouse, corpus, tmp_path / "whole"))
    assert whole.keys() == usual.keys() and max(abs(whole[step] - usual[step]) for step in usual) < 1e-5
    faults = script("kill rank=1 step=25", "kill rank=1 step=25 phase=load", "sleep rank=0 step=30 phase=data seconds=4")
    folder = live(lighthouse, corpus, tmp_path / "killed", faults, "failures.backoff=2 s")
    events = read(folder, "events")
    away = [json.loads(event["detail"])["replicas"] for event in events if event["event"] == "quorum"]
    assert 1 in away and away[-1] == 2 and not [event for event in events if event["event"] == "failure"]
    other = read(folder / "replica1", "events")
    back = [event["step"] for event in other if event["event"] == "rejoin"]
    assert len([event for event in other if event["event"] == "failure"]) == 2 and back and back[-1] > 25
    told = json.loads((folder / "summary.json").read_text())["quantities"]
    assert told["run.interruptions"]["value"] == 2
    killed = losses(folder)
    assert killed.keys() == usual.keys() and max(abs(killed[step] - usual[step]) for step in usual) < 2e-3


def test_each_replica_may_be_sharded(lighthouse, corpus, prepared, tmp_path):
    """Two replicas of two ranks each: every rank meets its like."""
    words = ("mesh.dp_shard=2", "train.micro_batch=1")
    one = Lived(prepared, tmp_path / "one", "mesh.dp_replicate=2", "cluster.gpus_per_node=4", *words, f"train.steps={STEPS}").live()
    usual = {step: seen[0] for step, seen in one.losses().items()}
    whole = losses(live(lighthouse, corpus, tmp_path / "whole", "cluster.gpus_per_node=2", *words))
    assert whole.keys() == usual.keys() and max(abs(whole[step] - usual[step]) for step in usual) < 1e-5


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.delenv("REPLICA_GROUP_ID", raising=False)
    with pytest.raises(Refused, match="REPLICA_GROUP_ID=unset, TORCHFT_LIGHTHOUSE=unset; start"):
        place(load([*PLAN, "data.path=corpus", *TWO]))
    with pytest.raises(Refused, match="verify_every=3: real cannot execute it; set it to 0"):
        place(load([*PLAN, "data.path=corpus", *TWO, "failures.verify_every=3"]))
