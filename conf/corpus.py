"""The files that a plan reads: what `real` will extract and what `sim` weighs beforehand. They lie in folders, or in object storage."""

import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from conf.errors import Refused
from conf.plan import Data

ARCHIVES = (".warc", ".warc.gz", ".warc.lz4", ".warc.zst", ".wet", ".wet.gz", ".arc", ".arc.gz")
KINDS = (".txt", ".md", ".py", ".rst", ".htm", ".html", ".xhtml", ".jsonl", ".jsonl.gz", ".parquet", *ARCHIVES)
MANY = (".jsonl", ".jsonl.gz", ".parquet", *ARCHIVES)  # files that hold many documents
SHARD = 4_000_000  # bytes of input that one task of a data stage reads
LINES = 20_000  # conversations that one task of a fine-tuning reads


class File(NamedTuple):
    """A file of the corpus, by its path or its address in object storage."""

    name: str
    bytes: int
    version: str  # another one when the content is another


def kind_of(name: str) -> str | None:
    """The ending that says how to read a file, or None for one that is not text."""
    return next((k for k in reversed(KINDS) if name.endswith(k)), None)


def is_address(path: str) -> bool:
    """Whether this names object storage (s3://bucket/folder, gs://…, https://…) and no folder."""
    return "://" in path


def files(data: Data) -> list[File]:
    """Files of the corpus in an order that mixes folders but never changes, up to `data.limit` bytes.

    Raises Refused for a path that does not exist, holds no text, or may not be read.
    """
    assert data.path is not None, "a plan without a corpus reads no files"
    path = data.path
    found = list(_stored(path) if is_address(path) else _found(path))
    named = sorted((hashlib.blake2b(below.encode(), digest_size=8).hexdigest(), file) for below, file in found if kind_of(file.name))
    kept: list[File] = []
    total = 0
    for _, file in named:
        if total + file.bytes > data.limit and kept:
            break
        kept.append(file)
        total += file.bytes
    if not kept:
        what = "holds no text" if found or path == "python" or glob.glob(path) else "does not exist"
        what = "holds no text, or does not answer" if is_address(path) else what
        raise Refused(f"data.path={path} {what}; name a file, folder or glob of {', '.join(KINDS)}")
    return kept


def _found(path: str) -> Iterator[tuple[str, File]]:
    """Each file, and what it is called below the folder that was asked for."""
    for root in _python_library() if path == "python" else [Path(p) for p in sorted(glob.glob(path))]:
        for file in _walk(root):
            try:
                state = file.stat()
            except OSError:
                continue
            if state.st_size:
                yield str(file.relative_to(root)) if file != root else file.name, File(str(file), state.st_size, str(state.st_mtime_ns))


def _stored(address: str) -> Iterator[tuple[str, File]]:
    """The same of object storage; its version is all that the storage says of an object, its date and checksum among it."""
    import fsspec

    try:
        storage, root = fsspec.core.url_to_fs(address)
        listed = storage.glob(root, detail=True) if glob.has_magic(root) else storage.find(root, detail=True)
        objects = {
            name: told if told.get("size") is not None else storage.info(name) for name, told in listed.items()
        }  # the web has no sizes
    except ImportError as error:
        raise Refused(f"data.path={address}: {error}") from error
    except Exception as error:  # every kind of storage has its own
        raise Refused(f"data.path={address} cannot be listed: {type(error).__name__}: {error}".replace("\n", " ")) from error
    for name, told in objects.items():
        if told["type"] == "file" and told["size"]:
            said = hashlib.blake2b(repr(sorted((key, str(value)) for key, value in told.items())).encode(), digest_size=8).hexdigest()
            full = storage.unstrip_protocol(name)
            yield full.removeprefix(storage.unstrip_protocol(root)), File(full, int(told["size"]), said)


def _python_library() -> list[Path]:
    """The standard library and the installed packages: megabytes of text on every machine that can run this."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), *(Path(p) for p in {paths["purelib"], paths["platlib"]} if p in sys.path or Path(p).is_dir())]


def _walk(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in ("site-packages", "__pycache__", "node_modules", ".git")]
        found += [Path(folder, name) for name in names]
    return found
