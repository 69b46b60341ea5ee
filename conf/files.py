"""Files that are whole or absent: written aside, flushed, renamed."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from conf.errors import Refused


def write(path: Path, content: str | bytes) -> None:
    """Write a small file atomically.

    Raises Refused when the disk is full or the place cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    commit(path, lambda temporary: temporary.write_bytes(data))


def commit(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary file beside `path`, then flush it and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise refusal(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(folder: Path, before: float) -> None:
    """Remove what writers left aside that were killed before a moment, in seconds since 1970."""
    for aside in folder.rglob(".*.tmp"):
        with suppress(OSError):
            if aside.stat().st_mtime < before:
                aside.unlink()


def refusal(error: OSError, path: Path) -> Refused:
    """A full disk or a forbidden folder as a line that a user can act on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Refused(f"{path}: the disk is full; free some space and run the same command again: it goes on where it stopped")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Refused(f"{path}: no permission to write; make the folder writable, or name another with runs=DIR")
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return Refused(f"{path}: a file stands where a folder should be; move it, or name another folder with runs=DIR")
    return Refused(f"{path}: {error.strerror or error}")
