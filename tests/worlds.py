"""Trainers on any mesh in one test process's children: forked from a parent that has imported what they need."""

import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.pipelining
import torch.multiprocessing as mp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from conf.plan import Plan
from conf.program import load
from real.timeline import Timeline
from real.trainer import Trainer

torch.set_num_threads(1)


class Stream:
    """Random tokens in documents of random lengths, as real.data.Tokens gives them."""

    packed = masked = False

    def __init__(self, plan: Plan, windows: int = 256) -> None:
        dice = np.random.default_rng(5)
        self.seq_len, self.windows = plan.train.seq_len, windows
        self.tokens = dice.integers(plan.model.vocab, size=windows * self.seq_len + 1)
        self.ends = np.cumsum(dice.integers(3, self.seq_len, size=4 * windows))

    def __len__(self) -> int:
        return self.windows

    def window(self, index: int) -> np.ndarray:
        return self.tokens[index * self.seq_len : (index + 1) * self.seq_len + 1]

    def documents(self, index: int) -> np.ndarray:
        start = index * self.seq_len
        return np.searchsorted(self.ends, np.arange(start, start + self.seq_len + 1), side="right")


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def plan_of(*overrides: str) -> Plan:
    words = [w for w in overrides if w.startswith("mesh.")]
    ranks = np.prod([int(w.split("=")[1]) for w in words if w.split("=")[0] in RANKS])
    return load(["model.vocab=512", "tokenizer.vocab=512", f"cluster.gpus_per_node={ranks:.0f}", *overrides])


RANKS = [f"mesh.{axis}" for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")]


def spawn(plan: Plan, work: Callable[..., Any], *arguments: Any, timeout: float = 300) -> None:
    """`work(plan, *arguments)` on every rank of the plan; an error on any rank is raised here."""
    folder = Path(tempfile.mkdtemp())
    processes = [mp.get_context("fork").Process(target=_rank, args=(r, plan, folder, work, arguments)) for r in range(plan.ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
        errors = [p.read_text() for p in sorted(folder.glob("error*"))]
        assert not errors, errors[0]
        assert all(p.exitcode == 0 for p in processes), [p.exitcode for p in processes]
    finally:
        for process in processes:
            process.kill()


def _rank(rank: int, plan: Plan, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)  # a fork does not take its parent's threads along
    try:
        several = plan.ranks > 1 or plan.train.half
        if several:
            store = dist.FileStore(str(folder / "store"), plan.ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.ranks, timeout=timedelta(seconds=240))
        work(plan, *arguments)
        if several:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank} of {plan.axes}\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def train(plan: Plan, folder: Path, steps: int, adapters: bool = False) -> None:
    """Some steps; the first rank writes losses and norms, all write the checkpoint."""
    from real.checkpoint import state

    trainer = Trainer(plan, Stream(plan), Timeline(), adapters=adapters)  # type: ignore[arg-type]
    told = [trainer.step(step)[:2] for step in range(steps)]
    if os.environ["RANK"] == "0":
        torch.save(told, folder / "told")
    dcp.save(state(trainer.parts, trainer.optimizer), checkpoint_id=folder / "state", no_dist=not dist.is_initialized())


def outcome(plan: Plan, steps: int = 5, adapters: bool = False) -> Outcome:
    folder = Path(tempfile.mkdtemp())
    spawn(plan, train, folder, steps, adapters)
    told = torch.load(folder / "told")
    return Outcome([loss for loss, _ in told], [norm for _, norm in told], whole(folder / "state"))


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, in one process."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items() if isinstance(m, TensorStorageMetadata)}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors
