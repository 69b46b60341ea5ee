"""Substrings: passages of N words and more that stand elsewhere too; the first stays whole, the others are cut out.

After Lee et al. 2021, "Deduplicating training data makes language models better", with winnowing (winnow.py) for their suffix array.
Workers write the anchors of their shard; others read a range of hashes each and write which occur again; workers hash the windows
around those; others find which windows occur again; workers then write the text that stays. Memory is bounded by a shard or a range.

What stays: every window's first occurrence (the smallest document id, then the smallest offset) is whole in the rewritten text. Of
later ones those words go that belong to no first occurrence: where a passage stands in a longer one that stands twice, the first of the
longer one keeps up to N − 1 words of it on either side. Windows that form where the ends of a cut meet are not looked for.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from real import stage
from real.dedup import ranges, verified
from real.extract import Document, load, save
from real.minhash import Hashes, between
from real.stage import Manifest, Task
from real.winnow import Mask, Places, again, anchors, cut, entries, firsts, flat, near, runs, without, words_of

VERSION = 1
RANGE = 64_000_000  # bytes of entries that one task sorts
SAMPLES = 20  # removed passages of a shard that are written down
DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("words", "<u8")])  # the two halves of its id, and how many words it has
PLACE = np.dtype([("shard", "<u4"), ("document", "<u4"), ("offset", "<u4"), ("first", "<u4")])  # where a run of words stands again


def config(length: int) -> dict[str, Any]:
    return {"version": VERSION, "words": length, "rule": f"runs of {length} words that stand elsewhere too, by winnowing; the first stays"}


def remove(folder: Path, kept: Manifest, length: int, pool: ProcessPoolExecutor, progress: Callable[[float], None]) -> Manifest:
    """All five steps; the rewritten documents are left in `folder`, what leads to them in `folder`/substrings."""
    rule = config(length)

    def step(number: int, name: str, tasks: Iterator[Task]) -> Manifest:
        return stage.run(folder / "substrings" / name, tasks, rule, pool, {}, lambda share: progress((number + share) / 5))

    anchored = step(0, "anchors", anchor_tasks(kept, length))
    repeated = step(1, "repeated", repeat_tasks(anchored, anchored, ".anchors.npy"))
    windows = step(2, "windows", window_tasks(anchored, repeated, length))
    copies = step(3, "copies", repeat_tasks(anchored, windows, ".npy"))
    tasks, facts = cut_tasks(kept, anchored, copies, length), {**rule, "before": kept.counters}
    done = stage.run(folder, tasks, rule, pool, facts, lambda share: progress((4 + share) / 5))
    done.counters = kept.counters | done.counters | {"removed": kept.counters["removed"] + done.counters["emptied"]}
    return done


def anchor_tasks(documents: Manifest, length: int) -> Iterator[Task]:
    for output in documents.paths(".parquet"):
        path = str(documents.folder / output["path"])
        yield Task(Path(path).stem, anchor_shard, (path, output["sha256"], length), (output["sha256"],))


def repeat_tasks(anchored: Manifest, tables: Manifest, suffix: str) -> Iterator[Task]:
    """One task for each range of hashes; the shards' order is that of their tables."""
    outputs, documents = tables.paths(suffix), anchored.paths(".documents.npy")
    paths = [str(tables.folder / output["path"]) for output in outputs]
    digests = tuple(output["sha256"] for output in (*outputs, *documents))
    for number, first, end in ranges(outputs, RANGE):
        arguments = (paths, [str(anchored.folder / output["path"]) for output in documents], first, end)
        yield Task(f"range-{number:05}", repeat_range, arguments, digests)


def window_tasks(anchored: Manifest, repeated: Manifest, length: int) -> Iterator[Task]:
    digests, tables = _tables(repeated)
    for shard, (words, documents) in enumerate(zip(anchored.paths(".words.npy"), anchored.paths(".documents.npy"), strict=True)):
        paths = [(str(anchored.folder / output["path"]), output["sha256"]) for output in (words, documents)]
        yield Task(documents["path"].removesuffix(".documents.npy"), window_shard, (*paths, tables, shard, length),
                   (words["sha256"], documents["sha256"], *digests))  # fmt: skip


def cut_tasks(kept: Manifest, anchored: Manifest, copies: Manifest, length: int) -> Iterator[Task]:
    digests, tables = _tables(copies)
    for shard, (output, documents) in enumerate(zip(kept.paths(".parquet"), anchored.paths(".documents.npy"), strict=True)):
        text, counts = ((str(m.folder / o["path"]), o["sha256"]) for m, o in ((kept, output), (anchored, documents)))
        yield Task(Path(output["path"]).stem, cut_shard, (text, counts, tables, shard, length), (text[1], counts[1], *digests))


def _tables(found: Manifest) -> tuple[tuple[str, ...], list[str]]:
    outputs = found.paths(".npy")
    return tuple(output["sha256"] for output in outputs), [str(found.folder / output["path"]) for output in outputs]


def anchor_shard(folder: Path, name: str, path: str, sha256: str, length: int) -> dict[str, Any]:
    """The hashes of all words of a shard, its documents, and its anchors sorted by hash."""
    import pyarrow.parquet as pq

    table = pq.read_table(verified(path, sha256), columns=["id", "text"]).combine_chunks()
    words, counts = words_of(table.column("text"))
    documents = np.empty(len(counts), DOCUMENT)
    ids = bytes.fromhex("".join(table.column("id").to_pylist()))
    documents["high"], documents["low"] = np.frombuffer(ids, ">u8").reshape(-1, 2).T
    documents["words"] = counts
    keys, places = anchors(words, counts, length)
    np.save(folder / f"{name}.words.npy", words)
    np.save(folder / f"{name}.documents.npy", documents)
    np.save(folder / f"{name}.anchors.npy", entries(keys, places, counts))
    return {"words": len(words), "anchors": len(places)}


def repeat_range(folder: Path, name: str, tables: list[str], documents: list[str], first: int, end: int) -> dict[str, Any]:
    """Places of this range's hashes that occur more than once, by shard. Tables are mapped, not read: their receipts have their size."""
    parts = [between(np.load(path, mmap_mode="r"), first, end) for path in tables]
    found, shards = again(np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts]))
    order = np.argsort(shards, kind="stable")
    places = np.empty(len(found), PLACE)
    places["shard"], places["document"], places["offset"] = shards[order], found["document"][order], found["offset"][order]
    ids = np.empty((2, len(found)), np.uint64)
    ids[:, order] = _ids(places, documents)
    places["first"] = firsts(found["key"], (*ids, found["offset"]))[order]
    np.save(folder / f"{name}.npy", places)
    return {"repeated": len(found), "first": int(places["first"].sum())}


def window_shard(folder: Path, name: str, words: tuple[str, str], documents: tuple[str, str], tables: list[str], shard: int,
                 length: int) -> dict[str, Any]:  # fmt: skip
    """The windows around repeated anchors of a shard, sorted by hash."""
    hashed, counts = np.load(verified(*words)), np.load(verified(*documents))["words"].astype(np.int64)
    places = near(flat(of_shard(tables, shard), counts), counts, length)
    np.save(folder / f"{name}.npy", entries(runs(hashed, length)[places], places, counts))
    return {"windows": len(places)}


def cut_shard(folder: Path, name: str, text: tuple[str, str], documents: tuple[str, str], tables: list[str], shard: int,
              length: int) -> dict[str, Any]:  # fmt: skip
    """Write a shard without its repeated passages, and up to SAMPLES of these to read; a document without a word left goes."""
    rows, counts = load(verified(*text)), np.load(verified(*documents))["words"].astype(np.int64)
    gone = cut(of_shard(tables, shard), counts, length)
    touched, passages = _rewritten(rows, counts, gone)
    kept = [row for row in rows if row.text.strip()]
    save(folder / f"{name}.parquet", kept)
    if passages:
        (folder / f"{name}.samples.txt").write_text("\n".join(passages[:: -(-len(passages) // SAMPLES)]), encoding="utf-8")
    return {"documents": len(kept), "emptied": len(rows) - len(kept), "touched": touched, "passages": len(passages),
            "words": len(gone), "words_removed": int(gone.sum()), "bytes": sum(len(row.text.encode()) for row in kept)}  # fmt: skip


def _rewritten(rows: list[Document], counts: Places, gone: Mask) -> tuple[int, list[str]]:
    """Cuts the words out of the rows; how many it touched, and all that went."""
    ends, passages = np.cumsum(counts), []
    touched = np.unique(np.searchsorted(ends, np.flatnonzero(gone), "right"))
    for number in touched:
        whole = rows[number].text
        rest, removed = without(whole, gone[ends[number] - counts[number] : ends[number]])
        rows[number] = rows[number]._replace(text=rest)
        passages += [f"{rows[number].id} word {at}: {' '.join(passage.split())}\n" for at, passage in removed]
    return len(touched), passages


def of_shard(tables: Sequence[str], shard: int) -> NDArray[Any]:
    """Places of one shard in tables sorted by shard; nothing else of them is read."""
    mapped = [np.load(path, mmap_mode="r") for path in tables]
    edges = [np.searchsorted(table["shard"], np.array([shard, shard + 1], np.uint32)) for table in mapped]
    return np.concatenate([np.empty(0, PLACE), *(table[first:end] for table, (first, end) in zip(mapped, edges, strict=True))])


def _ids(places: NDArray[Any], documents: list[str]) -> Hashes:
    """The halves of the ids of the documents at these places, (2, n); only documents of their shards are read."""
    found = np.empty((2, len(places)), np.uint64)
    for shard in np.unique(places["shard"]):
        first, end = np.searchsorted(places["shard"], np.array([shard, shard + 1], np.uint32))
        table, rows = np.load(documents[shard], mmap_mode="r"), places["document"][first:end]
        found[:, first:end] = table["high"][rows], table["low"][rows]
    return found
