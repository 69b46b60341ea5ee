"""Killed and resumed: bit-equal to the unbroken run; nothing torn, nothing foreign is ever loaded."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from conf.program import main
from conf.record import STATES, read
from tests.conftest import TINY, forked

STEPS = 30
PLAN = [*TINY, f"train.steps={STEPS}", "checkpoint.every=4", "checkpoint.keep=3"]


def words(corpus: Path, runs: Path) -> list[str]:
    return ["real", f"runs={runs}", *PLAN, f"data.path={corpus}"]


def finished(runs: Path) -> Path:
    return next(runs.glob("*/real"))


def weights(run: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, by its path."""
    out = tmp_path / f"{run.parents[1].name}.pt"
    dcp_to_torch_save(run / "checkpoints" / f"step-{STEPS:08}", out)
    flat, stack = {}, [("", torch.load(out, weights_only=True))]
    while stack:
        at, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{at}/{k}", v) for k, v in value.items()]
        elif isinstance(value, torch.Tensor):
            flat[at] = value
    return flat


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("unbroken")
    assert main(words(corpus, runs)) == 0
    return finished(runs)


def kill_after(corpus: Path, runs: Path, step: int, how: int, *more: str) -> tuple[int | None, str]:
    """Start the run in a session of its own and signal it once its ledger tells of that step: its status, and what it said."""
    said = runs.parent / "said.txt"
    process, deadline = forked([*words(corpus, runs), *more], said), time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        ledger = list(runs.glob("*/real/ledger.rank0.jsonl"))
        if ledger and f'"step": {step},' in ledger[0].read_text():
            break
        time.sleep(0.005)
    os.killpg(process.pid, how)  # as a terminal does: everyone in the foreground hears it
    process.join(60)
    return process.exitcode, said.read_text()


def test_killed_at_random_steps_and_resumed_is_bit_equal(corpus, unbroken, tmp_path):
    dice = random.Random(os.getpid())  # another step every time; the message names it
    moments = [4 * dice.randint(0, 2) + dice.randint(1, 3), 4 * dice.randint(3, 5) + dice.randint(1, 3)]  # never just after a save
    runs = tmp_path / "killed"
    for moment in moments:
        kill_after(corpus, runs, moment, signal.SIGKILL)
        rows = read(finished(runs), "ledger")  # readable although it was torn
        assert any(r["quantity"] == "step_time" for r in rows)
    assert main(words(corpus, runs)) == 0, moments
    one, other = weights(unbroken, tmp_path), weights(finished(runs), tmp_path)
    assert one.keys() == other.keys() and len(one) > 30
    assert all(torch.equal(one[name], other[name]) for name in one), moments
    losses = [
        {r["step"]: r["value"] for r in read(run, "ledger") if r["quantity"] == "loss" and r["stage"] == "pretrain"}
        for run in (unbroken, finished(runs))
    ]
    assert losses[0] == losses[1], moments
    ledger, events = read(finished(runs), "ledger"), read(finished(runs), "events")
    assert sum(e["event"] == "restart" and e["rank"] == 0 for e in events) >= 1
    assert any(r["quantity"] == "replay" for r in ledger) and {r["quantity"] for r in ledger if r["unit"] == "s"} - {
        "seconds",
        "step_time",
        "tokenizer_seconds",
    } <= set(STATES)


def test_ctrl_c_leaves_a_readable_record_and_says_how_to_go_on(corpus, tmp_path):
    runs = tmp_path / "stopped"
    status, said = kill_after(corpus, runs, 5, signal.SIGINT, "train.steps=100000")
    assert status == 130, said
    assert "stopped; the record so far is in" in said and "go on with: foretold real" in said and "Traceback" not in said
    assert len([r for r in read(finished(runs), "ledger") if r["quantity"] == "step_time"]) >= 5


@pytest.fixture
def half(corpus, unbroken, tmp_path) -> Path:
    """A copy of the finished run whose last steps have to be done again."""
    runs = tmp_path / "half"
    shutil.copytree(unbroken.parents[1], runs)
    return finished(runs)


def test_a_torn_checkpoint_is_passed_over(foretold, corpus, half, unbroken, tmp_path):
    """One without its manifest was never finished: the one before is used, and the end is the same."""
    (half / "checkpoints" / f"step-{STEPS:08}" / "manifest.json").unlink()
    status, out, err = foretold(*words(corpus, half.parents[1]))
    assert status == 0 and "resumed from step-00000028" in out, err
    one, other = weights(unbroken, tmp_path), weights(half, tmp_path)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_corrupt_checkpoint_is_passed_over_and_named(foretold, corpus, half):
    spoilt = next((half / "checkpoints" / f"step-{STEPS:08}").glob("*.distcp"))
    data = bytearray(spoilt.read_bytes())
    data[len(data) // 2] ^= 1
    spoilt.write_bytes(data)
    status, out, err = foretold(*words(corpus, half.parents[1]))
    assert status == 0 and "resumed from step-00000028" in out, err
    assert f"step-{STEPS:08}: {spoilt.name} is corrupt" in out + err


def test_when_no_checkpoint_can_be_trusted_each_is_named(foretold, corpus, half):
    for path in (half / "checkpoints").glob("step-*/manifest.json"):
        path.write_text("{")
    status, _, err = foretold(*words(corpus, half.parents[1]))
    assert status == 2 and err.count("its manifest is corrupt") == 3 and "delete it to start without it" in err and "Traceback" not in err


def test_a_checkpoint_of_another_plan_is_refused(foretold, corpus, half):
    for path in (half / "checkpoints").glob("step-*/manifest.json"):
        path.write_text(path.read_text().replace(half.parent.name, "p0123456789"))
    status, _, err = foretold(*words(corpus, half.parents[1]))
    assert status == 2 and f"it belongs to plan p0123456789, this is plan {half.parent.name}" in err and "Traceback" not in err
