"""Which replica a command is, where replicas restart alone (failures.restart=replica): its plan, its record, what it shares."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from conf.errors import Refused
from conf.plan import Plan

NUMBER, MEETING = "REPLICA_GROUP_ID", "TORCHFT_LIGHTHOUSE"
SHARED = ("tokens", "checkpoints")  # folders of the first replica that the others see as theirs


@dataclass(frozen=True)
class Place:
    """Which replica this process belongs to."""

    number: int
    plan: Plan  # what one replica executes

    @property
    def first_rank(self) -> int:
        """Of its ranks among those of the whole plan."""
        return self.number * self.plan.ranks

    def folder(self, home: Path) -> Path:
        """Its record: the first replica's is the run's, the others' lie in it."""
        return home / f"replica{self.number}" if self.number else home


def place(plan: Plan) -> Place | None:
    """The replica that this command is; None where the whole job restarts.

    Raises Refused where it is not said, or what it is part of is not built.
    """
    if plan.failures.restart != "replica":
        return None
    found = list(_unbuilt(plan))
    if found:
        raise Refused(*(f"failures.restart=replica with {what}: real cannot execute it; {cure}" for what, cure in found))
    number, replicas = os.environ.get(NUMBER, ""), plan.mesh.dp_replicate
    if not os.environ.get(MEETING) or not number.isdigit() or int(number) >= replicas:
        said = f"{NUMBER}={number or 'unset'}, {MEETING}={os.environ.get(MEETING, 'unset')}"
        raise Refused(f"failures.restart=replica: {said}; start torchft_lighthouse, and this command once for each replica with its "
                      f"number from 0 to {replicas - 1} and the lighthouse's address, or set failures.restart=job")  # fmt: skip
    nodes = plan.cluster.nodes // replicas
    part = plan.but(**{"mesh.dp_replicate": 1, "cluster.nodes": nodes, "failures.restart": "job", "cluster.spares": 0})
    return Place(int(number), part)


def _unbuilt(plan: Plan) -> Iterator[tuple[str, str]]:
    if find_spec("torchft") is None:
        yield "no torchft", "pip install 'foretold[replicas]'"
    if plan.mesh.pp > 1:
        yield f"mesh.pp={plan.mesh.pp}", "set mesh.pp=1"
    if plan.model.moe.experts:
        yield f"model={plan.model.name}, a mixture of experts", "choose a dense model"
    if plan.train.document_mask:
        yield "train.document_mask=true", "set it to false"
    if plan.checkpoint.memory_every or plan.checkpoint.local_every:
        yield "checkpoint.memory_every or local_every", "set both to 0: the other replicas are the copy in memory"
    if plan.failures.spikes.answer != "none":
        yield f"failures.spikes.answer={plan.failures.spikes.answer}", "set it to none"
    if plan.failures.verify_every:
        yield f"failures.verify_every={plan.failures.verify_every}", "set it to 0"


def join(home: Path, mine: Path, say: Callable[[str], None], patience: float) -> None:
    """Let a later replica see the first one's tokens and checkpoints, once they are there."""
    deadline = time.monotonic() + patience
    while not (home / "tokens" / "manifest.json").is_file():
        if time.monotonic() > deadline:
            raise Refused(f"{home / 'tokens'} did not appear within failures.start_timeout: is replica 0 running?")
        time.sleep(0.1)
    mine.mkdir(parents=True, exist_ok=True)
    (home / "checkpoints").mkdir(exist_ok=True)
    for name in SHARED:
        if not (mine / name).is_symlink():
            (mine / name).symlink_to(home / name)
    say(f"tokens of {home / 'tokens'}")
