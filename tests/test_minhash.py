"""Near-duplicates: recall by Jaccard index against theory, precision against brute force, and the stage on real files."""

import itertools
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from conf.program import load
from real.extract import load as documents
from real.life import Life
from real.minhash import BANDS, ROWS, components, entries, pairs, shingles
from real.stage import Manifest
from tests.conftest import TINY

VOCABULARY = [f"w{i}" for i in range(20_000)]


def varied(words: list[str], share: float, dice: random.Random) -> list[str]:
    return [dice.choice(VOCABULARY) if dice.random() < share else word for word in words]


@pytest.fixture(scope="module")
def planted() -> tuple[list[str], list[tuple[int, int]]]:
    """Documents, and pairs of which one is a varied copy of the other."""
    dice, texts, copies = random.Random(1), [], []
    for _ in range(2000):
        words = [dice.choice(VOCABULARY) for _ in range(120)]
        texts.append(" ".join(words))
        copies.append((len(texts) - 1, len(texts)))
        texts.append(", ".join(varied(words, dice.choice((0.0, 0.01, 0.02, 0.03, 0.05)), dice)).upper())
    return texts, copies


def test_recall_follows_the_law_and_nothing_else_goes(planted):
    """1 − (1 − s⁸)¹⁴ at every Jaccard index, within four standard errors; each removed document is a planted copy."""
    texts, copies = planted
    ids = [f"{i:032x}" for i in range(len(texts))]
    gone = {other: first for first, other in components(pairs([entries(ids, texts)]))}
    told: dict[float, list[tuple[float, bool]]] = {}
    for one, other in copies:
        mine, theirs = shingles(texts[one]), shingles(texts[other])
        jaccard = len(mine & theirs) / len(mine | theirs)
        told.setdefault(jaccard // 0.1 / 10, []).append((1 - (1 - jaccard**ROWS) ** BANDS, gone.get(ids[other]) == ids[one]))
    assert sum(len(rows) > 100 for rows in told.values()) >= 3
    for rows in told.values():
        expected, found = np.mean(rows, 0)
        assert abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(rows)) + 1e-9
    high = [found for at, rows in told.items() if at >= 0.9 for _, found in rows]
    assert np.mean(high) >= 0.999
    assert len(gone) == sum(found for rows in told.values() for _, found in rows)


def test_tables_in_pieces_give_the_same_pairs(planted):
    """However documents are dealt out and bands cut into ranges."""
    from real.minhash import between

    texts, ids = planted[0][:600], [f"{i:032x}" for i in range(600)]
    whole = pairs([entries(ids, texts)])
    pieces = [entries(ids[part::3], texts[part::3]) for part in range(3)]
    cuts = [0, 2**62, 2**63 + 5, 2**64]
    found = np.concatenate([pairs([between(piece, a, b) for piece in pieces]) for a, b in itertools.pairwise(cuts)])
    assert {tuple(pair) for pair in found} == {tuple(pair) for pair in whole} and len(whole) > 200


def test_what_hangs_together_is_one():
    edges = np.array([["b", "c"], ["a", "b"], ["x", "y"]], "S32")
    assert sorted(components(edges)) == [("a", "b"), ("a", "c"), ("x", "y")]
    assert list(components(np.empty((0, 2), "S32"))) == [] and len(entries(["a" * 32], ["…"])) == 0


def test_the_stage_removes_near_copies(tmp_path):
    """Real files through extract and dedup; the second time nothing is done again and the digests are equal."""
    dice, corpus = random.Random(3), tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        words = [dice.choice(VOCABULARY) for _ in range(300)]
        (corpus / f"{number}.txt").write_text(" ".join(words))
        (corpus / f"near{number}.txt").write_text(". ".join(varied(words, 0.002, dice)))
    plan = load([*TINY, f"data.path={corpus}", "data.dedup=minhash"])
    digests = []
    for _ in range(2):
        life = Life(plan, tmp_path / "run", lambda _: None)
        life.data(["extract", "dedup"])
        done = Manifest.read(tmp_path / "run" / "dedup")
        digests.append([output["sha256"] for output in done.outputs])
    assert done.counters["documents_in"] == 120 and done.counters["removed_exact"] == 0
    assert 58 <= done.counters["removed"] <= 60 and digests[0] == digests[1]
    kept = [Path(source).stem.removeprefix("near") for output in done.outputs
            for source in pq.read_table(tmp_path / "run" / "dedup" / output["path"]).column("source").to_pylist()]  # fmt: skip
    assert set(kept) == {str(number) for number in range(60)}


# -- where documents meet, and which stays


def _snapshots(tmp_path):
    folder, text = tmp_path / "web", " ".join(f"word{n}" for n in range(200))
    texts = {
        "one/a.txt": text,
        "one/b.txt": text + " more",
        "two/a.txt": text.replace(" ", "   "),
        "two/c.txt": " ".join(f"other{n}" for n in range(200)),
    }
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return [*TINY, f"data.path={folder}", "data.dedup=minhash"], texts


@pytest.mark.parametrize(("words", "stay"), [
    (["data.keep=longest"], [{"one/b.txt", "two/c.txt"}]),
    (["data.dedup_within=folder", "data.keep=longest"], [{"one/b.txt", "two/a.txt", "two/c.txt"}]),
    ([], [{"one/a.txt", "two/c.txt"}, {"one/b.txt", "two/c.txt"}, {"two/a.txt", "two/c.txt"}]),
])  # fmt: skip
def test_where_documents_meet_and_which_stays(foretold, tmp_path, words, stay):
    plan, texts = _snapshots(tmp_path)
    status, _, err = foretold("real", "only=extract,dedup", *plan, *words)
    assert status == 0, err
    run = next((tmp_path / "runs").glob("*/real"))
    rows = [row for output in Manifest.read(run / "dedup").paths(".parquet") for row in documents(run / "dedup" / output["path"])]
    found = {str(Path(row.source).relative_to(tmp_path / "web")) for row in rows}
    assert found in stay and all(texts[str(Path(row.source).relative_to(tmp_path / "web"))] == row.text for row in rows)


def test_folders_need_a_folder(foretold):
    status, _, err = foretold("real", *TINY, "data.dedup_within=folder")
    assert status == 2 and "data.dedup_within=folder needs data.path=python to be a folder of folders" in err
    assert load(["data=web", "data.path=crawl", "crawl.seeds=[https://a.example/]"]).data.dedup_within == "folder"  # a crawl is one
