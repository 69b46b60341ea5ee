"""Best-fit packing: which pieces of which documents make up each training sequence, as an index over the token shards.

Documents longer than a sequence are cut into sequences and a rest; nothing else is cut, nothing is dropped. Pieces, longest first, each go
where they leave the least room (best-fit decreasing; Ding et al. 2024, "Fewer truncations improve language modeling", section 3).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.plan import Plan
from real.shards import read_index
from real.stage import Manifest, Task

VERSION = 1
PIECE = np.dtype([("pack", "<i4"), ("length", "<i4"), ("start", "<i8")])  # start: in the stream of all shards of the split


def config(plan: Plan) -> dict[str, Any]:
    return {"version": VERSION, "seq_len": plan.train.seq_len}


def tasks(tokens: Manifest, splits: Sequence[str], seq_len: int) -> Iterator[Task]:
    """One for each split."""
    for split in splits:
        held = [output for output in tokens.paths(".idx") if output["path"].startswith(f"{split}-")]
        paths = [str(tokens.folder / output["path"]) for output in held]
        yield Task(split, pack, (paths, seq_len), tuple(output["sha256"] for output in held))


def pack(folder: Path, name: str, indices: list[str], seq_len: int) -> dict[str, Any]:
    lengths = np.concatenate([read_index(Path(path))[1] for path in indices] or [np.zeros(0, np.int64)]).astype(np.int64)
    found = packed(lengths, seq_len)
    np.save(folder / f"{name}.npy", found)
    packs = int(found["pack"].max(initial=-1)) + 1
    return {"packs": packs, "pieces": len(found), "tokens": int(lengths.sum()), "room": packs * seq_len,
            "cut documents": int((lengths > seq_len).sum())}  # fmt: skip


def packed(lengths: NDArray[np.int64], capacity: int) -> NDArray[Any]:
    """The pieces of documents of these lengths, pack by pack."""
    pieces = cut(lengths, capacity)
    pieces["pack"] = best_fit(pieces["length"], capacity)
    return pieces[np.lexsort((pieces["start"], pieces["pack"]))]


def cut(lengths: NDArray[np.int64], capacity: int) -> NDArray[Any]:
    """The pieces of each document in the stream: full ones, then what is left.

    >>> cut(np.array([5, 2]), 3)[["start", "length"]].tolist()
    [(0, 3), (3, 2), (5, 2)]
    """
    counts = -(-lengths // capacity)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    pieces = np.zeros(len(number), PIECE)
    pieces["start"] = np.repeat(np.cumsum(lengths) - lengths, counts) + number * capacity
    pieces["length"] = np.minimum(capacity, np.repeat(lengths, counts) - number * capacity)
    return pieces


def best_fit(lengths: NDArray[np.int32], capacity: int) -> NDArray[np.int32]:
    """The pack of each piece.

    >>> best_fit(np.array([1, 3, 2]), 3).tolist()
    [1, 0, 1]
    """
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the room that they have left
    rooms = packs = 0  # bits: the rooms that some pack has
    found = np.zeros(len(lengths), np.int32)
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        if larger := rooms >> length:
            room = length + (larger & -larger).bit_length() - 1
            number = free[room].pop()
            rooms ^= 0 if free[room] else 1 << room
        else:
            room, number, packs = capacity, packs, packs + 1
        if left := room - length:
            free[left].append(number)
            rooms |= 1 << left
        found[piece] = number
    return found
