"""Roles on ranks: who trains, who generates, who scores, and how they talk.

Ranks of one role are a world of their own: its process group is the default one, so that the trainers' mesh is built as ever. Between
roles go messages, over connections to the first trainer, who leads; weights go over a bridge (real/sync.py).
"""

import pickle
import queue
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch.distributed as dist

from conf.plan import Plan
from real import cluster
from real.sync import Bridge

GONE = "Connection closed by peer"  # as real.cluster.PEERS has it
POLL = 0.02  # seconds


def role_of(plan: Plan, rank: int) -> str:
    """What a rank is: trainer, generator or scorer; whoever trains does what else it does in turn."""
    return next(name.removesuffix("s") for name, ranks in plan.roles._asdict().items() if rank in ranks)


def enter(plan: Plan) -> str:
    """Leave the world of all ranks for that of this rank's role; returns the role."""
    role = role_of(plan, cluster.rank())
    ranks = plan.roles._asdict()[f"{role}s"]
    if len(ranks) == plan.ranks:
        return role
    if dist.is_initialized():
        dist.barrier()  # all have come up: nobody leaves before
        dist.destroy_process_group()
    if len(ranks) > 1 or plan.train.precision != "fp32":
        cluster.meet(plan, role, cluster.rank() - ranks[0], len(ranks))
    return role


def bridge(plan: Plan) -> Bridge:
    """From the first trainer to every generator."""
    generators = plan.roles.generators
    index = 0 if cluster.rank() == 0 else 1 + generators.index(cluster.rank())
    return Bridge(cluster.table(), index, 1 + len(generators), plan.gpu.kind == "cuda", cluster.patience(plan))


class Lead:
    """The first trainer's connections to the ranks that do not train. What they say is heard at any time, by a thread."""

    def __init__(self, plan: Plan) -> None:
        alone, key = plan.cluster.nodes == 1, secrets.token_bytes(16)
        self.ranks = range(len(plan.roles.trainers), plan.ranks)
        with Listener(("localhost" if alone else "", 0), backlog=len(self.ranks), authkey=key) as door:
            host = "localhost" if alone else socket.gethostname()
            cluster.table().set("align lead", pickle.dumps((host, door.address[1], key)))
            self.lines = dict[int, Connection]()
            while len(self.lines) < len(self.ranks):
                line = door.accept()
                self.lines[line.recv()] = line
        self.heard: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        of = {line: rank for rank, line in self.lines.items()}
        while of:
            for line in wait(list(of)):
                assert isinstance(line, Connection)
                try:
                    self.heard.put((of[line], line.recv()))
                except (EOFError, OSError):
                    self.heard.put((of.pop(line), None))

    def tell(self, rank: int, *message: Any) -> None:
        try:
            self.lines[rank].send(message)
        except OSError as error:
            raise RuntimeError(f"rank {rank}: {GONE}") from error

    def tell_all(self, *message: Any) -> None:
        for rank in self.ranks:
            self.tell(rank, *message)

    def hear(self, seconds: float = POLL) -> Iterator[tuple[int, Any]]:
        """What was said since the last time, by whom; waits so long for the first word.

        Raises RuntimeError when somebody has gone.
        """
        with suppress(queue.Empty):
            rank, message = self.heard.get(timeout=seconds)
            while True:
                if message is None:
                    raise RuntimeError(f"rank {rank}: {GONE}")
                yield rank, message
                rank, message = self.heard.get_nowait()

    def close(self) -> None:
        self.tell_all("end")


class Follow:
    """A rank's connection to the first trainer."""

    def __init__(self) -> None:
        host, port, key = pickle.loads(cluster.table().get("align lead"))
        self.line = Client((host, port), authkey=key)
        self.line.send(cluster.rank())

    def tell(self, *message: Any) -> None:
        try:
            self.line.send(message)
        except OSError as error:
            raise RuntimeError(GONE) from error

    def hear(self, seconds: float) -> Any:
        """The next message, None when there is none for so long.

        Raises RuntimeError when the trainer has gone.
        """
        try:
            return self.line.recv() if self.line.poll(seconds) else None
        except (EOFError, OSError) as error:
            raise RuntimeError(GONE) from error
