"""`python -m tests.kit FOLDER [profile=FILE] [seconds=500] [table=FILE] [base=WORDS]`: foretell, execute what is missing, compare.

The prediction of every configuration is in FOLDER/foretold.jsonl before the first one runs. They run in one process, which is started
again without the configuration that ended it; results are in FOLDER/measured.jsonl as they come, the comparison in table.md and table.csv.
The same command goes on where it stopped.
"""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from conf.errors import Refused
from conf.program import split
from tests.kit import table
from tests.kit.foretell import AGAIN, MEASURED, append, foretell, now, read
from tests.kit.plans import BASE, TABLE, Row, ordered, plan_of, rows, seconds

OPTIONS = {"profile": ("", ""), "seconds": ("500", ""), "table": ("", ""), "base": (BASE, ""), "until": ("", "")}
LIMIT = 240.0  # seconds after which a configuration is given up
GRACE = 15.0  # seconds after its time at which the process is ended
POLL = 0.2


def main(args: Sequence[str]) -> int:
    began = time.monotonic()
    told, words = split(args, OPTIONS)
    if len(words) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder, profile = Path(words[0]), told["profile"]
    folder.mkdir(parents=True, exist_ok=True)
    found = rows(Path(told["table"]).read_text() if told["table"] else TABLE, told["base"])
    if told["until"]:
        return worker(found, folder, float(told["until"]), profile)
    until = began + float(told["seconds"])
    command = [sys.executable, "-m", "tests.kit", *args, f"until={until}"]
    first = subprocess.Popen(command, stdin=subprocess.PIPE)  # imports while we foretell, and waits
    costs(found, folder, profile)
    settle(folder, 2, "died: it ended the process twice")
    status = supervise(command, folder, until, first)
    print("\n" + table.write(folder, profile), flush=True)
    return status


def worker(found: list[Row], folder: Path, until: float, profile: str) -> int:
    """What is missing, when whoever started this says that all is foretold."""
    from real.cluster import check
    from tests.kit.execute import work

    try:
        check(plan_of(found[0], profile))  # a machine without the device executes nothing, and leaves no result
    except Refused as refused:
        print(f"tests.kit: {refused.problems[0]}", file=sys.stderr)
        return 2
    if not sys.stdin.readline():
        return 2
    told = foretell(found, folder, profile)
    work(ordered(found, costs(found, folder, profile)), told, folder, until, profile)
    return 0


def costs(found: Sequence[Row], folder: Path, profile: str) -> dict[str, float]:
    """Foretell what is not foretold yet; returns the seconds that each row is expected to take."""
    told = foretell(found, folder, profile)
    return {row.name: seconds(row, plan_of(row, profile), *(told[row.name][name] for name in ("parameters", "step_time"))) for row in found}


def supervise(command: Sequence[str], folder: Path, until: float, process: "subprocess.Popen[bytes]") -> int:
    """Wait for the process; one that falls over or hangs is started again without what it was at. Returns the last one's status."""
    while True:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(b"go\n")
            process.stdin.close()
        why = _watched(process, folder, until)
        lost = settle(folder, 1, why)
        if why == "stopped" or not (lost or process.returncode == AGAIN):
            return 0 if why == "stopped" else process.returncode
        process = subprocess.Popen(command, stdin=subprocess.PIPE)


def _watched(process: "subprocess.Popen[bytes]", folder: Path, until: float) -> str:
    """Wait until it has ended; returns what is to be said of the row that it was at."""
    began = time.monotonic()
    while process.poll() is None:
        time.sleep(POLL)
        at = max([began, *(row["clock"] for row in open_rows(folder))])
        if time.monotonic() > until + GRACE or time.monotonic() > at + LIMIT:
            process.kill()
            process.wait()
            return "stopped" if time.monotonic() > until + GRACE else f"died: no end after {LIMIT:.0f} s"
    return f"died: the process ended with status {process.returncode}"


def open_rows(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    """Beginnings without an end, the last of each row."""
    last = {(row["name"], row["plan"]): row for row in read(folder / MEASURED)}
    return [row for row in last.values() if row["status"] == "began"]


def settle(folder: Path, times: int, why: str) -> int:
    """Say of rows that have begun so often without an end why they have none; returns how many."""
    begun = Counter((row["name"], row["plan"]) for row in read(folder / MEASURED) if row["status"] == "began")
    lost = [row for row in open_rows(folder) if begun[row["name"], row["plan"]] >= times]
    for row in lost:
        append(folder / MEASURED, {"at": now(), "name": row["name"], "plan": row["plan"], "status": why})
    return len(lost)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
