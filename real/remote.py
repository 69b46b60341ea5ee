"""Objects of a storage that is no folder: copied to this machine for as long as they are read."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.corpus import is_address


@contextmanager
def local(name: str) -> Iterator[Path]:
    """The file of this name, or a copy of the object at this address; a whole copy is read at the speed of the network and in one go.

    Raises OSError where the object cannot be fetched.
    """
    if not is_address(name):
        yield Path(name)
        return
    import fsspec

    with tempfile.TemporaryDirectory(prefix="foretold-") as folder:
        copy = Path(folder, name.rpartition("/")[2])
        try:
            storage, path = fsspec.core.url_to_fs(name)
            storage.get_file(path, str(copy))
        except OSError:
            raise
        except Exception as error:  # every kind of storage has its own
            raise OSError(f"{type(error).__name__}: {error}") from error
        yield copy
