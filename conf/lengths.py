"""Lengths of completions as they were seen: a file of token counts, in any order.

CSV          a header, and a column of counts: the only one, or that which FILE:COLUMN names
JSON Lines   a count a line, or an object with `tokens`, which is a count or a list of tokens, as in the journal of samples of a run
"""

import csv
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

Lengths = tuple[float, ...]  # in rising order


def file_of(said: str) -> tuple[Path, str]:
    """The file and the column of FILE or FILE:COLUMN; a file whose name has a colon is a file.

    >>> file_of("seen.csv:decode")[1]
    'decode'
    """
    name, colon, column = said.rpartition(":")
    return (Path(name), column) if colon and not Path(said).is_file() else (Path(said), "")


def lengths_of(said: str) -> Lengths:
    """The counts of `align.lengths`.

    Raises ValueError with one line for a file that holds none.
    """
    path, column = file_of(said)
    if not path.is_file():
        raise ValueError(f"align.lengths={said} is no file; give a CSV or JSON Lines file of token counts, as FILE or FILE:COLUMN")
    return _read(path, column, path.stat().st_mtime_ns)


@cache
def _read(path: Path, column: str, changed: int) -> Lengths:
    """Read once for each content."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"align.lengths={path} is no text ({error}); give a CSV or JSON Lines file of token counts") from error
    lines = _objects(path, text, column or "tokens") if text.lstrip()[:1] in {*"{0123456789"} else _column(path, text, column)
    found = tuple(sorted(_count(path, number, value) for number, value in lines))
    if not found:
        raise ValueError(f"align.lengths={path} holds no token counts; give a line for each completion")
    return found


def _objects(path: Path, text: str, name: str) -> list[tuple[int, Any]]:
    """Numbers of lines and what they say; a journal's notes of steps say nothing."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {"step": None}
        except ValueError as error:
            raise ValueError(f"align.lengths={path}, line {number}: {error}; write a count, or an object with {name}") from error
        if not isinstance(row, dict):
            found.append((number, row))
        elif name in row:
            found.append((number, len(row[name]) if isinstance(row[name], list) else row[name]))
        elif "step" not in row:
            raise ValueError(f"align.lengths={path}, line {number} has no {name}; it has {', '.join(row) or 'nothing'}")
    return found


def _column(path: Path, text: str, name: str) -> list[tuple[int, Any]]:
    rows = [(number, row) for number, row in enumerate(csv.reader(text.splitlines()), 1) if row]
    names = rows[0][1] if rows else []
    if not name and len(names) > 1:
        raise ValueError(f"align.lengths={path} has the columns {', '.join(names)}; choose one with align.lengths={path}:COLUMN")
    if name and name not in names:
        raise ValueError(f"align.lengths={path}:{name} is no column of the file; it has {', '.join(names)}")
    place = names.index(name) if name else 0
    return [(number, row[place] if len(row) > place else "") for number, row in rows[1:]]


def _count(path: Path, number: int, value: Any) -> float:
    """A number of tokens; of an answer that ended at once it is 0, and counts as 1, its end."""
    try:
        count = float(value)
    except (TypeError, ValueError):
        count = math.nan
    if not 0 <= count < math.inf:
        raise ValueError(f"align.lengths={path}, line {number}: {value!r} is no count of tokens; write whole numbers from 0 on")
    return max(1.0, count)
