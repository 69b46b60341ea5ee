"""Runs that a test executes in its own process, and what they leave."""

import json
import logging
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from conf.plan import Plan
from conf.program import load, main
from conf.record import STATES, read
from real.life import Life
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
STEPS, KEEP = 30, 3
PLAN = [*TINY, f"train.steps={STEPS}", "checkpoint.every=4", f"checkpoint.keep={KEEP}", "train.evaluate_every=0", "failures.timeout=1 s",
        "failures.backoff=10 ms", "failures.retries=4", "train.evaluate_sequences=0"]  # fmt: skip


def prepare(corpus: Path, folder: Path) -> Path:
    """The tokens of a corpus, for all runs on it."""
    assert main(["real", "only=extract,dedup,tokens", f"runs={folder}", *PLAN, f"data.path={corpus}"]) == 0
    return next(folder.glob("*/real/tokens"))


def script(*entries: str) -> str:
    return f"failures.script=[{','.join(repr(entry) for entry in entries)}]"


class Lived:
    """A run that was executed in this process, and what it left."""

    def __init__(self, prepared: Path, tmp_path: Path, *words: str) -> None:
        self.plan: Plan = load([*PLAN, "data.path=corpus", *words])
        self.folder = tmp_path / self.plan.id / "real"
        self.said: list[str] = []
        if not (self.folder / "tokens").is_dir():
            shutil.copytree(prepared, self.folder / "tokens")

    def live(self) -> "Lived":
        life = Life(self.plan, self.folder, self.said.append)
        life.pretrain()
        life.close()
        return self

    def events(self, name: str) -> list[dict]:
        return [{**event, **json.loads(event["detail"])} for event in read(self.folder, "events") if event["event"] == name]

    def losses(self) -> dict[int, list[float]]:
        """Losses of each step, in the order in which they were seen."""
        told: dict[int, list[float]] = {}
        for row in sorted(read(self.folder, "ledger"), key=lambda row: row["at"]):
            if row["quantity"] == "loss":
                told.setdefault(row["step"], []).append(row["value"])
        return told

    def weights(self, step: int = STEPS) -> dict[str, torch.Tensor]:
        out = self.folder / "whole.pt"
        logging.disable()  # torch tells every step of it
        dcp_to_torch_save(self.folder / "checkpoints" / f"step-{step:08}", out)
        logging.disable(logging.NOTSET)
        return torch.load(out, weights_only=True)

    def same_as(self, other: "Lived") -> bool:
        """Bit for bit."""
        mine, theirs = self.weights(), other.weights()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def adds_up(self) -> bool:
        """States over ranks × wall clock of pre-training."""
        rows = [row for row in read(self.folder, "ledger") if row["stage"] == "pretrain" and row["quantity"] in STATES]
        summary = json.loads((self.folder / "summary.json").read_text())["quantities"]
        spent = sum(row["value"] for row in rows)
        return abs(spent / self.plan.ranks - summary["run.wall_clock"]["value"]) < 0.05
