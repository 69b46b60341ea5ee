"""Whether a run's files are what their receipts say, and which page a token came from."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.errors import Refused
from conf.plan import Plan
from real.extract import Document, load
from real.shards import read_index
from real.stage import Manifest
from real.tokens import split_of


class Checked(NamedTuple):
    stage: str
    files: int
    bytes: int


def verify(folder: Path) -> Iterator[Checked]:
    """Reads every file of every data stage.

    Raises Refused with the first that is not what its receipt says, or where there is none to read.
    """
    manifests = sorted(folder.rglob("manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    found = [Manifest.read(path.parent) for path in manifests if "receipts" in {entry.name for entry in path.parent.iterdir()}]
    if not found:
        raise Refused(f"{folder} holds no data stage; run foretold real with only=extract,dedup,tokens")
    for manifest in found:
        for output in manifest.outputs:
            manifest.verified(output)
        size = sum(int(output["bytes"]) for output in manifest.outputs)
        yield Checked(str(manifest.folder.relative_to(folder)), len(manifest.outputs), size)


def page_of(folder: Path, plan: Plan, asked: str) -> tuple[Document, int]:
    """The document of a token of the stream, and the token's place in it; `asked` is 123 (in training), or held_out:123.

    Raises Refused for a token that there is not.
    """
    name, _, number = asked.rpartition(":")
    split = name or ("train0" if plan.data.mixture else "train")
    if not number.isdigit():
        raise Refused(f"lineage={asked} names no token; write a number, as in lineage=123 or lineage=held_out:123")
    left, tokens = int(number), Manifest.read(folder / "tokens")
    for output in tokens.paths(".idx"):
        if output["path"].startswith(f"{split}-"):
            _, lengths = read_index(tokens.verified(output))
            if left < lengths.sum():
                return _found(folder, plan, split, Path(output["path"]).stem.removeprefix(f"{split}-"), lengths, left)
            left -= int(lengths.sum())
    raise Refused(f"lineage={asked}: {split} has {int(number) - left:,} tokens, counted from 0")


def _found(folder: Path, plan: Plan, split: str, shard: str, lengths: np.ndarray, place: int) -> tuple[Document, int]:
    ends, documents = np.cumsum(lengths), Manifest.read(folder / "dedup")
    number = int(np.searchsorted(ends, place, side="right"))
    output = next(output for output in documents.outputs if output["path"] == f"{shard}.parquet")
    rows = (row for row in load(documents.verified(output)) if split_of(row, plan.data.held_out, tuple(plan.data.weights)) == split)
    return next(row for k, row in enumerate(rows) if k == number), place - int(ends[number] - lengths[number])
