"""Dedup: of documents with the same text, or nearly the same, one stays: that with the smallest id, or of nearly the same the longest.

Same means equal after lower-casing and folding white space. Workers hash their shard and sort the hashes; others read a range of all
hashes each and write which documents repeat another; workers then write what stays. For nearly the same (data.dedup=minhash) the
bands of a shard go the same way and what comes out of a range is pairs; those meet here, and all that hang together are one.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import write
from real import minhash
from real.extract import Document, load, save
from real.stage import Manifest, Task, sha256

VERSION = 4
RANGE = 64_000_000  # bytes of hashes, or of bands, that one task sorts
ENTRY = np.dtype([("key", "<u8"), ("rest", "<u8"), ("high", "<u8"), ("low", "<u8")])  # hash of a text in two parts, and its document's id
GONE = np.dtype([("shard", "<u4"), ("high", "<u8"), ("low", "<u8")])  # a document that goes: its shard's number, and its id
RULES = {
    "exact": "exact after lower-casing and folding white space; the smallest id stays",
    "minhash": "14 bands of 8 over runs of 5 words, or exact; of what hangs together one stays",
}


def config(how: str = "exact", within: str = "corpus", keep: str = "first") -> dict[str, Any]:
    return {"version": VERSION, "rule": RULES[how], "within": within, "keep": keep}


def hash_tasks(extracted: Manifest, root: str | None = None) -> Iterator[Task]:
    """With a root, documents of different folders below it are different."""
    for output in extracted.paths(".parquet"):
        path = str(extracted.folder / output["path"])
        yield Task("hash-" + Path(path).stem, hash_shard, (path, output["sha256"], root), (output["sha256"],))


def band_tasks(extracted: Manifest, root: str | None = None, keep: str = "first") -> Iterator[Task]:
    for output in extracted.paths(".parquet"):
        path = str(extracted.folder / output["path"])
        yield Task("bands-" + Path(path).stem, band_shard, (path, output["sha256"], root, keep), (output["sha256"],))


def pair_tasks(banded: Manifest) -> Iterator[Task]:
    """One task for each range of bands."""
    outputs = banded.paths(".npy")
    tables = [(str(banded.folder / output["path"]), output["sha256"]) for output in outputs]
    for number, first, end in ranges(outputs, RANGE):
        yield Task(f"pairs-{number:05}", pair_range, (tables, first, end), tuple(output["sha256"] for output in outputs))


def near_duplicates(paired: Manifest) -> tuple[Path, dict[str, int]]:
    """Writes the ids to leave out beside the pairs; returns the file, and how many groups of each size hang together."""
    tables = [np.load(paired.verified(output)) for output in paired.paths(".npy")]
    joined = list(minhash.components(np.concatenate(tables)))
    path = paired.folder / "removed.txt"
    write(path, "".join(f"{other}\n" for other in sorted(other[-32:] for _, other in joined)))
    sizes = Counter(1 + others for others in Counter(first for first, _ in joined).values())
    return path, {f"groups of {size}": count for size, count in sorted(sizes.items())}


def repeat_tasks(hashed: Manifest) -> Iterator[Task]:
    """One task for each range of hashes."""
    outputs = hashed.paths(".npy")
    tables = [str(hashed.folder / output["path"]) for output in outputs]
    for number, first, end in ranges(outputs, RANGE):
        yield Task(f"repeats-{number:05}", repeat_range, (tables, first, end), tuple(output["sha256"] for output in outputs))


def ranges(outputs: Sequence[Mapping[str, Any]], size: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of hashes, each of about so many bytes of these tables: number, first hash, and the one behind the last."""
    count = max(1, -(-sum(output["bytes"] for output in outputs) // size))
    for number in range(count):
        yield number, number * 2**64 // count, (number + 1) * 2**64 // count


def keep_tasks(extracted: Manifest, repeated: Manifest, near: Path | None = None) -> Iterator[Task]:
    """One task a shard, with the files of what to leave out: exact repeats by range and shard, and the ids of the others."""
    outputs, listed = repeated.paths(".npy"), sha256(near) if near else ""
    gone = [str(repeated.folder / output["path"]) for output in outputs]
    digests = tuple(output["sha256"] for output in outputs)
    for number, output in enumerate(extracted.paths(".parquet")):
        path = str(extracted.folder / output["path"])
        task = (path, output["sha256"], gone, number, str(near) if near else "")
        yield Task(Path(path).stem, keep_shard, task, (output["sha256"], *digests, listed))


def normalised(text: str) -> str:
    """
    >>> normalised("  A\\n\\tb ")
    'a b'
    """
    return " ".join(text.lower().split())


def snapshot(row: Document, root: str | None) -> str:
    """The folder of a document, the first below the root; "" where all are one corpus.

    >>> snapshot(Document("", "web/2024-10/a/b.warc.gz", 0, "", "", ""), "web")
    '2024-10'
    """
    if root is None:
        return ""
    below = Path(row.source).relative_to(root).parts
    return below[0] if len(below) > 1 else ""


def hash_shard(folder: Path, name: str, path: str, sha256: str, root: str | None) -> dict[str, Any]:
    """The hash of each document's normalised text with its id, sorted by hash."""
    rows = load(verified(path, sha256))
    digests = (hashlib.blake2b(normalised(row.text).encode(), digest_size=16, key=_salt(row, root)).digest() for row in rows)
    data = b"".join(digest + bytes.fromhex(row.id) for row, digest in zip(rows, digests, strict=True))
    table = np.frombuffer(data, ENTRY.newbyteorder(">")).astype(ENTRY)
    np.save(folder / f"{name}.npy", table[np.argsort(table["key"], kind="stable")])
    return {"hashed": len(rows)}


def repeat_range(folder: Path, name: str, tables: list[str], first: int, end: int) -> dict[str, Any]:
    """Of the documents whose hash lies in this range, those that an equal one of a smaller id stands for, by shard."""
    parts = [minhash.between(np.load(path, mmap_mode="r"), first, end) for path in tables]
    found, shards = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.lexsort((found["low"], found["high"], found["rest"], found["key"]))
    key, rest = found["key"][order], found["rest"][order]
    again = order[1:][(key[1:] == key[:-1]) & (rest[1:] == rest[:-1])]
    gone = np.empty(len(again), GONE)
    gone["shard"], gone["high"], gone["low"] = shards[again], found["high"][again], found["low"][again]
    np.save(folder / f"{name}.npy", np.sort(gone, order=["shard", "high", "low"]))
    return {"repeats": len(gone)}


def of_shard(paths: Sequence[str], number: int) -> set[str]:
    """The ids of a shard in these tables; nothing else of them is read."""
    ids = set[str]()
    for path in paths:
        table = np.load(path, mmap_mode="r")
        first, end = np.searchsorted(table["shard"], [number, number + 1])
        ids |= {f"{high:016x}{low:016x}" for _, high, low in table[first:end].tolist()}
    return ids


def _salt(row: Document, root: str | None) -> bytes:
    name = snapshot(row, root)
    return hashlib.blake2b(name.encode(), digest_size=32).digest() if name else b""


def band_shard(folder: Path, name: str, path: str, sha256: str, root: str | None, keep: str) -> dict[str, Any]:
    """The bands of a shard's documents, sorted."""
    rows = load(verified(path, sha256))
    apart = np.array([int.from_bytes(_salt(row, root)[:8], "little") for row in rows], np.uint64) if root else None
    np.save(folder / f"{name}.npy", minhash.entries([ranked(row, keep) for row in rows], [row.text for row in rows], apart))
    return {"banded": len(rows)}


def ranked(row: Document, keep: str) -> str:
    """A name for a document that comes first, in the order of text, if it is the one to keep: its id, or its length before that.

    The length is of what exact repeats have in common, so that of these the same one stays by either rule.
    """
    return row.id if keep == "first" else f"{max(0, 2**32 - 1 - len(normalised(row.text))):08x}{row.id}"


def pair_range(folder: Path, name: str, tables: list[tuple[str, str]], first: int, end: int) -> dict[str, Any]:
    """Documents that meet in a band of this range. A table is mapped, not read, so its digest is left to its receipt's size."""
    found = minhash.pairs([minhash.between(np.load(path, mmap_mode="r"), first, end) for path, _ in tables])
    np.save(folder / f"{name}.npy", found)
    return {"pairs": len(found)}


def keep_shard(folder: Path, name: str, path: str, sha256: str, gone: list[str], number: int, near: str) -> dict[str, Any]:
    rows, exact = load(verified(path, sha256)), of_shard(gone, number)
    listed = set(Path(near).read_text().split()) if near else set()
    kept = [row for row in rows if row.id not in exact and row.id not in listed]
    save(folder / f"{name}.parquet", kept)
    return {"documents_in": len(rows), "read": _bytes(rows), "documents": len(kept), "removed": len(rows) - len(kept),
            "removed_exact": len(exact), "bytes": _bytes(kept)}  # fmt: skip


def _bytes(rows: list[Document]) -> int:
    return sum(len(row.text.encode()) for row in rows)


def verified(path: str, sha256: str) -> Path:
    """The shard at `path` if it is what its receipt says."""
    place = Path(path)
    manifest = Manifest(place.parent, [], {}, 0.0)
    size = place.stat().st_size if place.is_file() else -1
    return manifest.verified({"path": place.name, "bytes": size, "sha256": sha256})
