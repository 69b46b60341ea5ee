"""Exact repeats by ranges of hashes: what a dictionary of all texts finds, however many ranges there are."""

import random

import pytest

from real import dedup
from real.extract import Document, document_id, save
from real.stage import Manifest, run, sha256, workers


def shards(folder, count=4, each=50):
    """Shards of few different texts, some in other clothes."""
    dice, paths, rows_of = random.Random(3), [], []
    folder.mkdir()
    for number in range(count):
        rows = []
        for i in range(each):
            text = f"text number {dice.randrange(60)}"
            rows.append(Document(document_id(str(number), i), str(number), i, "", "", text.upper() if dice.random() < 0.3 else text))
        save(folder / f"part-{number:05}.parquet", rows)
        rows_of.append(sorted(rows))
        paths.append(folder / f"part-{number:05}.parquet")
    return Manifest(folder, [{"path": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths], {}, 0.0), rows_of


@pytest.mark.parametrize("size", [64_000_000, 1000])
def test_ranges_find_what_a_dictionary_finds(tmp_path, monkeypatch, size):
    monkeypatch.setattr(dedup, "RANGE", size)
    extracted, rows_of = shards(tmp_path / "extract")
    with workers(1) as pool:
        hashed = run(tmp_path / "hashes", dedup.hash_tasks(extracted), {}, pool, {}, lambda _: None)
        repeated = run(tmp_path / "repeats", dedup.repeat_tasks(hashed), {}, pool, {}, lambda _: None)
    files = [str(repeated.folder / output["path"]) for output in repeated.paths(".npy")]
    assert len(files) == -(-sum(output["bytes"] for output in hashed.outputs) // size)
    first: dict[str, str] = {}
    for row in sorted(row for rows in rows_of for row in rows):
        first.setdefault(dedup.normalised(row.text), row.id)
    for number, rows in enumerate(rows_of):
        assert dedup.of_shard(files, number) == {row.id for row in rows if first[dedup.normalised(row.text)] != row.id}
    assert repeated.counters["repeats"] == 200 - len(first)
