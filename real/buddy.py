"""Copies in the memory, or on the disks, of several servers: every rank's shards in its own server's, and in a neighbour's.

What a rank holds is kept as it holds it, so only the same mesh reads it back, quickly; another mesh goes by the checkpoints on
disk. When a server is lost, the one that takes its place is sent what the neighbour has kept.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.files import write
from conf.plan import Plan
from real.cluster import rank
from real.optim import local
from real.parallel import total


class Buddy:
    """One rank's part in keeping copies; all ranks call each method."""

    def __init__(self, name: str, folder: Path, plan: Plan, run: str, passing: Callable[[str], None] = lambda _: None) -> None:
        self.name, self.folder, self.plan, self.run, self.passing = name, folder, plan, run, passing
        self.ranks, self.stride = plan.ranks, plan.cluster.gpus_per_node

    def save(self, tensors: dict[str, Tensor], step: int) -> list[tuple[int, int]]:
        """Keep these shards here and at the neighbour; returns the step, which is safe now, with its bytes."""
        self.passing("saving")
        mine = _packed(tensors)
        theirs = self._passed_on(mine)
        for owner, data in ((rank(), mine), ((rank() - self.stride) % self.ranks, theirs)):
            self._keep(owner, step, data)
        self.passing("sealing")
        size = int(total(torch.tensor([float(len(mine))])).item())  # when it is told, all have kept theirs
        self._forget_before(step)
        self.passing("saved")
        return [(step, size)]

    def finish(self) -> list[tuple[int, int]]:
        """Nothing is ever pending."""
        return []

    poll = finish

    def newest(self, most: float) -> tuple[int, list[int]] | None:
        """The newest step of at most so many of which every rank's shards are held, and who gives them to each rank: itself or another."""
        told: list[Any] = [None] * self.ranks
        dist.all_gather_object(told, (os.environ.get("GROUP_RANK", "0"), set(self._sound())))
        for step in sorted({step for _, held in told for step, _ in held if step <= most}, reverse=True):
            givers = [_giver(told, step, owner) for owner in range(self.ranks)]
            if None not in givers:
                return step, givers
        return None

    def load(self, into: dict[str, Tensor], step: int, givers: Sequence[int]) -> None:
        """Fill these shards: from this server's memory, or as they come from who has them."""
        mine = self._data(step, rank()).read_bytes() if givers[rank()] == rank() else b""
        for owner, giver in enumerate(givers):
            if giver != owner and rank() == giver:
                _send(self._data(step, owner).read_bytes(), owner)
            elif giver != owner and rank() == owner:
                mine = _receive(giver)
        kept = torch.load(io.BytesIO(mine), weights_only=True)
        for name, tensor in into.items():
            local(tensor).copy_(kept[name])

    def forget_after(self, step: int) -> None:
        """Delete copies of a history that was given up."""
        for path in self.folder.glob("step-*"):
            if int(path.name.split("-")[1]) > step:
                shutil.rmtree(path, ignore_errors=True)

    # -- on this server

    def _data(self, step: int, owner: int) -> Path:
        return self.folder / f"step-{step:08}" / f"rank{owner}.pt"

    def _keep(self, owner: int, step: int, data: bytes) -> None:
        """Shards first, then what tells that they are whole."""
        path = self._data(step, owner)
        write(path, data)
        facts = {"plan": self.plan.id, "run": self.run, "sha256": sha256(data).hexdigest()}
        write(path.with_suffix(".json"), json.dumps(facts))

    def _sound(self) -> Iterator[tuple[int, int]]:
        """Steps and owners of the whole copies on this server; its ranks share the work of looking."""
        share, shares = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for seal in sorted(self.folder.glob("step-*/rank*.json"))[share::shares]:
            facts, data = json.loads(seal.read_text()), seal.with_suffix(".pt")
            known = (facts["plan"], facts["run"]) == (self.plan.id, self.run)
            if known and data.is_file() and sha256(data.read_bytes()).hexdigest() == facts["sha256"]:
                yield int(seal.parent.name.split("-")[1]), int(seal.stem.removeprefix("rank"))

    def _forget_before(self, step: int) -> None:
        """The copy before is kept too: a server may be lost while this one is still on its way to others."""
        older = sorted(path for path in self.folder.glob("step-*") if int(path.name.split("-")[1]) < step)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            for path in older[:-1]:
                shutil.rmtree(path, ignore_errors=True)

    def _passed_on(self, mine: bytes) -> bytes:
        """Give this rank's shards to the next server's rank of the same place, and take the previous one's."""
        to, source = (rank() + self.stride) % self.ranks, (rank() - self.stride) % self.ranks
        size, coming = torch.tensor([len(mine)]), torch.zeros(1, dtype=torch.long)
        _swap(size, to, coming, source)
        theirs = torch.empty(int(coming), dtype=torch.uint8)
        _swap(torch.frombuffer(bytearray(mine), dtype=torch.uint8), to, theirs, source)
        return theirs.numpy().tobytes()


def _giver(told: list[tuple[str, set[tuple[int, int]]]], step: int, owner: int) -> int | None:
    """Who can give a rank its shards of a step: itself when its server holds them, else the first that does."""
    holders = [number for number, (_, held) in enumerate(told) if (step, owner) in held]
    return owner if any(told[number][0] == told[owner][0] for number in holders) else next(iter(holders), None)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    out = io.BytesIO()
    torch.save({name: local(tensor).detach().cpu().clone() for name, tensor in tensors.items()}, out)
    return out.getvalue()


def _swap(out: Tensor, to: int, into: Tensor, source: int) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, to), dist.P2POp(dist.irecv, into, source)]):
        work.wait()


def _send(data: bytes, to: int) -> None:
    dist.send(torch.tensor([len(data)]), to)
    dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), to)


def _receive(source: int) -> bytes:
    size = torch.zeros(1, dtype=torch.long)
    dist.recv(size, source)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(data, source)
    return data.numpy().tobytes()
