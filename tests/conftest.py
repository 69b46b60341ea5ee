"""Shared by all tests: a small corpus, and the program run as a user runs it."""

import multiprocessing as mp
import os
import random
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from conf.program import main

SHARED = Path(__file__).parents[2] / "shared"
WORDS = [
    a + b
    for a in [
        "the",
        "a",
        "of",
        "cat",
        "dog",
        "sun",
        "moon",
        "red",
        "blue",
        "run",
        "walk",
        "sees",
        "finds",
        "under",
        "over",
        "with",
        "and",
        "then",
        "not",
    ]
    for b in ("", "s", "ing", "ed")
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of words with a grammar of sorts, two of them the same."""
    folder = tmp_path_factory.mktemp("corpus")
    dice = random.Random(7)
    for i in range(120):
        lines = (" ".join(dice.choices(WORDS, k=12)) for _ in range(dice.randint(20, 60)))
        (folder / f"{i:03}.txt").write_text("\n".join(lines))
    (folder / "twin.txt").write_text((folder / "000.txt").read_text().upper())
    return folder


# A plan that two cores execute in seconds.
TINY = [
    "model.layers=2", "model.hidden=32", "model.heads=4", "model.kv_heads=2", "model.ffn=64", "model.vocab=512", "tokenizer.vocab=512",
    "train.seq_len=32", "train.global_batch=8", "train.micro_batch=2", "train.steps=8", "train.warmup=2", "train.evaluate_every=4",
    "train.evaluate_sequences=8", "checkpoint.every=3", "cluster.cores_per_node=1",
]  # fmt: skip


@pytest.fixture
def tiny(corpus: Path) -> list[str]:
    return [*TINY, f"data.path={corpus}"]


@pytest.fixture
def foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`foretold ARGS` in an empty folder: status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        status = main(list(args))
        out, err = capfd.readouterr()
        return status, out, err

    return run


def forked(words: list[str], said: Path) -> BaseProcess:
    """`foretold WORDS` in a session of its own that can be killed whole, a fork that has nothing to import; what it says is in `said`."""

    def child() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which pytest's workers ignore
        with said.open("w") as sys.stdout:
            sys.stderr = sys.stdout
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stdout.fileno(), 2)
            status = main(words)
        os._exit(status)

    process = mp.get_context("fork").Process(target=child)
    process.start()
    return process


# Tests that start ranks share the cores of the machine, and those of the first group ports and clocks too: each group is one worker's,
# test after test, beside the other.
GROUPS = {
    "commands": ("align", "bad_input", "chaos", "compare", "data", "finetune", "kit", "launch", "partition", "replicas", "resume", "runs",
                 "slurm", "survive", "tiny", "watch"),
    "worlds": ("mesh", "precision", "reshard"),
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for group, files in GROUPS.items():
            if item.path.stem.removeprefix("test_") in files:
                item.add_marker(pytest.mark.xdist_group(group))
