"""Extract: files of text → documents.

The sizes of the files are known beforehand, so bytes and tasks are exact; only the rate is a forecast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conf.corpus import MANY, SHARD, files, kind_of
from conf.plan import Data, Plan
from sim.cluster import Course, World, crew, per_second, pool

LIBRARIES = 200e6  # bytes that a worker's libraries and their allocators hold: 120e6 when loaded, 204e6 after a small task (2026-11-27)
HELD = 12.0  # bytes a byte of the shard's text, while its rows become a table and a file


@dataclass(frozen=True)
class Corpus:
    """Text between two stages: bytes of each shard, and documents in all of them."""

    shards: Sequence[float] | NDArray[np.float64]
    documents: float

    @property
    def bytes(self) -> float:
        return float(np.sum(self.shards))

    def times(self, share: float) -> "Corpus":
        """The same shards with this share of text and of documents."""
        return Corpus(np.asarray(self.shards) * share, self.documents * share)

    def seconds(self, rate: float) -> NDArray[np.float64]:
        """Of each shard at so many bytes a second."""
        return np.asarray(self.shards, np.float64) / rate


def corpus(data: Data) -> Corpus:
    """The files that the plan names, in groups of about SHARD bytes; of a corpus that is not here a group is a file, if it is larger."""
    if data.path is None:
        assert data.raw is not None, "a plan without a corpus reads no files"
        count = max(1, min(data.raw_files, round(data.raw / SHARD)))
        return Corpus(np.full(count, data.raw / count), data.raw * data.text_yield / data.document_bytes)
    shards, group, documents = [], 0.0, 0.0
    for name, size, _ in files(data):
        documents += max(1.0, size * data.text_yield / data.document_bytes) if kind_of(name) in MANY else 1.0
        group += size
        if group >= SHARD:
            shards.append(group)
            group = 0.0
    return Corpus((*shards, group) if group else tuple(shards), documents)


def hands(found: Corpus, plan: Plan, held: float) -> dict[str, float]:
    """Cores that work, and the memory of each with so many bytes a byte of its shard."""
    count = len(found.shards)
    return {"cores": float(min(count, crew(plan))), "worker_memory": LIBRARIES + held * found.bytes / max(1, count)}


def extract(world: World, found: Corpus) -> Course[dict[str, float]]:
    """Read every group of files on the pool; returns what the stage says of itself."""
    began = world.now
    yield from pool(world, "extract", found.seconds(world.rates.extract_rate), found.bytes, world.rates.extract_start)
    seconds = world.now - began
    documents = kept(found, world.plan.data).documents
    text = found.bytes * world.plan.data.text_yield
    return {
        "seconds": seconds,
        "read": found.bytes,
        "bytes": text,
        "documents": documents,
        "documents_per_s": per_second(documents, seconds),
        **hands(found.times(world.plan.data.text_yield), world.plan, HELD),
    }


def kept(found: Corpus, data: Data) -> Corpus:
    """What is left when the files have become text and the expected share that the rules refuse is gone from every shard."""
    left = found.times(1 - data.filtered)
    return Corpus(np.asarray(left.shards) * data.text_yield, left.documents)
