"""Repeated passages by winnowing against a suffix array: `python -m tests.bench_substrings`, after `pip install pydivsufsort`.

Processor seconds, one core each; those of winnowing hold the writing and hashing of all its files, and of the receipts.
"""

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from conf.corpus import files
from conf.program import load
from real import dedup, extract, stage, substring
from real.stage import Manifest
from real.winnow import words_of

N, LIMIT = 50, "54 MB"  # words of a passage; text of the Python library, about five million words


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    done = work()
    return done, time.process_time() - began


def documents(folder: Path, pool: ThreadPoolExecutor) -> Manifest:
    """The Python library without whole repeats, in shards as a run has them."""
    plan = load(["data=python", f"data.limit={LIMIT}"])
    found = files(plan.data)
    extracted = stage.run(folder / "extract", extract.tasks(plan, found), extract.config(plan, found), pool, {}, lambda _: None)
    hashed = stage.run(folder / "hashes", dedup.hash_tasks(extracted), dedup.config(), pool, {}, lambda _: None)
    repeated = stage.run(folder / "repeats", dedup.repeat_tasks(hashed), dedup.config(), pool, {}, lambda _: None)
    return stage.run(folder / "whole", dedup.keep_tasks(extracted, repeated), dedup.config(), pool, {}, lambda _: None)


def words_in(kept: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all words, and how many each document has."""
    columns = [pq.read_table(kept.folder / output["path"], columns=["text"]).column("text") for output in kept.paths(".parquet")]
    words, counts = zip(*map(words_of, columns), strict=True)
    return np.concatenate(words), np.concatenate(counts)


def codes_of(words: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each word's number, with a number of its own after each document; and which of those are words."""
    codes, known = pd.factorize(words)
    ends = np.cumsum(counts)
    return np.insert(codes, ends, len(known) + np.arange(len(counts))).astype(">u4"), np.insert(np.ones(len(codes), bool), ends, False)


def by_suffix_array(codes: np.ndarray) -> np.ndarray:
    """Whether the N words from each on stand elsewhere: a suffix array of the codes' bytes, and what its neighbours have in common."""
    from pydivsufsort import divsufsort, kasai

    data = codes.view(np.uint8)
    order = divsufsort(data)
    shared = kasai(data, order)  # of a suffix and the next
    aligned = order % codes.itemsize == 0
    alike = shared >= N * codes.itemsize  # what lies between two aligned suffixes of the same N words begins with these too
    found = np.zeros(len(codes), bool)
    twice = (alike | np.append(False, alike[:-1])) & aligned
    found[order[twice] // codes.itemsize] = True
    return found


def by_winnowing(done: Manifest) -> np.ndarray:
    """The same of what the stage left."""
    counts = [np.load(path)["words"].astype(np.int64) for path in sorted((done.folder / "substrings/anchors").glob("*.documents.npy"))]
    starts = [np.cumsum(part) - part for part in counts]
    before = np.cumsum([0, *(part.sum() for part in counts)])
    found = np.zeros(before[-1], bool)
    for path in (done.folder / "substrings" / "copies").glob("*.npy"):
        for shard, start in enumerate(starts):
            places = substring.of_shard([str(path)], shard)
            found[before[shard] + start[places["document"]] + places["offset"]] = True
    return found


def steps(folder: Path) -> dict[str, float]:
    """Processor seconds by step, from the receipts."""
    names = {"anchors": "substrings/anchors", "repeated": "substrings/repeated", "windows": "substrings/windows",
             "copies": "substrings/copies", "cut": "."}  # fmt: skip
    receipts = {name: [json.loads(path.read_text()) for path in (folder / at / "receipts").glob("*.json")] for name, at in names.items()}
    return {name: sum(receipt["cpu_seconds"] for receipt in rows) for name, rows in receipts.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as pool:
        kept = documents(Path(name), pool)
        done = substring.remove(Path(name) / "done", kept, N, pool, lambda _: None)
        taken, c = steps(done.folder), done.counters
        (words, counts), reading = timed(lambda: words_in(kept))
        (codes, real), coding = timed(lambda: codes_of(words, counts))
        expected, sorting = timed(lambda: by_suffix_array(codes))
        found, mine, theirs = by_winnowing(done), sum(taken.values()) - taken["cut"], coding + sorting
        same = "identical" if np.array_equal(found, expected[real]) else "NOT THOSE"
        print(f"{len(words):,} words in {len(counts):,} documents, {len(kept.paths('.parquet'))} shards")
        print(f"windows of {N} words that stand elsewhere too: {found.sum():,}, {same}")
        print(", ".join(f"{step} {seconds:.2f} s" for step, seconds in taken.items()))
        print(f"reading and splitting words {reading:.2f} s, codes {coding:.2f} s, suffix array and common prefixes {sorting:.2f} s")
        print(f"from text to windows {mine:.2f} s against {reading + theirs:.2f} s: {(reading + theirs) / mine:.1f} times fewer (asked: 2)")
        print(f"from words on {mine - reading:.2f} s against {theirs:.2f} s: {theirs / (mine - reading):.1f} times fewer")
        print(f"{c['words_removed']:,.0f} words cut out of {c['touched']:,.0f} documents, {c['emptied']:,.0f} emptied")


if __name__ == "__main__":
    main()
