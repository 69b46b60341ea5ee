"""Dedup: of documents with the same text, one stays."""

from conf.plan import Data
from sim.cluster import Course, World, per_second, pool
from sim.extract import Corpus


def unique(text: Corpus, data: Data) -> Corpus:
    """What is left when the expected share of duplicates is gone from every shard."""
    stays = 1 - data.duplicates
    return Corpus(tuple(size * stays for size in text.shards), text.documents * stays)


def dedup(world: World, text: Corpus) -> Course[dict[str, float]]:
    """Compare every shard on the pool; returns what the stage says of itself."""
    began, data = world.now, world.plan.data
    yield from pool(world, "dedup", [size / world.rates.dedup_rate for size in text.shards])
    seconds = world.now - began
    return {
        "seconds": seconds,
        "documents": unique(text, data).documents,
        "documents_per_s": per_second(text.documents, seconds),
        "removed_fraction": data.duplicates,
    }
