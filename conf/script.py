"""A script of faults: what strikes which rank in which step, as `kill rank=1 step=12 phase=backward`."""

from dataclasses import dataclass

from conf.errors import nearest

# kind: (the phase in which it strikes unless another is named, what it takes beside rank, step, phase and times)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "kill": ("forward", ()),  # SIGKILL
    "stop": ("forward", ()),  # SIGSTOP: it stands still until it is killed
    "exit": ("forward", ()),  # ends with status 3
    "sleep": ("communication", ("seconds",)),  # stands still, and cannot be told from a rank that waits
    "nan": ("optimizer", ()),  # in one gradient
    "flip": ("data", ()),  # a bit of one weight
    "slow": ("data", ("factor", "steps")),
    "truncate": ("saved", ()),  # a file of the newest checkpoint
    "alter": ("saved", ()),
    "remove": ("saved", ()),
    "full": ("saving", ()),  # the disk
    "broken": ("saving", ()),  # the disk answers with an input/output error
    "slowdisk": ("saving", ("seconds",)),
    "clock": ("data", ("seconds",)),  # the wall clock jumps
}
PHASES = ("load", "data", "forward", "backward", "communication", "optimizer", "evaluate", "saving", "sealing", "saved")


@dataclass(frozen=True)
class Fault:
    """One entry of a script; it strikes the first `times` times that its rank comes to this phase of this step."""

    kind: str
    rank: int
    step: int  # the first is 1
    phase: str
    times: int = 1
    seconds: float = 0.0
    factor: float = 2.0
    steps: int = 1


def read(entry: str) -> Fault:
    """An entry of failures.script.

    Raises ValueError with a line that a user can act on.

    >>> read("kill rank=1 step=12 phase=backward")
    Fault(kind='kill', rank=1, step=12, phase='backward', times=1, seconds=0.0, factor=2.0, steps=1)
    >>> read("kil rank=1 step=3")
    Traceback (most recent call last):
    ValueError: 'kil rank=1 step=3' names no fault; did you mean kill?
    """
    kind, *words = entry.split() or [""]
    if kind not in KINDS:
        raise ValueError(f"{entry!r} names no fault; {nearest(kind, KINDS)}")
    phase, more = KINDS[kind]
    pairs = {name: value for name, _, value in (word.partition("=") for word in words)}
    if len(pairs) < len(words):
        raise ValueError(f"{entry!r} says something twice; say each once")
    for name in pairs:
        known = ("rank", "step", "phase", "times", *more)
        if name not in known:
            raise ValueError(f"{entry!r}: {kind} takes no {name}; {nearest(name, known)}")
    for name in ("rank", "step", *(("seconds",) if "seconds" in more else ())):
        if name not in pairs:
            raise ValueError(f"{entry!r} lacks {name}; write for example kill rank=1 step=12 phase=backward")
    phase = pairs.pop("phase", phase)
    if phase not in PHASES:
        raise ValueError(f"{entry!r}: phase={phase} is no part of a step; {nearest(phase, PHASES)}")
    try:
        numbers = {name: float(value) if name in ("seconds", "factor") else int(value) for name, value in pairs.items()}
    except ValueError as error:
        raise ValueError(f"{entry!r} holds what is no number; write for example sleep rank=0 step=7 seconds=30") from error
    return Fault(kind, phase=phase, **numbers)  # type: ignore[arg-type]


def problems(script: list[str], ranks: int, steps: int | None) -> list[str]:
    """What is wrong with a script for a run of so many ranks and steps, one line each."""
    found = []
    for entry in script:
        try:
            fault = read(entry)
        except ValueError as error:
            found.append(f"failures.script: {error}")
            continue
        if not 0 <= fault.rank < ranks:
            found.append(f"failures.script: {entry!r} names rank {fault.rank}, the plan has ranks 0 to {ranks - 1}")
        if not 1 <= fault.step <= (steps or fault.step):
            found.append(f"failures.script: {entry!r} names step {fault.step}, the plan has steps 1 to {steps}")
        if min(fault.times, fault.steps) < 1 or (fault.seconds < 0 and fault.kind != "clock") or fault.factor < 1:
            found.append(f"failures.script: {entry!r}: times, steps and factor are 1 or more, seconds are not negative")
    return found
