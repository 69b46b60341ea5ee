"""A function called in a process of its own, which a page cannot take down with it.

The child works page after page under a limit of processor time and of memory. Whatever it does with a hostile page (a loop in C code,
gigabytes, a crash) ends the child alone, and the next page gets a new one.
"""

import faulthandler
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 10  # times the limit of processor time that the clock may show, for one that sleeps


class Broken(Exception):
    """What ended the child: too long, too much memory, or a crash."""


class Guard:
    """`call(x)` is `work(x)`, or raises Broken."""

    def __init__(self, work: Callable[[Any], Any], seconds: float, memory: float) -> None:
        self.work, self.seconds, self.memory = work, seconds, memory
        self.child: Any = None
        self.pipe: Connection | None = None

    def call(self, page: Any) -> Any:
        """Raises Broken after a second child has fallen too: the first may have carried what earlier pages left."""
        fresh = self.child is None
        try:
            return self._ask(page)
        except Broken:
            if fresh:
                raise
            return self._ask(page)

    def _ask(self, page: Any) -> Any:
        if self.child is None:
            self._start()
        assert self.pipe is not None
        try:
            self.pipe.send(page)
            answered = self.pipe.poll(PATIENCE * self.seconds)
            good, found = self.pipe.recv() if answered else (False, "too long")
        except (EOFError, OSError):
            good, found = False, self._why()
        if good:
            return found
        self.close()
        raise Broken(found)

    def _why(self) -> str:
        self.child.join()
        return "too long" if self.child.exitcode == -signal.SIGPROF else "crash"

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # what the parent has loaded is there at once
        self.pipe, other = context.Pipe()
        self.child = context.Process(target=_serve, args=(self.work, other, self.pipe, self.seconds, self.memory), daemon=True)
        self.child.start()
        other.close()

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.join()
            assert self.pipe is not None
            self.pipe.close()
            self.child = self.pipe = None


def _serve(work: Callable[[Any], Any], pipe: Connection, parents: Connection, seconds: float, memory: float) -> None:
    parents.close()
    faulthandler.disable()  # what it would write of a crash is not for the screen
    os.close(2)  # parsers write to it what they think of a page
    os.open(os.devnull, os.O_WRONLY)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held = _virtual() + memory
    if held < 2**62:
        resource.setrlimit(resource.RLIMIT_AS, (int(held), int(held)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, in C code too
    while True:
        try:
            page = pipe.recv()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = (True, work(page))
        except MemoryError:
            answer = (False, "too much memory")
        except Exception as error:
            answer = (False, f"error: {type(error).__name__}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(answer)


def _virtual() -> float:
    """Bytes of address space in use; none where the system does not tell."""
    if not os.path.exists("/proc/self/statm"):  # noqa: PTH110
        return float("inf")
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return float(file.read().split()[0]) * resource.getpagesize()
