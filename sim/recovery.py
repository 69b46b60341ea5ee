"""The way back up: who notices a fault, and the rungs of the ladder from there to the next step.

run → fault → detect → abort → diagnose → reallocate (or queue) → init → load → replay → run. The states are those of the
record, so a simulated recovery and a measured one subtract state by state.
"""

from typing import NamedTuple, TypeAlias

from conf.duration import Duration
from conf.plan import Cause, Failures
from sim.failures import Fault, Luck

Rung: TypeAlias = tuple[str, float]  # a state, and the seconds in it


class Stop(NamedTuple):
    """Why the job stops."""

    fault: Fault
    gone: list[int]  # servers that it takes from the job
    found: bool = False  # it was found out beside the training, and needs no detection any more
    before: float = float("inf")  # only what was saved before this moment can be trusted


def detector(failures: Failures, cause: Cause) -> tuple[str, Duration | None]:
    """What tells of a cause, and how long that takes; None for what nobody looks for.

    >>> from conf.program import load
    >>> told = load(["failures=llama3"]).failures
    >>> detector(told, told.causes["hang"])[0], detector(told, told.causes["gpu"])[0]
    ('timeout', 'exit')
    """
    if cause.planned or cause.notice:
        return "notice", Duration(0.0)
    if cause.how == "hang":
        return "timeout", failures.timeout
    if cause.how == "corrupt":
        return "checksum", failures.checksum
    if cause.how == "slow":
        return "score", failures.score
    return ("heartbeat", failures.heartbeat or failures.detect) if cause.silent else ("exit", failures.detect)


def noticed(failures: Failures, cause: Cause, stop: Stop) -> list[Rung]:
    """From the fault to the end of all processes."""
    _, span = detector(failures, cause)
    luck = stop.fault.luck
    known = stop.found or cause.planned or cause.notice > 0 or span is None
    seen = [] if known or span is None else [("detect", span.at(luck.detect))]
    return [*seen, ("abort", failures.abort.at(luck.abort))]


def raised(failures: Failures, luck: Luck, init: Duration, load: float | None, known: bool = False) -> list[Rung]:
    """From there to the next step: without a diagnosis where the culprit is known, without a load where nothing was saved."""
    culprit = [] if known else [("diagnose", failures.diagnose.at(luck.diagnose))]
    swap = ("reallocate", failures.reallocate.at(luck.reallocate))  # passed over where no server is missing
    return [*culprit, swap, ("init", init.at(luck.init)), *([] if load is None else [("load", load)])]


def spoilt(share: float, luck: Luck) -> int:
    """Newest checkpoints in a row that prove unreadable, each with this probability.

    >>> spoilt(0.1, Luck(spoilt=0.05)), spoilt(0.1, Luck(spoilt=0.5)), spoilt(0.0, Luck(spoilt=0.5))
    (1, 0, 0)
    """
    bad, bar = 0, share
    while luck.spoilt < bar and bad < 1000:
        bad, bar = bad + 1, bar * share
    return bad


def held(cause: Cause | None, servers: int) -> set[str]:
    """Tiers whose copies live through a fault: a server's own disk goes with the server, memory with its neighbour too."""
    tiers = {"remote"}
    if cause is None or cause.per == "job":
        return tiers | {"local", "memory"}
    return tiers | ({"memory"} if cause.blast == 1 and servers > 1 else set())
