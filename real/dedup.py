"""Dedup: of documents with the same text, or nearly the same, the one with the smallest id stays.

Same means equal after lower-casing and folding white space. Workers hash their shard; the hashes meet here; workers
then write what stays. For nearly the same (data.dedup=minhash) workers write the bands of their shard, sorted; others read a range of
all bands each and write which documents meet in them; those pairs meet here, and all that hang together are one.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import write
from real import minhash
from real.extract import Document, load, save
from real.stage import Manifest, Task, sha256

VERSION = 2
RANGE = 64_000_000  # bytes of bands that one task sorts
RULES = {
    "exact": "exact after lower-casing and folding white space; the smallest id stays",
    "minhash": "14 bands of 8 over runs of 5 words, or exact; of what hangs together the smallest id stays",
}


def config(how: str = "exact") -> dict[str, Any]:
    return {"version": VERSION, "rule": RULES[how]}


def hash_tasks(extracted: Manifest) -> Iterator[Task]:
    for output in extracted.paths(".parquet"):
        path = str(extracted.folder / output["path"])
        yield Task("hash-" + Path(path).stem, hash_shard, (path, output["sha256"]), (output["sha256"],))


def band_tasks(extracted: Manifest) -> Iterator[Task]:
    for output in extracted.paths(".parquet"):
        path = str(extracted.folder / output["path"])
        yield Task("bands-" + Path(path).stem, band_shard, (path, output["sha256"]), (output["sha256"],))


def pair_tasks(banded: Manifest) -> Iterator[Task]:
    """One task for each range of bands."""
    outputs = banded.paths(".npy")
    tables = [(str(banded.folder / output["path"]), output["sha256"]) for output in outputs]
    digests = tuple(output["sha256"] for output in outputs)
    ranges = max(1, -(-sum(output["bytes"] for output in outputs) // RANGE))
    for number in range(ranges):
        first, end = number * 2**64 // ranges, (number + 1) * 2**64 // ranges
        yield Task(f"pairs-{number:05}", pair_range, (tables, first, end), digests)


def near_duplicates(paired: Manifest) -> tuple[Path, dict[str, int]]:
    """Writes the ids to leave out beside the pairs; returns the file, and how many groups of each size hang together."""
    tables = [np.load(paired.verified(output)) for output in paired.paths(".npy")]
    joined = list(minhash.components(np.concatenate(tables)))
    path = paired.folder / "removed.txt"
    write(path, "".join(f"{other}\n" for other in sorted(other for _, other in joined)))
    sizes = Counter(1 + others for others in Counter(first for first, _ in joined).values())
    return path, {f"groups of {size}": count for size, count in sorted(sizes.items())}


def keep_tasks(extracted: Manifest, hashed: Manifest, near: Path | None = None) -> Iterator[Task]:
    """One task a shard, with the ids to leave out: those of exact duplicates, and a file of the others."""
    removed, listed = duplicates(hashed), sha256(near) if near else ""
    for output in extracted.paths(".parquet"):
        path = str(extracted.folder / output["path"])
        gone = sorted(removed.get("hash-" + Path(path).stem, ()))
        digest = hashlib.blake2b("".join(gone).encode(), digest_size=16).hexdigest()
        task = (path, output["sha256"], gone, str(near) if near else "")
        yield Task(Path(path).stem, keep_shard, task, (output["sha256"], digest, listed))


def duplicates(hashed: Manifest) -> dict[str, list[str]]:
    """Ids to leave out, by task."""
    first: dict[bytes, str] = {}
    seen: list[tuple[str, str, bytes]] = []
    for output in hashed.paths(".hashes"):
        path = hashed.verified(output)
        data = path.read_bytes()
        for start in range(0, len(data), 32):
            identity, content = data[start : start + 16].hex(), data[start + 16 : start + 32]
            seen.append((path.stem, identity, content))
            if identity < first.get(content, "g"):
                first[content] = identity
    gone: dict[str, list[str]] = {}
    for shard, identity, content in seen:
        if first[content] != identity:
            gone.setdefault(shard, []).append(identity)
    return gone


def normalised(text: str) -> str:
    """
    >>> normalised("  A\\n\\tb ")
    'a b'
    """
    return " ".join(text.lower().split())


def hash_shard(folder: Path, name: str, path: str, sha256: str) -> dict[str, Any]:
    """Pairs of (document id, hash of its normalised text), 16 bytes each."""
    rows = load(verified(path, sha256))
    pairs = (bytes.fromhex(row.id) + hashlib.blake2b(normalised(row.text).encode(), digest_size=16).digest() for row in rows)
    (folder / f"{name}.hashes").write_bytes(b"".join(pairs))
    return {"hashed": len(rows)}


def band_shard(folder: Path, name: str, path: str, sha256: str) -> dict[str, Any]:
    """The bands of a shard's documents, sorted."""
    rows = load(verified(path, sha256))
    np.save(folder / f"{name}.npy", minhash.entries([row.id for row in rows], [row.text for row in rows]))
    return {"banded": len(rows)}


def pair_range(folder: Path, name: str, tables: list[tuple[str, str]], first: int, end: int) -> dict[str, Any]:
    """Documents that meet in a band of this range. A table is mapped, not read, so its digest is left to its receipt's size."""
    found = minhash.pairs([minhash.between(np.load(path, mmap_mode="r"), first, end) for path, _ in tables])
    np.save(folder / f"{name}.npy", found)
    return {"pairs": len(found)}


def keep_shard(folder: Path, name: str, path: str, sha256: str, gone: list[str], near: str) -> dict[str, Any]:
    rows, exact = load(verified(path, sha256)), set(gone)
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
