"""Rewards of completions: rules that check an answer, or any Python function, asked in a process of its own.

A judge behind a door: texts go in, numbers come out, and whoever takes too long, falls over or says nonsense is replaced, while the
others' texts are judged as before. The process is a fresh interpreter, so that it is safe to start from ranks with threads; run as
`python -m real.rewards` it is that process.
"""

import importlib.util
import inspect
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from conf.errors import Refused

Reward = Callable[[str, str, str], Any]  # of prompt, completion and answer
START = 120.0  # seconds that a user's file may take to be imported
NUMBER = re.compile(r"((?<![\w)])-)?\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?)")
MARK = "####"  # before the answers of GSM8K


class Score(NamedTuple):
    value: float  # nan when there is none
    reason: str = ""  # why not, in one line


# -- rules


def gsm8k(prompt: str, completion: str, answer: str) -> float:
    """Whether the completion's last number, after #### if it has that, is the answer's (Cobbe et al. 2021, arXiv 2110.14168).

    >>> gsm8k("", "She has 3 + 4 = 7, so #### $1,007.00", "... #### 1007"), gsm8k("", "It is 10-5=5.", "#### 6")
    (1.0, 0.0)
    """
    wanted = _last(answer)
    if wanted is None:
        raise ValueError("the answer has no number")
    return float(_last(completion) == wanted)


def _last(text: str) -> Decimal | None:
    found = NUMBER.findall(text.rpartition(MARK)[2]) or NUMBER.findall(text)
    return Decimal(found[-1][0] + found[-1][1].replace(",", "")) if found else None


def digits(prompt: str, completion: str, answer: str) -> float:
    """Share of the answer's characters that the completion has in their places; white space around either does not count.

    >>> digits("", " 1299", "1234")
    0.5
    """
    wanted, said = answer.strip(), completion.strip()
    if not wanted:
        raise ValueError("the answer is empty")
    return sum(one == other for one, other in zip(wanted, said, strict=False)) / len(wanted)


RULES: dict[str, Reward] = {"gsm8k": gsm8k, "digits": digits}


def reward_of(name: str) -> Reward:
    """A rule by its name, or the function that FILE.py:FUNCTION names.

    Raises Refused when there is none, or it does not take prompt, completion and answer.
    """
    if name in RULES:
        return RULES[name]
    file, _, wanted = name.rpartition(":")
    if not file.endswith(".py") or not wanted:
        raise Refused(f"align.reward={name} is no reward; it is {', '.join(RULES)}, model, or FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise Refused(f"align.reward={name}: there is no file {file}; name one that exists")
    function = getattr(_module(Path(file), name), wanted, None)
    if not callable(function):
        raise Refused(f"align.reward={name}: {file} has no function {wanted}; define {wanted}(prompt, completion, answer) in it")
    try:
        inspect.signature(function).bind("prompt", "completion", "answer")
    except TypeError as error:
        raise Refused(f"align.reward={name}: {wanted} is called as {wanted}(prompt, completion, answer), but {error}; mend it") from error
    except ValueError:
        pass  # some of those written in C do not tell
    return function  # type: ignore[no-any-return]


def _module(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside it can be imported, as by a script
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise Refused(f"align.reward={name}: {path} cannot be imported ({_line(error)}); mend it") from error
    return module


# -- the process that asks them


class Judge:
    """Scores texts in a process of its own, at most `timeout` seconds each.

    Raises Refused at once when the reward does not exist; afterwards whatever a function does costs its own sample alone.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout = name, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def score(self, items: Sequence[tuple[str, str, str]], beat: Callable[[], None] = lambda: None) -> list[Score]:
        """Of each (prompt, completion, answer); `beat` is called after each, so that whoever waits can say that he lives."""
        done = list[Score]()
        while len(done) < len(items):
            try:
                self._start()
            except Refused as error:  # the file has gone since
                return done + [Score(math.nan, error.problems[0])] * (len(items) - len(done))
            with suppress(OSError):  # it has ended meanwhile; then no answer comes either
                self._pipe.send(list(items[len(done) :]))
            while len(done) < len(items) and (found := self._answer(self.timeout)) is not None:
                done.append(Score(*found))
                beat()
            if len(done) < len(items):
                done.append(Score(math.nan, self._end()))
                beat()
        return done

    def _start(self) -> None:
        """Have a process that runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "real.rewards", str(theirs.fileno()), self.name, str(self.timeout)]
        known = os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        # What a function prints goes where errors go: standard output is the program's own.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], env=known, start_new_session=True
        )
        theirs.close()
        problem = self._answer(START)
        if problem is None:
            ended = self._end()
            raise Refused(f"align.reward={self.name}: its file was imported, and {ended}; mend it")
        if problem:
            self.close()
            raise Refused(problem)

    def _answer(self, seconds: float) -> Any:
        """What it says within so many seconds; nothing when it does not."""
        try:
            return self._pipe.recv() if self._pipe.poll(seconds) else None
        except (EOFError, OSError):
            return None

    def _end(self) -> str:
        """Why it did not answer; the next text gets another process."""
        assert self._process is not None
        if self._pipe.poll():  # the pipe closes a moment before its process has ended
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        status = self._process.poll()
        self.close()
        if status is None:
            return f"it took longer than {self.timeout:g} s"
        return f"its process was ended by {signal.Signals(-status).name}" if status < 0 else f"its process ended with status {status}"

    def close(self) -> None:
        """End the process, and those that it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._pipe.close()
            self._process = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _serve(pipe: Connection, name: str, timeout: float) -> None:
    """Say whether the reward exists, then score what comes, text by text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks decides when this ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        reward = reward_of(name)
    except Refused as error:
        pipe.send(error.problems[0])
        return
    pipe.send("")
    while True:
        try:
            items = pipe.recv()
        except (EOFError, OSError):
            return
        for item in items:
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout)  # ends it, should whoever asked have died meanwhile
            found = _judge(reward, item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(found)


def _judge(reward: Reward, item: tuple[str, str, str]) -> tuple[float, str]:
    try:
        value = reward(*item)
        if not hasattr(type(value), "__float__"):
            return math.nan, f"it returned {type(value).__name__}, which is no number"
        number = float(value)
    except BaseException as error:
        return math.nan, f"it raised {_line(error)}"
    return (number, "") if math.isfinite(number) else (math.nan, f"it returned {number}")


def _line(error: BaseException) -> str:
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = "which cannot be printed"
    return f"{type(error).__name__}: {said}"[:200].rstrip(": ")


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2], float(sys.argv[3]))
