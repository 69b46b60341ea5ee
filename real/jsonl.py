"""Files of JSON Lines that a plan names: conversations, preferences, prompts; which of their lines a task reads, and which are held out."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.alignment import Align
from conf.corpus import LINES
from conf.errors import Refused
from conf.plan import Finetune


def named(tune: Finetune | Align, holds: str) -> Path:
    """The file that `finetune.data` or `align.data` names, a line of which `holds` this or that.

    Raises Refused where no file is named, or it is not there.
    """
    node = type(tune).__name__.lower()
    if not tune.data:
        raise Refused(f"{node}.method={tune.method} needs a file; name JSON Lines with {node}.data=FILE, a line holds {holds}")
    if not Path(tune.data).is_file():
        raise Refused(f"{node}.data={tune.data} is no file; name JSON Lines, a line holds {holds}")
    return Path(tune.data)


def parts(path: Path, holds: str) -> Iterator[tuple[int, int]]:
    """First and last but one of each LINES lines that are not blank, for a task each.

    Raises Refused where there is none.
    """
    with path.open("rb") as file:
        count = sum(bool(line.strip()) for line in file)
    if not count:
        raise Refused(f"{path} is empty; a line holds {holds}")
    for first in range(0, count, LINES):
        yield first, min(first + LINES, count)


def lines(path: str, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, from the `first` of them to before the one `stop`, each with its number in the file."""
    seen = 0
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if first <= seen and (stop is None or seen < stop):
                yield number, line
            seen += 1


def row_of(line: str) -> dict[str, Any]:
    """The object of a line.

    Raises ValueError when it is none.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    return row


def held(asked: str, share: float) -> bool:
    """Whether a prompt is one of the share that is kept for evaluation; the same prompt always is, or never."""
    return int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=4).digest(), "big") < share * 2**32
