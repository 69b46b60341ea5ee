"""The GPU kit on a CPU: its plans are legal, foretold and fit; its runner foretells first, executes what is missing, and goes on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conf.arithmetic import parameters
from real.parallel import refuse_unbuilt
from sim.room import room
from tests.kit import plans, table
from tests.kit.__main__ import settle, supervise
from tests.kit.foretell import FORETOLD, MEASURED, append, foretell, now, predicted, read

ROOT = Path(__file__).parents[1]
BASE = "cluster.gpus_per_node=1 train.warmup=2 train.evaluate_sequences=0 checkpoint.every=0"
TINY = "nano 32 2x1 fp32 none beside\nnano 32 2x1 fp32 none adamw8bit\nnano 32 8x1 fp32 none grpo\n"


def test_every_plan_of_the_kit_is_legal_foretold_and_fits():
    found = plans.rows()
    told = {row.name: (plan := plans.plan_of(row), predicted(plan)) for row in found}
    assert len({plan.id for plan, _ in told.values()}) == len(found) >= 30
    for name, (plan, quantities) in told.items():
        refuse_unbuilt(plan)
        assert 0 < quantities["memory"] <= room(plan), name
        assert 0.02 < quantities["step_time"] < 3, name
        assert plan.gpu.idle_power < quantities["energy"] / quantities["step_time"] <= plan.gpu.max_power, name
    sizes = {name.split()[0]: parameters(plan.model) for name, (plan, _) in told.items()}
    assert [round(sizes[name] / 1e9, 1) for name in ("125m", "350m", "1b", "3b", "8b")] == [0.1, 0.3, 1.0, 2.9, 7.2]


def test_most_informative_first():
    found = plans.rows()
    costs = {row.name: 100.0 if row.beside else 10.0 for row in found}
    told = plans.ordered(found, costs)
    assert sorted(told) == sorted(found)
    methods = {word for row in told[:12] for word in row.name.split()[3:]}
    assert methods >= {"bf16", "fp8", "none", "selective", "full", "lora", "dpo", "grpo"}
    assert len({row.name.split()[0] for row in told[:12]}) >= 6


def test_foretold_before_it_runs_and_executed_once(tmp_path, monkeypatch):
    from tests.kit import execute

    monkeypatch.setattr(plans, "MOST", plans.LEAST)
    monkeypatch.setattr(execute, "_measured", starved(execute._measured, "nano 32 4x1 fp32 none"))
    found = plans.rows("nano 32 2x1 fp32 none\nnano 32 4x1 fp32 none\nnano 32 2x1 fp32 none adamw8bit", BASE)
    told = foretell(found, tmp_path)
    head = {name: told[found[0].name][name] for name in ("name", "plan")}
    append(tmp_path / MEASURED, {"at": now(), **head, "status": "began", "clock": 0.0})  # an earlier call was interrupted here
    for _ in range(2):  # the second time nothing is left
        execute.work(found, foretell(found, tmp_path), tmp_path, time.monotonic() + 1000)
    foretold, measured = read(tmp_path / FORETOLD), read(tmp_path / MEASURED)
    assert max(row["at"] for row in foretold) <= min(row["at"] for row in measured)
    one, starving, refused = (row for row in measured if row["status"] != "began")
    assert one["status"] == "done" and one["finite"] and one["falls"] and one["steps"] == plans.LEAST
    assert starving["status"] == "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert refused["status"].startswith("refused: train.optimizer=adamw8bit on a CPU")
    assert len(foretold) == 3 and len(measured) == 7


def starved(work, name):  # type: ignore[no-untyped-def]
    """The same work, but memory runs out in one row."""

    def measured(row, *arguments):  # type: ignore[no-untyped-def]
        if row.name == name:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore of it")
        return work(row, *arguments)

    return measured


def kit(folder: Path, lines: str, *more: str) -> str:
    (folder / "plans.txt").write_text(lines)
    command = [sys.executable, "-m", "tests.kit", str(folder), f"table={folder / 'plans.txt'}", f"base={BASE}", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_runner_foretells_executes_and_goes_on(tmp_path):
    torn = '{"at": "x", "name": "torn'
    (tmp_path / MEASURED).write_text(torn)  # of a run that was killed while it wrote
    out = kit(tmp_path, TINY)
    foretold, measured = read(tmp_path / FORETOLD), read(tmp_path / MEASURED)
    ended = {row["name"]: row for row in measured if row["status"] != "began"}
    assert len(foretold) == len(ended) == 3
    assert max(row["at"] for row in foretold) <= min(row["at"] for row in measured)
    assert ended["nano 32 2x1 fp32 none adamw8bit"]["status"].startswith("refused: train.optimizer=adamw8bit on a CPU")
    trained = ended["nano 32 2x1 fp32 none beside"]
    assert trained["status"] == "done" and trained["finite"] and trained["falls"]
    assert all(trained[f"{name}_tokens_per_s"] > 0 for name in ("ours", "by_hand", "transformers"))
    assert ended["nano 32 8x1 fp32 none grpo"]["status"] == "done"
    for asked in ("2 of 3 configurations executed", "step: median error", "tokens/s of by hand", "**refused: "):
        assert asked in out
    before = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert kit(tmp_path, TINY).endswith(table.markdown(table.pairs(tmp_path)) + "\n")
    assert {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")} == before  # nothing was foretold or run again

    kit(tmp_path, TINY + "nano 32 2x2 fp32 none\n", "seconds=0")  # no time is left: it is foretold, and stays to be done
    assert len(read(tmp_path / FORETOLD)) == 4 and (tmp_path / MEASURED).read_text() == before[MEASURED]


def test_what_ends_the_process_is_told_and_left_out(tmp_path):
    """A worker that falls over at its second row is started again without it, one that asks for it with what is left."""
    rows = tmp_path / MEASURED
    worker = (
        "import json, os, sys; from pathlib import Path; from tests.kit.foretell import append, ended\n"
        "folder = Path(sys.argv[1]); sys.stdin.readline()\n"
        "for name in 'abcd':\n"
        "    if (name, 'p') not in ended(folder):\n"
        "        append(folder / 'measured.jsonl', {'name': name, 'plan': 'p', 'status': 'began', 'clock': 0.0})\n"
        "        os.abort() if name == 'b' else append(folder / 'measured.jsonl', {'name': name, 'plan': 'p', 'status': 'done'})\n"
        "        name == 'c' and sys.exit(75)\n"
    )
    command = [sys.executable, "-c", worker, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
    assert supervise(command, tmp_path, time.monotonic() + 60, process) == 0
    ends = {row["name"]: row["status"] for row in read(rows) if row["status"] != "began"}
    assert ends == {"a": "done", "b": "died: the process ended with status -6", "c": "done", "d": "done"}


def test_a_row_that_was_interrupted_gets_a_second_chance(tmp_path):
    row = {"name": "a", "plan": "p", "status": "began", "clock": 0.0}
    append(tmp_path / MEASURED, row)
    assert settle(tmp_path, 2, "died") == 0
    append(tmp_path / MEASURED, row)
    assert settle(tmp_path, 2, "died") == 1
    assert read(tmp_path / MEASURED)[-1]["status"] == "died"


def test_prompts_and_answers_fill_their_sequences(tmp_path):
    """What sim foretells of an alignment is of sequences that are as long as the plan lets them be."""
    pytest.importorskip("tokenizers")
    from real.pairs import Pairs
    from real.prompts import read as prompts
    from tests.kit import inputs

    dpo, grpo = (plans.plan_of(row) for row in plans.rows("nano 64 4x1 fp32 none dpo\nnano 64 8x1 fp32 none grpo", BASE))
    _, folder = inputs.alignment(tmp_path, dpo)
    assert {len(ids) for ids in Pairs(folder / "tokens", "train").tokens} == {dpo.align.longest}
    plan, _ = inputs.alignment(tmp_path, grpo)
    assert {len(ids) for ids in prompts(plan.align, inputs.tokenizer(tmp_path)).train.ids} == {grpo.align.prompt_tokens}


def test_errors_and_figures_by_hand():
    told = {"at": "t", "plan": "p", "profile": "", "step_time": 1.1, "memory": 9e9, "energy": 500.0, "mfu": 0.5}
    found = {"status": "done", "step_time": 1.0, "memory": 10e9, "energy": None, "finite": True, "falls": True}
    pairs = [table._joined(told | {"name": f"1b 2048 8x2 {kind} none compile"}, found | {"step_time": seconds})
             for kind, seconds in (("bf16", 1.0), ("fp8", 0.8))]  # fmt: skip
    said = list(table.figures(pairs))
    assert table.error(pairs[0], "step_time") == pytest.approx(0.1) and table.error(pairs[0], "energy") is None
    assert "step: median error 23.8%, largest 37.5% of 2 (asked: median 5%, at most 10%)" in said
    assert "peak memory: median error 10.0%, largest 10.0% of 2 (asked: median 3%, at most 8%)" in said
    assert "fp8 over bf16, 1b 2048 8x2 none compile: 1.250 (asked: at least 1.2 on large ones)" in said
    assert "MFU of 1b in bf16: at best 55.0% (asked: at least 50%)" in said
    assert json.loads(json.dumps(pairs)) == pairs
