"""Repeated passages: the windows found against a suffix array, what stays against brute force, and the stage on real files."""

import random
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.errors import Refused
from conf.program import load
from real import extract, stage, substring
from real.life import Life
from real.stage import Manifest
from real.winnow import words_of
from tests.conftest import TINY

N = 50
VOCABULARY = [f"w{i}" for i in range(3000)] + ["été", "naïve,", "\N{SNOWMAN}", "-", "-"]
SPACES = [" "] * 8 + ["  ", "\n", "\n\n", "\t", "\u2003", "\x1c"]
Window = tuple[str, int]  # document id, number of its first word


def spaced(words: list[str], dice: random.Random) -> str:
    text = "".join(word + dice.choice(SPACES) for word in words)
    return dice.choice(["", " ", "\n"]) + (text if dice.random() < 0.5 else text.rstrip())


def corpus(seed: int) -> list[tuple[str, str, str]]:
    """260 documents with passages of 30 to 200 words in common, some within others, some twice in one document."""
    dice = random.Random(seed)

    def fresh(count: int) -> list[str]:
        return [dice.choice(VOCABULARY) for _ in range(count)]

    shared = [fresh(dice.randrange(30, 201)) for _ in range(40)] + [fresh(N), fresh(N - 1), fresh(20) * 8, ["-"] * 120]
    shared += [left[-60:] + right[:60] for left, right in zip(shared[:10], shared[10:20], strict=True)]  # these overlap others
    documents = [fresh(dice.randrange(0, 60)) for _ in range(260)]
    for passage in shared:
        for _ in range(dice.randrange(2, 7)):
            dice.choice(documents).extend([*passage, *fresh(dice.choice((1, 3, 30)))])
    documents[0] += [*shared[40], "x", *shared[40]]  # twice in one document, N words long
    documents[1] = [*shared[1], *shared[0]]
    ids = [extract.document_id(str(seed), number) for number in range(len(documents))]
    documents[ids.index(max(ids))] = list(shared[40])  # and no word besides
    return [(i, "here", spaced(words, dice)) for i, words in zip(ids, documents, strict=True) if words]


def cut_out(rows: list[tuple[str, str, str]], shards: int, folder: Path, length: int = N) -> Manifest:
    """The documents dealt out to some shards, and all steps."""
    documents = folder / "documents"
    documents.mkdir(parents=True)
    outputs = []
    for shard in range(shards):
        path = documents / f"part-{shard:05}.parquet"
        extract.save(path, [extract.Document(identity, source, 0, "", "", text) for identity, source, text in rows[shard::shards]])
        outputs.append({"path": path.name, "bytes": path.stat().st_size, "sha256": stage.sha256(path)})
    with ThreadPoolExecutor(2) as pool:
        return substring.remove(folder / "done", Manifest(documents, outputs, {"removed": 0}, 0.0), length, pool, lambda _: None)


def windows(done: Manifest) -> dict[Window, bool]:
    """Repeated windows that the steps found, and whether each is the first."""
    found: dict[Window, bool] = {}
    names = [pq.read_table(path).column("id").to_pylist() for path in sorted((done.folder.parent / "documents").glob("*.parquet"))]
    for path in (done.folder / "substrings" / "copies").glob("*.npy"):
        for shard, document, offset, first in np.load(path).tolist():
            found[names[shard][document], offset] = bool(first)
    return found


def texts(done: Manifest) -> dict[str, str]:
    rows = [row for output in done.paths(".parquet") for row in pq.read_table(done.folder / output["path"]).to_pylist()]
    return {row["id"]: row["text"] for row in rows}


def suffix_array(codes: np.ndarray) -> np.ndarray:
    """Prefix doubling (Manber and Myers 1990): suffixes sorted by their first 1, 2, 4, … codes."""
    rank, reach = np.unique(codes, return_inverse=True)[1], 1
    while True:
        following = np.append(rank[reach:] + 1, np.zeros(min(reach, len(rank)), int))
        order = np.lexsort((following, rank))
        new = np.cumsum(np.append(0, (np.diff(rank[order]) != 0) | (np.diff(following[order]) != 0)))
        rank[order] = new
        if new[-1] == len(rank) - 1:
            return order
        reach *= 2


def common_prefixes(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many codes each suffix has in common with the one before it in the order (Kasai et al. 2001)."""
    place, found, shared = np.argsort(order), np.zeros(len(codes), int), 0
    for at in range(len(codes)):
        if place[at]:
            other = order[place[at] - 1]
            while max(at, other) + shared < len(codes) and codes[at + shared] == codes[other + shared]:
                shared += 1
            found[place[at]] = shared
        shared = max(0, shared - 1) if place[at] else 0
    return found


def by_suffix_array(rows: list[tuple[str, str, str]], length: int) -> dict[Window, bool]:
    """Repeated windows, and whether each is the first of its kind: neighbours in the suffix array with `length` words in common."""
    numbers: dict[str, int] = {}
    codes, owners = [], []
    for row, (identity, _, text) in enumerate(sorted(rows)):
        words = re.findall(r"\S+", text)
        codes += [*(numbers.setdefault(word, len(rows) + len(numbers)) for word in words), row]  # no document runs into the next
        owners += [*((identity, at) for at in range(len(words) + 1))]
    order = suffix_array(np.array(codes))
    alike = common_prefixes(np.array(codes), order) >= length
    groups = np.split(order, np.flatnonzero(~alike)[1:])
    return {owners[at]: at == min(group) for group in groups if len(group) > 1 for at in group}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def planted(request, tmp_path_factory):
    rows = corpus(request.param)
    return rows, by_suffix_array(rows, N), cut_out(rows, 1, tmp_path_factory.mktemp("one"))


def test_windows_are_those_of_a_suffix_array(planted):
    rows, expected, done = planted
    assert len(rows) >= 200 and len(expected) > 5000 and sum(expected.values()) > 2000
    assert windows(done) == expected


def test_the_first_stays_whole_and_no_word_else(planted):
    """Of the words of later occurrences exactly those stay that belong to a first one; the rest of each text keeps every byte."""
    rows, expected, done = planted
    after, removed = texts(done), 0
    for identity, _, text in rows:
        spans = [word.span() for word in re.finditer(r"\S+", text)]
        first, later = ({at + i for (i_, at), is_first in expected.items() if i_ == identity and is_first == which for i in range(N)}
                        for which in (True, False))  # fmt: skip
        gone = later - first
        removed += len(gone)
        ends = [*(begin for begin, _ in spans[1:]), len(text)]
        rest = "".join(text[begin:end] for i, ((begin, _), end) in enumerate(zip(spans, ends, strict=True)) if i not in gone)
        rest = text[: spans[0][0]] + rest
        assert after.get(identity, "") == (rest if rest.strip() else "")
    assert done.counters["words_removed"] == removed > 3000
    assert done.counters["emptied"] == len(rows) - len(after) >= 1 and done.counters["removed"] == done.counters["emptied"]


def test_one_copy_of_every_window_stays(planted):
    """Counted in the texts that stay: one, or more only where every word of a later copy belongs to a first one of another window."""
    rows, expected, done = planted
    words = {identity: text.split() for identity, _, text in rows}
    kinds = {tuple(words[i][at : at + N]) for i, at in expected}
    stay = Counter(window for text in texts(done).values() for window in zip(*(text.split()[i:] for i in range(N)), strict=False))
    first = defaultdict(set)
    for (identity, at), is_first in expected.items():
        if is_first:
            first[identity] |= set(range(at, at + N))
    spared = Counter(tuple(words[i][at : at + N]) for (i, at), is_first in expected.items()
                     if not is_first and first[i].issuperset(range(at, at + N)))  # fmt: skip
    assert {kind: stay[kind] for kind in kinds} == {kind: 1 + spared[kind] for kind in kinds}
    assert sum(spared.values()) < len(kinds) / 10


def test_shards_make_no_difference(planted, tmp_path, monkeypatch):
    """Nor do ranges: five shards, and as many ranges as entries allow, leave the same texts."""
    rows, expected, done = planted
    monkeypatch.setattr(substring, "RANGE", 20_000)
    other = cut_out(random.Random(5).sample(rows, len(rows)), 5, tmp_path)
    assert len(list((other.folder / "substrings" / "copies").glob("*.npy"))) > 5
    assert texts(other) == texts(done) and windows(other) == expected
    assert all(
        other.counters[name] == done.counters[name] for name in ("words", "words_removed", "touched", "emptied", "passages", "bytes")
    )


@pytest.mark.parametrize("length", [20, 21, 64])
def test_other_lengths(length, tmp_path):
    rows = corpus(3)
    assert windows(cut_out(rows, 3, tmp_path, length)) == by_suffix_array(rows, length)


def test_words_are_what_a_regular_expression_finds():
    """All characters that a text can hold between two letters, and white space at the ends."""
    ends = ["", "  ", " a b ", "\u3000a", "a\x85"]
    strings = ends + [f"a{chr(i)}b{chr(i)}c" for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    hashed, counts = words_of(pa.chunked_array([strings], pa.large_string()))
    assert counts.tolist() == [len(re.findall(r"\S+", text)) for text in strings] and len(hashed) == counts.sum()
    assert hashed[0] == words_of(pa.chunked_array([["a"]], pa.large_string()))[0][0]  # the a of " a b "


def test_nothing_to_find(tmp_path):
    """Short documents, none with anything in common; a shard without a document."""
    rows = [(extract.document_id("short", i), "here", f"only {i}") for i in range(3)]
    done = cut_out(rows, 4, tmp_path)
    assert texts(done) == {identity: text for identity, _, text in rows} and not done.paths(".txt")
    assert done.counters["words_removed"] == done.counters["touched"] == done.counters["emptied"] == 0


def test_the_stage_cuts_out_passages(tmp_path):
    """Real files through extract, dedup and tokens; the second time nothing is done again and the digests are equal."""
    dice, folder = random.Random(4), tmp_path / "corpus"
    folder.mkdir()
    licence = [dice.choice(VOCABULARY[:3000]) for _ in range(80)]
    for number in range(30):
        own = [f"own{number}.{i}" for i in range(100)]
        (folder / f"{number}.txt").write_text(" ".join([*licence, *own]) + "\n")
    plan, lines, digests = load([*TINY, f"data.path={folder}", "data.substrings=50"]), [], []
    for _ in range(2):
        life = Life(plan, tmp_path / "run", lines.append)
        life.data(["extract", "dedup", "tokens"])
        done = Manifest.read(tmp_path / "run" / "dedup")
        digests.append([output["sha256"] for output in done.outputs])
    assert digests[0] == digests[1] and done.facts["before"]["documents_in"] == 30
    assert any("2,320 of 5,400 words cut out of 29" in line for line in lines), "".join(lines)
    assert sorted(len(text.split()) for text in texts(done).values()) == [100] * 29 + [180]
    sample = (done.folder / done.paths(".samples.txt")[0]["path"]).read_text().splitlines()
    assert 10 < len(sample) <= 40 and " ".join(licence) in sample[0]
    assert Manifest.read(tmp_path / "run" / "tokens").counters["documents"] == 30


def test_short_passages_are_refused():
    with pytest.raises(Refused, match=r"data\.substrings=5 must be at least 20 words"):
        load([*TINY, "data.substrings=5"])
