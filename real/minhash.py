"""Near-duplicates: MinHash signatures of documents, cut into bands that near-equal documents share.

A document is the set of its runs of five words, case and punctuation left out. Of each of 14 × 8 hash functions the smallest value
over the set is kept; two documents agree in one of them with a probability that is the Jaccard index s of their sets, so in all 8 of
at least one of 14 bands with 1 − (1 − s⁸)¹⁴ (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4): 0.05 at 0.5, 0.92 at 0.8,
1.00 at 0.9. Who shares a band is found by sorting, range by range, so memory is bounded by a range.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BANDS, ROWS, WORDS = 14, 8, 5
BLOCK = 8192  # runs
ENTRY = np.dtype([("key", "<u8"), ("id", "S32")])  # of a band: its hash, and the document's name (32 hexadecimal digits, or more)
Hashes = NDArray[np.uint64]
_WORD = re.compile(r"\w+")
_PLAIN = bytes(ord(c.lower()) if _WORD.fullmatch(c) else 32 for c in map(chr, range(128))) + bytes(128)
_dice = np.random.default_rng(20260101)
_ODD: Hashes = _dice.integers(1, 2**63, BANDS * ROWS + WORDS, np.uint64) * np.uint64(2) + np.uint64(1)
_FACTORS, _PLACES = _ODD[: BANDS * ROWS], _ODD[BANDS * ROWS :]
_PLUS: Hashes = _dice.integers(0, 2**63, BANDS * ROWS, np.uint64)


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case.

    >>> words_of("Don't, été!") == ["don", "t", "été"]
    True
    """
    if text.isascii():  # ten times as fast, and the same
        return text.encode().translate(_PLAIN).decode().split()
    return _WORD.findall(text.lower())


def shingles(text: str) -> set[tuple[str, ...]]:
    """The runs of five words of which a document is the set; one shorter run where there are no five.

    >>> sorted(shingles("A b, c. D e f"))
    [('a', 'b', 'c', 'd', 'e'), ('b', 'c', 'd', 'e', 'f')]
    """
    words = words_of(text)
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))} if words else set()


def entries(ids: Sequence[str], texts: Sequence[str], apart: Hashes | None = None) -> NDArray[Any]:
    """The bands of all documents, sorted by their hash; documents without a word have none.

    With a number for each document in `apart`, bands of different numbers never meet.
    """
    words = [words_of(text) for text in texts]
    known = [i for i, found in enumerate(words) if found]
    if not known:
        return np.empty(0, ENTRY)
    hashed, starts = _runs([words[i] for i in known])
    bands = _bands(hashed, starts)
    names = np.array([ids[i] for i in known], "S")
    found = np.empty(bands.size, [("key", "<u8"), ("id", names.dtype)])
    found["key"] = (bands if apart is None else mixed(bands ^ apart[known])).ravel()
    found["id"] = np.tile(names, BANDS)
    return found[np.argsort(found["key"], kind="stable")]


def _runs(documents: list[list[str]]) -> tuple[Hashes, NDArray[np.int64]]:
    """The hash of every run of five words of every document, and where each document begins."""
    from pandas.util import hash_array

    lengths = np.array([len(words) for words in documents])
    flat = np.array([word for words in documents for word in words], object)
    hashed = hash_array(flat, categorize=True).astype(np.uint64)
    counts = np.maximum(1, lengths - WORDS + 1)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    first = np.repeat(np.concatenate([[0], np.cumsum(lengths)[:-1]]) - starts, counts) + np.arange(counts.sum())
    last = np.repeat(np.cumsum(lengths), counts) - 1
    runs = np.zeros(len(first), np.uint64)
    for place in range(WORDS):
        runs += hashed[np.minimum(first + place, last)] * _PLACES[place] * (first + place <= last)
    return mixed(runs), starts


def _bands(runs: Hashes, starts: NDArray[np.int64]) -> Hashes:
    """The hash of each band of each document, bands outermost."""
    least = np.empty((BANDS * ROWS, len(starts)), np.uint64)
    ends = np.append(starts[1:], len(runs))
    begin = 0
    while begin < len(starts):  # a block at a time stays in the cache
        end = max(begin + 1, int(np.searchsorted(ends, starts[begin] + BLOCK, "right")))
        block, places = runs[starts[begin] : ends[end - 1]], starts[begin:end] - starts[begin]
        values = np.empty_like(block)
        for row in range(BANDS * ROWS):
            np.multiply(block, _FACTORS[row], out=values)
            np.add(values, _PLUS[row], out=values)
            np.minimum.reduceat(values, places, out=least[row, begin:end])
        begin = end
    bands = np.repeat(np.arange(BANDS, dtype=np.uint64)[:, None], len(starts), 1)
    for row in range(ROWS):
        bands = mixed(bands * _PLACES[0] + (least[row::ROWS] >> np.uint64(32)))
    return bands


def mixed(x: Hashes) -> Hashes:
    """The finaliser of MurmurHash3: every bit of the input moves every bit of the result."""
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


def between(bands: NDArray[Any], first: int, end: int) -> NDArray[Any]:
    """Entries of a sorted table whose hash lies in a range, end excluded; nothing else of it is read."""
    keys = bands["key"]
    return np.asarray(bands[np.searchsorted(keys, np.uint64(first)) : None if end >= 2**64 else np.searchsorted(keys, np.uint64(end))])


def pairs(tables: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Of all documents that share a band, each with the one of the smallest id among them, (n, 2), sorted and without repeats."""
    met = np.concatenate(tables) if tables else np.empty(0, ENTRY)
    met = met[np.argsort(met["key"], kind="stable")]
    same = met["key"][1:] == met["key"][:-1]
    found = np.sort(met[np.append(same, False) | np.insert(same, 0, False)], order=["key", "id"])  # what is alone goes first
    heads = np.concatenate([[True], found["key"][1:] != found["key"][:-1]]) if len(found) else np.empty(0, bool)
    group = np.maximum.accumulate(np.where(heads, np.arange(len(found)), 0))
    other = found["id"] != found["id"][group]
    return np.unique(np.stack([found["id"][group][other], found["id"][other]], 1), axis=0)


def components(edges: NDArray[Any]) -> Iterator[tuple[str, str]]:
    """(The smallest id of its component, another of it) for all documents that are joined, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ids, numbers = np.unique(edges.ravel(), return_inverse=True)
    left, right = numbers.reshape(-1, 2).T
    _, labels = connected_components(coo_array((np.ones(len(left), bool), (left, right)), shape=(len(ids), len(ids))), directed=False)
    least = np.full(labels.max(initial=-1) + 1, len(ids))
    np.minimum.at(least, labels, np.arange(len(ids)))
    for number, label in enumerate(labels):
        if least[label] != number:
            yield ids[least[label]].decode(), ids[number].decode()
