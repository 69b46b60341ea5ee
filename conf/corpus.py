"""The files that a plan reads: what `real` will extract and what `sim` weighs beforehand."""

import glob
import hashlib
import os
import sys
import sysconfig
from pathlib import Path

from conf.errors import Refused
from conf.plan import Data

ARCHIVES = (".warc", ".warc.gz", ".warc.lz4", ".warc.zst", ".wet", ".wet.gz", ".arc", ".arc.gz")
KINDS = (".txt", ".md", ".py", ".rst", ".htm", ".html", ".xhtml", ".jsonl", ".jsonl.gz", ".parquet", *ARCHIVES)
MANY = (".jsonl", ".jsonl.gz", ".parquet", *ARCHIVES)  # files that hold many documents
SHARD = 4_000_000  # bytes of input that one task of a data stage reads


def kind_of(path: Path) -> str | None:
    """The ending that says how to read a file, or None for one that is not text."""
    return next((k for k in reversed(KINDS) if path.name.endswith(k)), None)


def files(data: Data) -> list[tuple[Path, int]]:
    """Files of the corpus with their bytes, in an order that mixes folders but never changes, up to `data.limit` bytes.

    Raises Refused for a path that does not exist, holds no text, or may not be read.
    """
    assert data.path is not None, "a plan without a corpus reads no files"
    found = _found(data.path)
    kept: list[tuple[Path, int]] = []
    total = 0
    for path, size in found:
        if total + size > data.limit and kept:
            break
        kept.append((path, size))
        total += size
    if not kept:
        what = "does not exist" if not glob.glob(data.path) and data.path != "python" else "holds no text"
        raise Refused(f"data.path={data.path} {what}; name a file, folder or glob of {', '.join(KINDS)}")
    return kept


def _found(path: str) -> list[tuple[Path, int]]:
    roots = _python_library() if path == "python" else [Path(p) for p in sorted(glob.glob(path))]
    listed: list[tuple[str, Path, int]] = []
    for root in roots:
        for file in _walk(root):
            try:
                size = file.stat().st_size
            except OSError:
                continue
            if size and kind_of(file):
                name = str(file.relative_to(root)) if file != root else file.name
                listed.append((hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), file, size))
    return [(file, size) for _, file, size in sorted(listed)]


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
