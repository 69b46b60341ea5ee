"""Extract: files of text → documents.

The sizes of the files are known beforehand, so bytes and tasks are exact; only the rate is a forecast.
"""

from dataclasses import dataclass

from conf.corpus import MANY, SHARD, files, kind_of
from conf.plan import Data
from sim.cluster import Course, World, per_second, pool


@dataclass(frozen=True)
class Corpus:
    """Text between two stages: bytes of each shard, and documents in all of them."""

    shards: tuple[float, ...]
    documents: float

    @property
    def bytes(self) -> float:
        return sum(self.shards)


def corpus(data: Data) -> Corpus:
    """The text that the plan names, in groups of files of about SHARD bytes."""
    shards, group, documents = [], 0.0, 0.0
    for path, size in files(data):
        documents += max(1.0, size / data.document_bytes) if kind_of(path) in MANY else 1.0
        group += size
        if group >= SHARD:
            shards.append(group)
            group = 0.0
    return Corpus((*shards, group) if group else tuple(shards), documents)


def extract(world: World, text: Corpus) -> Course[dict[str, float]]:
    """Read every shard on the pool; returns what the stage says of itself."""
    began = world.now
    yield from pool(world, "extract", [size / world.rates.extract_rate for size in text.shards])
    seconds = world.now - began
    documents = kept(text, world.plan.data).documents
    return {"seconds": seconds, "bytes": text.bytes, "documents": documents, "documents_per_s": per_second(documents, seconds)}


def kept(text: Corpus, data: Data) -> Corpus:
    """What is left when the expected share that the rules refuse is gone from every shard."""
    stays = 1 - data.filtered
    return Corpus(tuple(size * stays for size in text.shards), text.documents * stays)
