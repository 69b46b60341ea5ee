"""Token shards on disk, in the form of Megatron-LM's indexed dataset; nothing here needs torch, so workers start without it."""

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from conf.errors import Refused

MAGIC = b"MMIDIDX\x00\x00"
CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}


def write_shard(prefix: Path, documents: list[np.ndarray]) -> None:
    """Tokens of documents as Megatron-LM's indexed dataset: flat .bin, and .idx with lengths, offsets and documents."""
    dtype = documents[0].dtype if documents else np.dtype(np.uint16)
    lengths = np.array([len(d) for d in documents], np.int32)
    pointers = np.concatenate(([0], np.cumsum(lengths[:-1], dtype=np.int64))) * dtype.itemsize if len(lengths) else np.zeros(0)
    with prefix.with_suffix(".idx").open("wb") as index:
        index.write(MAGIC + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(lengths) + 1))
        index.write(lengths.tobytes() + pointers.astype(np.int64).tobytes())
        index.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    with prefix.with_suffix(".bin").open("wb") as out:
        for document in documents:
            out.write(document.tobytes())


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Token type and document lengths of an .idx file.

    Raises Refused when the file is not one, or is cut short.
    """
    data = path.read_bytes()
    try:
        version, code, sequences, _ = struct.unpack_from("<QBQQ", data, len(MAGIC))
        dtype = next(d for d, c in CODES.items() if c == code)
        lengths = np.frombuffer(data, np.int32, sequences, len(MAGIC) + 25)
    except (struct.error, StopIteration, ValueError) as error:
        raise Refused(f"{path} is no Megatron index ({error}); delete it and run the same command again: it is made anew") from error
    if data[: len(MAGIC)] != MAGIC or version != 1:
        raise Refused(f"{path} is no Megatron index of version 1; delete it and run the same command again: it is made anew")
    return dtype, lengths


def trained(mixture: Iterable[str]) -> list[str]:
    """Names of the splits that are trained on: one a pattern of the mixture, or one for all."""
    return [f"train{i}" for i, _ in enumerate(mixture)] or ["train"]
