"""Dedup: of documents with the same text, or nearly the same, one stays.

What is shuffled are 32 bytes a document for the exact ones (real/dedup.py) and 14 bands of 40 bytes for the nearly equal (real/minhash.py):
written once and read once by whoever has their range.
"""

import numpy as np

from conf.plan import Data, Plan
from sim.cluster import Course, World, per_second, pool
from sim.extract import LIBRARIES, Corpus, hands

EXACT, BANDS = 32.0, 14 * 40.0  # bytes a document
HELD = {"exact": 12.0, "minhash": 20.0}  # bytes a byte of the shard's text: its rows and the table written; all its words, and their hashes
RANGE, SORTED = 64e6, 4.0  # most bytes of the shuffle that one worker reads, and how many a byte it holds to sort them


def unique(text: Corpus, data: Data) -> Corpus:
    """What is left when the expected share of duplicates is gone from every shard, and of the rest what stands elsewhere too."""
    left = text.times(1 - data.duplicates)
    return Corpus(np.asarray(left.shards) * (1 - data.cut), left.documents) if data.substrings else left


def shuffled(text: Corpus, data: Data) -> float:
    """Bytes that the shuffle writes, and reads again."""
    return text.documents * (EXACT + (BANDS if data.dedup == "minhash" else 0.0))


def workers(text: Corpus, plan: Plan) -> dict[str, float]:
    """A worker has a shard, and later a range of the shuffle."""
    told, sorting = hands(text, plan, HELD[plan.data.dedup]), LIBRARIES + SORTED * min(RANGE, shuffled(text, plan.data))
    return told | {"worker_memory": max(told["worker_memory"], sorting)}


def dedup(world: World, text: Corpus) -> Course[dict[str, float]]:
    """Compare every shard on the pool; returns what the stage says of itself."""
    began, data = world.now, world.plan.data
    moved = shuffled(text, data)
    yield from pool(world, "dedup", text.seconds(world.rates.dedup_rate), text.bytes + 2 * moved, world.rates.dedup_start)
    searching = world.now
    if data.substrings:
        whole = text.times(1 - data.duplicates)
        yield from pool(world, "dedup", whole.seconds(world.rates.substring_rate), 2 * whole.bytes)
    seconds = world.now - began
    return {
        "seconds": seconds,
        "read": text.bytes,
        "documents": unique(text, data).documents,
        "documents_per_s": per_second(text.documents, seconds),
        "removed_fraction": data.duplicates,
        "shuffle_bytes": moved,
        **({"substring_seconds": world.now - searching} if data.substrings else {}),
        **workers(text, world.plan),
    }
