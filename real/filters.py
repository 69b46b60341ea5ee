"""Which documents are worth training on: the published rules of Gopher, C4 and FineWeb, each with a name that is counted.

Gopher: Rae et al. 2021, section A1 (quality and repetition). C4: Raffel et al. 2020, section 2.2, with datatrove's least numbers of words
and sentences, which FineWeb used. FineWeb: Penedo et al. 2024, section 3.6, which takes Gopher's rules and C4's without the one on
the ends of lines. Words are cut much as spaCy cuts English, whose words datatrove counts and so FineWeb did: marks count as words where a
share of words is asked for, and do not where their number or length is.
"""

import re
from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
ENDS = (".", "!", "?", '"', "”", "…", "'")
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*")
NOTICES = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # most of a text's characters that its commonest run of so many words may hold
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # and that all repeats of runs may hold
_APART = r"\[\]§%=—–,:;!?¿¡(){}<>_#*&\"'”“`‘´’‚„»«…$£€|"  # marks that are cut off what they stand beside
_LETTERS = r"[\w\u2060]+"  # and the joiner of words, which shows nothing
_WORD = re.compile("|".join((
    r"https?://\S+",
    r"(?<!\w)[-+]?\d+(?:[.,:]\d+)*",
    r"(?<=\w)['’](?:s|t|re|ve|ll|d|m)\b",
    rf"(?:(?<!\w)[-/~\\^@+.]+)?{_LETTERS}(?:(?:::|[(\[.@+*|\\^~&\"]){_LETTERS})*",
    r"\.{2,}",
    rf"[{_APART}]",
    rf"[^\w\s{_APART}]+",
)))  # fmt: skip
_SENTENCE = re.compile(r"[.!?…]+[\"”')\]]*(?:\s|$)")
_PLACES = np.random.default_rng(7).integers(1, 2**62, max(REPEATED), np.uint64) * np.uint64(2) + np.uint64(1)


class Page:
    """A text as the rules look at it."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @cached_property
    def words(self) -> list[str]:
        """Words, numbers and marks, much as spaCy divides English, which FineWeb's own filters count."""
        return _WORD.findall(self.text)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(word) for word in self.words], np.int64)

    @cached_property
    def named(self) -> NDArray[np.int64]:
        """Lengths of the words that are no marks."""
        return self.lengths[[word[0].isalnum() or (len(word) > 1 and word[-1].isalnum()) for word in self.words]]

    @cached_property
    def numbers(self) -> NDArray[np.uint64]:
        """A number for each word, the same for the same one."""
        known: dict[str, int] = {}
        return np.array([known.setdefault(word, len(known) + 1) for word in self.words], np.uint64)

    def runs(self, size: int) -> NDArray[np.uint64]:
        """A hash of each run of so many words."""
        count = max(0, len(self.words) - size + 1)
        total = np.zeros(count, np.uint64)
        for place in range(size):
            total += self.numbers[place : place + count] * _PLACES[place]
        return total

    def share_of(self, starts: NDArray[np.int64], size: int) -> float:
        """Share of the words' characters that lie in runs of so many words from these places, each counted once."""
        edges = np.zeros(len(self.words) + 1, np.int64)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + size, -1)
        return float(self.lengths[np.cumsum(edges[:-1]) > 0].sum() / self.lengths.sum())


def judge(text: str, preset: str) -> tuple[str, str | None]:
    """The text without the lines that a preset drops, and the name of the first rule that refuses it.

    >>> judge("Too short.", "gopher")
    ('Too short.', 'words')
    """
    for keeps, rules in PRESETS[preset]:
        if keeps:
            text = "\n".join(line for line in Page(text).lines if keeps(line))
        page = Page(text)
        if not page.words:
            return text, "no line left"
        if refused := next((name for name, refuses in rules if refuses(page)), None):
            return text, refused
    return text, None


# -- lines


def _is_prose(line: str) -> bool:
    low = line.lower()
    return len(line.split()) >= 3 and not any(notice in low for notice in NOTICES)


def _is_sentence(line: str) -> bool:
    return line.endswith(ENDS[:5]) and not line.endswith("...") and _is_prose(line)


# -- Gopher, quality


def _words(page: Page) -> bool:
    return not 50 <= len(page.named) <= 100_000


def _word_length(page: Page) -> bool:
    return not 3 <= float(page.named.mean()) <= 10


def _symbols(page: Page) -> bool:
    marks = page.text.count("#"), page.text.count("...") + page.text.count("…")
    return max(marks) > 0.1 * len(page.words)


def _bullets(page: Page) -> bool:
    return sum(line.startswith(BULLETS) for line in page.lines) > 0.9 * len(page.lines)


def _ellipses(page: Page) -> bool:
    return sum(line.endswith(("...", "…")) for line in page.lines) > 0.3 * len(page.lines)


def _letters(page: Page) -> bool:
    return sum(any(c.isalpha() for c in word) for word in page.words) < 0.8 * len(page.words)


def _stop_words(page: Page) -> bool:
    return len(STOP_WORDS & {word.lower() for word in page.words}) < 2


# -- Gopher, repetition: what counts is every occurrence after the first


def repeats(parts: list[str]) -> tuple[float, float]:
    """Share of parts that have been there before, and of the characters that they hold.

    >>> repeats(["a", "b", "a", "a"])
    (0.5, 0.5)
    """
    seen: set[str] = set()
    again = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
    return len(again) / max(1, len(parts)), sum(map(len, again)) / max(1, sum(map(len, parts)))


def _lines_again(page: Page) -> bool:
    share, characters = repeats(page.lines)
    return share > 0.3 or characters > 0.2


def _paragraphs_again(page: Page) -> bool:
    share, characters = repeats(page.paragraphs)
    return share > 0.3 or characters > 0.2


def _commonest_run(page: Page) -> bool:
    for size, most in TOP.items():
        runs = page.runs(size)
        values, counts = np.unique(runs, return_counts=True)
        if len(counts) and counts.max() > 1 and page.share_of(np.flatnonzero(runs == values[counts.argmax()]), size) > most:
            return True
    return False


def _runs_again(page: Page) -> bool:
    for size, most in REPEATED.items():
        runs = page.runs(size)
        again = np.ones(len(runs), bool)
        again[np.unique(runs, return_index=True)[1]] = False
        if not again.any():
            return False  # what has no repeat of five words has none of six
        if page.share_of(np.flatnonzero(again), size) > most:
            return True
    return False


# -- C4, pages


def _braces(page: Page) -> bool:
    return "{" in page.text


def _lorem(page: Page) -> bool:
    return "lorem ipsum" in page.text.lower()


def _sentences(page: Page) -> bool:
    return len(_SENTENCE.findall(page.text)) < 5


# -- FineWeb


def _unfinished(page: Page) -> bool:
    return sum(line.endswith(ENDS) for line in page.lines) <= 0.12 * len(page.lines)


def _lists(page: Page) -> bool:
    return sum(len(line) < 30 for line in page.lines) >= 0.67 * len(page.lines)


def _characters_again(page: Page) -> bool:
    return repeats(page.lines)[1] >= 0.1


Rules = tuple[tuple[str, Callable[[Page], bool]], ...]
QUALITY: Rules = (
    ("words", _words), ("word length", _word_length), ("symbols", _symbols), ("bullets", _bullets), ("ellipses", _ellipses),
    ("letters", _letters), ("stop words", _stop_words),
)  # fmt: skip
REPETITION: Rules = (
    ("repeated lines", _lines_again), ("repeated paragraphs", _paragraphs_again), ("commonest run", _commonest_run),
    ("repeated runs", _runs_again),
)  # fmt: skip
C4: Rules = (("braces", _braces), ("lorem ipsum", _lorem), ("sentences", _sentences))
FINEWEB: Rules = (("unfinished lines", _unfinished), ("short lines", _lists), ("characters in repeated lines", _characters_again))
PRESETS: dict[str, tuple[tuple[Callable[[str], bool] | None, Rules], ...]] = {  # in turn: lines that stay, and what refuses the rest
    "gopher": ((None, QUALITY + REPETITION),),
    "c4": ((_is_sentence, C4),),
    "fineweb": ((None, REPETITION + QUALITY), (_is_prose, C4 + FINEWEB)),
}
