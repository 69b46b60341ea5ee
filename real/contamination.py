"""Texts that hold a piece of an evaluation set: runs of 13 words in common (Brown et al. 2020, appendix C).

A model that has read the answers is not examined by the questions. Words are compared as in real/minhash.py: case and punctuation do
not count.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from real.minhash import words_of
from real.pages import read

RUN = 13


class Hit(NamedTuple):
    """The first run in common, and where the evaluation set has it."""

    run: str
    file: str
    number: int


def runs(text: str) -> Iterator[str]:
    """Runs of 13 words; a shorter text has none: what is that short is found in innocent places too."""
    words = words_of(text)
    for start in range(len(words) - RUN + 1):
        yield " ".join(words[start : start + RUN])


@lru_cache(1)
def index(files: tuple[str, ...], text_field: str) -> dict[str, tuple[str, int]]:
    """Where each run of the evaluation sets stands first."""
    found: dict[str, tuple[str, int]] = {}
    for file in files:
        for page in read(Path(file), text_field, float("inf"), Counter()):
            for run in runs(page.text):
                found.setdefault(run, (file, page.number))
    return found


def hit(text: str, files: tuple[str, ...], text_field: str) -> Hit | None:
    """The first run that an evaluation set has too."""
    known = index(files, text_field)
    return next((Hit(run, *known[run]) for run in runs(text) if run in known), None)
