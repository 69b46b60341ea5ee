"""Winnowing: runs of N words that stand more than once among many documents, without comparing all.

Two hikers told to leave a flag at the lowest point of every w steps leave it at the same points of the same path; whoever finds
another's flag compares the path around it. Steps are the hashes of k = N // 2 consecutive words, and w = N − k + 1 of them span N
words: any N words that stand twice hold the same flag twice (Schleimer, Wilkerson and Aiken 2003). Only the windows of N words
around such flags are hashed and compared, so those found are exactly the ones that a suffix array finds, unless two different
windows have the same 64 bits: of n windows compared n² / 2⁶⁵ pairs are expected to, 0.03 of 10⁹.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from real.minhash import Hashes, mixed

ENTRY = np.dtype([("key", "<u8"), ("document", "<u4"), ("offset", "<u4")])  # of a run of words: its hash, and where it begins
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2⁶⁴
_WORD = re.compile(r"\S+")
Places = NDArray[np.int64]  # of a shard's words, by their number in it
Mask = NDArray[np.bool_]


def words_of(texts: Any) -> tuple[Hashes, Places]:
    """The hash of every word (\\S+) of a column of texts, one text after the other, and how many words each has."""
    import pyarrow.compute as pc
    from pandas.util import hash_array

    split = pc.utf8_split_whitespace(texts).combine_chunks()
    words = split.flatten()
    coded = words.dictionary_encode()
    hashed = hash_array(coded.dictionary.to_numpy(zero_copy_only=False), categorize=False).astype(np.uint64)
    real = pc.binary_length(words).to_numpy() > 0  # at the ends of a text white space stands beside an empty word
    owners = np.repeat(np.arange(len(split)), pc.list_value_length(split).to_numpy())
    return hashed[coded.indices.to_numpy()[real]], np.bincount(owners[real], minlength=len(split))


def runs(words: Hashes, length: int) -> Hashes:
    """The hash of every `length` consecutive words: a polynomial modulo 2⁶⁴, from the difference of two prefixes.

    >>> found = runs(np.array([5, 6, 7, 5, 6], np.uint64), 2)
    >>> len(found), bool(found[0] == found[3]), bool(found[0] == found[1])
    (4, True, False)
    """
    powers, inverse = (np.cumprod(np.full(len(words), base, np.uint64)) for base in (_BASE, pow(_BASE, -1, 2**64)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * powers)])
    return mixed((sums[length:] - sums[:-length]) * inverse[: max(0, len(words) - length + 1)])


def anchors(words: Hashes, counts: Places, length: int) -> tuple[Hashes, Places]:
    """Hash and place of each run of k words that is the least of w neighbours within a document; all of them where several are.

    A run is one when the greatest of the least values of all w-neighbourhoods around it is its own.
    """
    short = length // 2
    width, whole = length - short + 1, _windows(counts, length)
    if not whole.any():
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    grams = runs(words, short)
    least = np.where(whole, sliding(np.minimum, grams, width), np.uint64(0))
    places = np.flatnonzero(sliding(np.maximum, np.pad(least, width - 1), width) == grams)
    return grams[places], places


def sliding(best: np.ufunc, values: Hashes, width: int) -> Hashes:
    """The least, or the greatest, of every `width` neighbours, by doubling.

    >>> sliding(np.minimum, np.array([3, 1, 4, 1, 5, 9]), 3).tolist()
    [1, 1, 1, 1]
    """
    reach = 1
    while reach < width:
        step = min(reach, width - reach)
        values, reach = best(values[:-step], values[step:]), reach + step
    return values


def entries(keys: Hashes, places: Places, counts: Places) -> NDArray[Any]:
    """Runs of words with the document and the offset of their first, sorted by hash."""
    starts = np.cumsum(counts) - counts
    order = np.argsort(keys, kind="stable")
    found, places = np.empty(len(keys), ENTRY), places[order]
    document = np.searchsorted(starts, places, "right") - 1
    found["key"], found["document"], found["offset"] = keys[order], document, places - starts[document]
    return found


def again(met: NDArray[Any], shards: Places) -> tuple[NDArray[Any], Places]:
    """Entries whose hash occurs more than once, sorted by it, with their shards."""
    order = np.argsort(met["key"], kind="stable")  # the tables are sorted: this merges them
    same = np.diff(met["key"][order]) == 0
    order = order[np.append(same, False) | np.insert(same, 0, False)] if len(order) else order
    return met[order], shards[order]


def firsts(keys: Hashes, ranks: Sequence[NDArray[Any]]) -> Mask:
    """Which of those with the same hash, which are neighbours, is the least by all ranks, the foremost rank counting most.

    >>> firsts(np.array([7, 7, 7, 9]), [np.array([2, 1, 1, 5]), np.array([0, 8, 4, 0])]).tolist()
    [False, False, True, True]
    """
    heads = np.flatnonzero(np.append(True, np.diff(keys) != 0)) if len(keys) else np.empty(0, np.int64)
    sizes = np.diff(np.append(heads, len(keys)))
    alive = np.ones(len(keys), bool)
    for rank in ranks if len(keys) else ():
        left = np.where(alive, rank, np.iinfo(rank.dtype).max)
        alive &= left == np.repeat(np.minimum.reduceat(left, heads), sizes)
    return alive


def near(flags: Places, counts: Places, length: int) -> Places:
    """The windows of `length` words that hold one of these anchors: w of them begin at most w − 1 words before it."""
    width = length - length // 2 + 1
    around = _spread(np.maximum(flags - width + 1, 0), flags + 1, int(counts.sum()))
    whole = _windows(counts, length)
    return np.flatnonzero(around[: len(whole)] & whole)


def cut(places: NDArray[Any], counts: Places, length: int) -> Mask:
    """Words of a shard that a repeated window covers, unless one of those is the first of its kind."""
    words, first = flat(places, counts), places["first"] == 1
    later, spared = (_spread(words[which], words[which] + length, int(counts.sum())) for which in (~first, first))
    return later & ~spared


def without(text: str, gone: Mask) -> tuple[str, list[tuple[int, str]]]:
    """A text without some of its words, each with the white space after it; and what went, with the number of its first word.

    >>> without("a  b c\\nd e", np.array([False, True, True, False, True]))
    ('a  d ', [(1, 'b c\\n'), (4, 'e')])
    """
    starts = [word.start() for word in _WORD.finditer(text)] + [len(text)]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], gone, [False]]))).tolist()
    cuts = [(starts[first], starts[end]) for first, end in zip(edges[::2], edges[1::2], strict=True)]
    bounds = [0, *(at for pair in cuts for at in pair), len(text)]
    rest = "".join(text[begin:end] for begin, end in zip(bounds[::2], bounds[1::2], strict=True))
    return rest, [(first, text[begin:end]) for first, (begin, end) in zip(edges[::2], cuts, strict=True)]


def flat(places: NDArray[Any], counts: Places) -> Places:
    """Places as numbers of words in the shard."""
    return (np.cumsum(counts) - counts)[places["document"]] + places["offset"]


def _windows(counts: Places, length: int) -> Mask:
    """Whether a window of `length` words that begins at a word ends in the same document."""
    words = int(counts.sum())
    ends = np.repeat(np.cumsum(counts), counts)
    return (ends - np.arange(words) >= length)[: max(0, words - length + 1)]


def _spread(begin: Places, end: Places, words: int) -> Mask:
    """Which of a shard's words lie in one of these stretches."""
    steps = np.bincount(begin, minlength=words + 1) - np.bincount(end, minlength=words + 1)
    return np.cumsum(steps)[:words] > 0
