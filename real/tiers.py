"""Where a run's checkpoints lie: in memory, on this server's disk, in the run's folder; whichever whole one is newest is taken.

A copy in memory is a file that the kernel keeps there (/dev/shm): it outlives the ranks and the process that watches them, not the
server. On several servers each rank's shards go to a neighbour too (`buddy.py`).
"""

import shutil
import tempfile
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from real import checkpoint

MEMORY = Path("/dev/shm")
REMOTE = "remote"


class Tier(NamedTuple):
    name: str  # memory, local or remote, the quickest first
    every: int  # steps
    folder: Path


def tiers(plan: Plan, folder: Path) -> list[Tier]:
    """Those that a run in this folder has; what lies outside it carries the folder's digest, for a plan may run in two folders at once."""
    rule, name = plan.checkpoint, f"foretold-{plan.id}-{sha1(str(folder.resolve()).encode()).hexdigest()[:8]}"
    memory = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    found = [Tier("memory", rule.memory_every, memory / name), Tier("local", rule.local_every, Path(tempfile.gettempdir()) / name)]
    return [*(tier for tier in found if tier.every), Tier(REMOTE, rule.every, folder / "checkpoints")]


def newest(plan: Plan, folder: Path, most: float = float("inf")) -> tuple[Path, int, list[str]] | None:
    """The newest sound checkpoint of all tiers, its step, and why newer ones were passed over; None when there is none at all.

    Raises Refused when there are checkpoints and none can be trusted: it names each with its reason.
    """
    reasons: list[str] = []
    held = [(path, tier) for tier in tiers(plan, folder) for path in checkpoint.complete(tier.folder)]
    for path, _ in sorted(held, key=lambda one: -checkpoint.step_of(one[0])):  # stable: of equal steps the quickest tier's
        if checkpoint.step_of(path) > most:
            continue
        reason, _ = checkpoint.check(path, plan)
        if reason is None:
            return path, checkpoint.step_of(path), reasons
        reasons.append(f"{path}: {reason}")
    if reasons:
        raise Refused(*(f"{reason}; delete it to start without it" for reason in reasons))
    return None


def run_of(folder: Path) -> str:
    """A name of the run in this folder that no earlier one had: what another server still holds of that is not taken for this one's."""
    path = folder / "run"
    if not path.is_file():
        write(path, uuid4().hex)
    return path.read_text()


def last_saved(plan: Plan, folder: Path) -> int:
    """Steps of the newest checkpoint of any tier, unverified; 0 where there is none."""
    return max((checkpoint.step_of(path) for tier in tiers(plan, folder) for path in checkpoint.complete(tier.folder)[-1:]), default=0)


def forget_after(plan: Plan, folder: Path, step: int) -> None:
    """Delete checkpoints of a history that was given up."""
    for tier in tiers(plan, folder):
        for path in checkpoint.complete(tier.folder):
            if checkpoint.step_of(path) > step:
                shutil.rmtree(path)


def release(plan: Plan, folder: Path) -> None:
    """Give back memory and the server's disk: the run is done, or begins anew."""
    for tier in tiers(plan, folder):
        if tier.name != REMOTE:
            shutil.rmtree(tier.folder, ignore_errors=True)


def due(found: list[Tier], step: int, last: bool) -> Iterator[Tier]:
    """Tiers to which this step goes: the last one to the safest, and none twice, for the safest holds what the others would."""
    remote = found[-1]
    if last or (remote.every and step % remote.every == 0):
        yield remote
        return
    yield from (tier for tier in found[:-1] if step % tier.every == 0)
