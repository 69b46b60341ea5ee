"""Dedup: of documents with the same text, the one with the smallest id stays.

Same means equal after lower-casing and folding white space. Workers hash their shard; the hashes meet here; workers
then write what stays.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from real.extract import load, save
from real.stage import Manifest, Task

VERSION = 1


def config() -> dict[str, Any]:
    return {"version": VERSION, "rule": "exact after lower-casing and folding white space; the smallest id stays"}


def hash_tasks(extracted: Manifest) -> Iterator[Task]:
    for output in extracted.paths(".parquet"):
        path = str(extracted.folder / output["path"])
        yield Task("hash-" + Path(path).stem, hash_shard, (path, output["sha256"]), (output["sha256"],))


def keep_tasks(extracted: Manifest, hashed: Manifest) -> Iterator[Task]:
    """One task a shard: the ids to leave out."""
    removed = duplicates(hashed)
    for output in extracted.paths(".parquet"):
        path = str(extracted.folder / output["path"])
        gone = sorted(removed.get("hash-" + Path(path).stem, ()))
        digest = hashlib.blake2b("".join(gone).encode(), digest_size=16).hexdigest()
        yield Task(Path(path).stem, keep_shard, (path, output["sha256"], gone), (output["sha256"], digest))


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
    pairs = (bytes.fromhex(i) + hashlib.blake2b(normalised(t).encode(), digest_size=16).digest() for i, _, t in rows)
    (folder / f"{name}.hashes").write_bytes(b"".join(pairs))
    return {"hashed": len(rows)}


def keep_shard(folder: Path, name: str, path: str, sha256: str, gone: list[str]) -> dict[str, Any]:
    rows, out = load(verified(path, sha256)), set(gone)
    kept = [row for row in rows if row[0] not in out]
    save(folder / f"{name}.parquet", kept)
    return {"documents_in": len(rows), "documents": len(kept), "removed": len(rows) - len(kept),
            "bytes": sum(len(text.encode()) for _, _, text in kept)}  # fmt: skip


def verified(path: str, sha256: str) -> Path:
    """The shard at `path` if it is what its receipt says."""
    place = Path(path)
    manifest = Manifest(place.parent, [], {}, 0.0)
    size = place.stat().st_size if place.is_file() else -1
    return manifest.verified({"path": place.name, "bytes": size, "sha256": sha256})
