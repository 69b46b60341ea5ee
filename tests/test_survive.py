"""The matrix of faults: real signals, real files, real numbers; each with what must hold afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import Refused
from conf.program import load
from real.failures import strikes
from real.heartbeat import Stopped
from tests.lived import PLAN, ROOT, STEPS, Lived, prepare, script


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(corpus, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def unbroken(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Lived:
    return Lived(prepared, tmp_path_factory.mktemp("unbroken")).live()


@pytest.mark.parametrize(
    "entries",
    [
        ("kill rank=0 step=11 phase=backward", "kill rank=1 step=14 phase=optimizer"),
        ("kill rank=1 step=12 phase=saving", "kill rank=0 step=16 phase=sealing", "kill rank=0 step=20 phase=saved"),
        pytest.param(("kill rank=1 step=10 phase=forward", "exit rank=1 step=19 phase=communication"), marks=pytest.mark.slow),
        pytest.param(("broken rank=0 step=8", "slowdisk rank=1 step=12 seconds=0.3"), marks=pytest.mark.slow),
        pytest.param(("clock rank=1 step=5 seconds=3600", "clock rank=0 step=6 seconds=-3600"), marks=pytest.mark.slow),
        pytest.param(("kill rank=1 step=10", "kill rank=0 step=10 phase=load"), marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_it_ends_with_the_same_bits(prepared, tmp_path, unbroken, entries):
    """Rows 1, 7, 8, 10 and 14: killed in every phase of a step and of a save, twice over; a broken and a slow disk; a clock that jumps."""
    run = Lived(prepared, tmp_path, script(*entries)).live()
    assert run.same_as(unbroken) and run.adds_up()
    assert len(run.events("injected")) == len(entries) and f"{len(entries)} of {len(entries)} planned faults struck" in run.said
    falls = sum(entry.split()[0] in ("kill", "exit", "broken") for entry in entries)
    assert len(run.events("failure")) == len(run.events("detection")) == falls
    for fault, seen in zip(run.events("failure"), run.events("detection"), strict=True):
        assert 0 <= seen["at"] - fault["at"] < 1.0 and seen["by"] == "exit"
        assert fault["step"] - max(s["step"] for s in run.events("checkpoint") if s["at"] < seen["at"]) <= 4  # one interval at most
    for step, seen in run.losses().items():
        assert set(seen) == set(unbroken.losses()[step])


@pytest.mark.slow
def test_who_hangs_is_named_and_replaced(prepared, tmp_path, unbroken):
    """Row 3: a stopped process, and one that sleeps inside a collective, within the timeout and one look."""
    run = Lived(prepared, tmp_path, script("stop rank=0 step=10", "sleep rank=1 step=19 seconds=600")).live()
    assert run.same_as(unbroken) and run.adds_up()
    assert [fall["culprit"] for fall in run.events("failure")] == [0, 1]
    for fault, seen in zip(run.events("failure"), run.events("detection"), strict=True):
        assert seen["by"] == "timeout" and 1.0 <= seen["at"] - fault["at"] < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_goes_on(prepared, tmp_path, unbroken, which):
    """Row 2: no step is lost."""
    run = Lived(prepared, tmp_path, script("slow rank=0 step=3 steps=12 factor=4"))
    threading.Timer(1.2, os.kill, (os.getpid(), which)).start()
    with pytest.raises(Stopped):
        run.live()
    done = max(run.losses())
    assert (run.folder / "checkpoints" / f"step-{done:08}" / "manifest.json").is_file() and done < STEPS
    assert run.live().same_as(unbroken)
    assert run.events("restart")[-1]["step"] == done and all(len(seen) == 1 for seen in run.losses().values())


@pytest.mark.slow
def test_the_exit_status_tells_that_it_can_go_on(corpus, tmp_path):
    """75, EX_TEMPFAIL, and the command that goes on."""
    words = [*PLAN, "train.steps=100000", f"data.path={corpus}", f"runs={tmp_path}"]
    process = subprocess.Popen([sys.executable, "-m", "real", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/real/checkpoints/step-*/manifest.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "go on with: foretold real" in err, err


def test_a_step_that_is_no_number_leaves_no_trace(prepared, tmp_path):
    """Row 4: all ranks drop it; the next step is sound, weights and moments finite."""
    run = Lived(prepared, tmp_path, script("nan rank=1 step=10", "exit rank=0 step=20 phase=load"), "failures.spikes.answer=skip").live()
    assert run.said[-1] == "1 of 2 planned faults struck; not: exit rank=0 step=20 phase=load"  # nothing was ever loaded
    (spike,) = run.events("spike")
    assert spike["step"] == 10 and spike["answer"] == "skip" and "no numbers" in spike["why"]
    losses = run.losses()
    assert len(losses) == STEPS and np.isfinite(losses[11][0]) and not run.events("failure")
    assert all(torch.isfinite(tensor.float()).all() for tensor in run.weights().values())


@pytest.mark.slow
def test_a_dropped_step_is_dropped_again(prepared, tmp_path):
    """After a kill the same ground is walked the same way."""
    words = ("failures.spikes.answer=skip",)
    once = Lived(prepared, tmp_path / "a", script("nan rank=1 step=10"), *words).live()
    again = Lived(prepared, tmp_path / "b", script("nan rank=1 step=10", "kill rank=0 step=11"), *words).live()
    assert again.same_as(once) and [s["step"] for s in again.events("spike")] == [10, 10]


@pytest.mark.slow
def test_a_rollback_passes_over_data(prepared, tmp_path, unbroken):
    """Back to step 8, then other data: the losses before are the same, those after differ, and the mean is no worse."""
    rule = ["failures.spikes.answer=rollback", "failures.spikes.rewind=2", "failures.spikes.skip=5"]
    run = Lived(prepared, tmp_path, script("nan rank=0 step=11"), *rule).live()
    assert [back["step"] for back in run.events("rollback")] == [8] and run.adds_up()
    usual, seen = unbroken.losses(), run.losses()
    assert all(seen[step][-1] == usual[step][0] for step in range(1, 9)) and seen[9][-1] != usual[9][0]
    assert len(seen) == STEPS


@pytest.mark.slow
def test_a_bit_that_turns_is_found_and_undone(prepared, tmp_path):
    """Row 5: within the steps between two looks, and the run ends with the bits of one in which nothing turned."""
    words = ("mesh.dp_replicate=2", "failures.verify_every=3")
    sound = Lived(prepared, tmp_path / "a", *words).live()
    run = Lived(prepared, tmp_path / "b", *words, script("flip rank=1 step=10")).live()
    (found,) = run.events("corruption")
    assert 10 <= found["step"] <= 12 and run.events("rollback")[0]["step"] == 8
    assert run.same_as(sound) and run.adds_up()
    late = Lived(prepared, tmp_path / "c", *words, script(f"flip rank=1 step={STEPS}")).live()  # found when all steps are done
    assert late.same_as(sound) and len(late.losses()[STEPS]) == 2


@pytest.mark.parametrize("how", ["alter", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncate", "remove"))])
def test_a_spoilt_checkpoint_is_passed_over(prepared, tmp_path, unbroken, how):
    """Row 6: the one before is taken, and the reason told."""
    run = Lived(prepared, tmp_path, script(f"{how} rank=0 step=12", "kill rank=1 step=14")).live()
    back = run.events("restart")[-1]
    assert back["step"] == 8 and "step-00000012" in back["passed_over"][0] and run.same_as(unbroken)


@pytest.mark.slow
def test_no_sound_checkpoint_names_them_all(prepared, tmp_path):
    entries = [f"alter rank=0 step={step}" for step in (4, 8, 12)]
    with pytest.raises(Refused) as refused:
        Lived(prepared, tmp_path, script(*entries, "kill rank=1 step=14")).live()
    assert len(refused.value.problems) == 3 and all("its digest differs" in line for line in refused.value.problems)


@pytest.mark.slow
def test_a_full_disk_ends_it_with_the_old_checkpoint_intact(prepared, tmp_path, unbroken):
    """Row 7; with space again the same command ends with the same bits."""
    run = Lived(prepared, tmp_path, script("full rank=1 step=8"))
    with pytest.raises(Refused, match="the disk is full"):
        run.live()
    assert run.live().same_as(unbroken) and run.events("restart")[-1]["step"] == 4


@pytest.mark.slow
def test_a_slow_rank_is_named(prepared, tmp_path):
    """Row 9."""
    run = Lived(prepared, tmp_path, script("slow rank=1 step=6 steps=40 factor=3"), "train.steps=40").live()
    (slow,) = run.events("straggler")
    assert slow["culprit"] == 1 and 6 <= slow["step"] <= 26 and slow["factor"] > 1.4 and slow["cost"] > 0


@pytest.mark.slow
def test_it_shrinks_and_grows_again(prepared, tmp_path):
    """Row 13: 4 → 2 → 4 ranks with the same batches; a rank that flaps is left out until it is repaired."""
    four = ("cluster.gpus_per_node=4", "train.micro_batch=1", "train.steps=60")
    whole = Lived(prepared, tmp_path / "a", *four).live()
    flaps = script("kill rank=3 step=10 times=2", "slow rank=0 step=11 steps=30 factor=3")
    rule = ("failures.without_spare=shrink", "failures.quarantine=2", "failures.repair=1 s")
    run = Lived(prepared, tmp_path / "b", *four, flaps, *rule).live()
    assert [change["ranks"] for change in run.events("resize")] == [2, 4]
    assert [fall["device"] for fall in run.events("failure")] == [3, 3]
    usual, seen = whole.losses(), run.losses()
    assert seen.keys() == usual.keys()
    assert max(abs(seen[step][-1] - usual[step][0]) for step in usual) < 2e-3  # the same samples, summed in another order


@pytest.mark.slow
def test_who_fails_for_good_ends_it(prepared, tmp_path):
    """Row 14: after failures.retries, with the step from which it goes on."""
    with pytest.raises(Refused) as refused:
        Lived(prepared, tmp_path, script("kill rank=1 step=10 times=99")).live()
    (line,) = refused.value.problems
    assert line.startswith("failures.retries=4: the ranks failed 5 times in a row") and line.endswith(
        "the same command goes on from step 8"
    )


@pytest.mark.slow
def test_too_few_devices_for_any_mesh(prepared, tmp_path):
    rule = ("failures.without_spare=shrink", "failures.quarantine=1", "mesh.tp=2")
    with pytest.raises(Refused, match=r"1 of 2 devices are left, and no mesh of that many ranks is legal for tp 2"):
        Lived(prepared, tmp_path, script("kill rank=1 step=10"), *rule).live()


@pytest.mark.slow
def test_without_whoever_started_them_ranks_end(corpus, tmp_path):
    """Row 12: the table in which ranks find each other dies with its process, and so do they; the same command goes on."""
    words = [*PLAN, "train.steps=100000", f"data.path={corpus}", f"runs={tmp_path}"]
    process = subprocess.Popen([sys.executable, "-m", "real", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("*/real/checkpoints/step-*/manifest.json")) and process.poll() is None:
        time.sleep(0.02)
    ranks = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").is_dir() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ranks and not any(Path(f"/proc/{pid}").is_dir() for pid in ranks)


def test_strikes_follow_their_law():
    """Row 15: gaps of a cause are exponential by the test of Kolmogorov and Smirnov, and as many as its rate says."""
    from itertools import takewhile

    from scipy.stats import kstest

    plan = load(["failures.causes={a: {per: gpu, rate: 0.05 1/s}, b: {per: job, rate: 0.02 1/s, how: hang}}"])
    told = list(takewhile(lambda strike: strike.at < 50_000, strikes(plan, 3)))
    for name, rate in (("a", 0.1), ("b", 0.02)):
        times = np.array([strike.at for strike in told if strike.name == name])
        assert kstest(np.diff(times), "expon", args=(0, 1 / rate)).pvalue > 0.01
        assert abs(len(times) - rate * 50_000) < 4 * np.sqrt(rate * 50_000)
    assert {strike.rank for strike in told} == {0, 1}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((script("kill rank=7 step=3"),), "'kill rank=7 step=3' names rank 7, the plan has ranks 0 to 1"),
        ((script("kill rank=1 step=31"),), "names step 31, the plan has steps 1 to 30"),
        ((script("kill rank=1 step=3 phase=lunch"),), "phase=lunch is no part of a step; it is one of"),
        ((script("kil rank=1 step=3"),), "names no fault; did you mean kill?"),
        ((script("kill rank=1 step=3 rank=0"),), "says something twice"),
        (("failures.retries=0",), "failures.retries=0"),
        (("failures.verify_every=3",), "mesh.dp_replicate=1 makes none; set mesh.dp_replicate=2"),
        (("failures.spikes.answer=rollback", "failures.spikes.skip=5"), "failures.spikes.skip=5 ends before the spike"),
    ],
)
def test_one_clear_line(words, part):
    with pytest.raises(Refused) as refused:
        load([*PLAN, "data.path=corpus", *words])
    (line,) = refused.value.problems
    assert part in line


@pytest.mark.slow
def test_the_newest_copy_of_any_tier_is_taken(prepared, tmp_path, unbroken):
    """A copy in memory every 2 steps: at most 2 are lost; where it is spoilt, the one on disk; at the end nothing stays in memory."""
    tier = "checkpoint.memory_every=2"
    run = Lived(prepared, tmp_path / "a", tier, script("kill rank=1 step=12", "kill rank=0 step=16")).live()
    assert run.same_as(unbroken) and run.adds_up() and not list(Path("/dev/shm").glob(f"foretold-{run.plan.id}-*"))
    assert [back["step"] for back in run.events("restart")[::2]] == [10, 14]
    both = script("alter rank=0 step=14", "kill rank=1 step=15")
    run = Lived(prepared, tmp_path / "b", tier, "checkpoint.every=6", both).live()
    assert run.same_as(unbroken) and run.events("restart")[-1]["step"] == 12
    assert "/dev/shm/" in run.events("restart")[-1]["passed_over"][0]


@pytest.mark.slow
def test_who_fails_at_once_is_tried_only_twice(prepared, tmp_path):
    """An error before the first step is no accident of the machine."""
    with pytest.raises(Refused, match="rank 1 ended with status 3 before its first step, twice"):
        Lived(prepared, tmp_path, script("exit rank=1 step=1 times=9")).live()
