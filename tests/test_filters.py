"""The published rules on texts made to break each, and their counts in the manifest."""

import random

import numpy as np
import pytest

from conf.errors import Refused
from conf.program import load
from real.filters import PRESETS, Page, judge, repeats
from real.life import Life
from real.stage import Manifest
from sim.extract import Corpus, kept
from tests.conftest import TINY

COMMON = "the river and people have seen that morning light over mountains with many quiet gardens where birds sing for joy of spring"
WORDS = COMMON.split()


def prose(sentences: int = 30, seed: int = 0) -> str:
    """Sentences that no rule refuses: of different words, a line each, no run repeated."""
    dice = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = [dice.choice(WORDS) + dice.choice(("", "ed", "ing", "er", "ly", "ness", "ful")) for _ in range(12)]
        lines.append(f"{' '.join(['The', *words, 'and', 'that'])}.")
    return "\n".join(lines)


GOOD = prose()
BARE = prose(15).replace(" and that.", ".").replace("The ", "").splitlines()  # no two lines begin or end alike
REFRAIN = "Wonderfulness mountainsides gardenful"  # of words alone no run of five comes again
BAD = [
    ("gopher", "words", "The people and that river. " * 3),
    ("gopher", "word length", GOOD.replace(" ", "").replace("\n", " ") + " the and " * 60),
    ("gopher", "symbols", GOOD + " #" * 90),
    ("gopher", "bullets", "\n".join(f"- {line}" for line in GOOD.splitlines())),
    ("gopher", "ellipses", GOOD.replace(".\n", "...\n", 12).replace(".\n", " …\n", 3)),
    ("gopher", "letters", GOOD + " 12345" * 200),
    ("gopher", "stop words", " ".join(word for word in GOOD.split() if word.lower() not in ("the", "and", "that", "of", "with", "have"))),
    ("gopher", "repeated lines", GOOD + "\n" + "\n".join(GOOD.splitlines()[:25])),
    ("gopher", "repeated paragraphs",
     "\n\n".join([*(prose(3, seed) for seed in range(6)), *(["The one and that paragraph.\nIt has lines."] * 5)])),
    ("gopher", "commonest run", GOOD + " " + "wonderful mountains " * 70),
    ("gopher", "repeated runs", GOOD + " " + " ".join(GOOD.split()[:120]) + " and " + " ".join(GOOD.split()[130:200])),
    ("c4", "braces", GOOD + "\nThe function body { is here } and that ends."),
    ("c4", "lorem ipsum", GOOD + "\nThe text lorem ipsum is here and that ends."),
    ("c4", "sentences", "\n".join(GOOD.splitlines()[:4])),
    ("c4", "no line left", GOOD.replace(".", "")),
    ("fineweb", "unfinished lines", "\n".join([*GOOD.splitlines()[:5], *(f"{line[:-1]} also" for line in prose(60, 5).splitlines())])),
    ("fineweb", "short lines",
     "\n".join([*GOOD.splitlines(), *(f"{a} {b} {c} here." for a, b, c in zip(WORDS * 6, WORDS[3:] * 7, WORDS[7:] * 9, strict=False))])),
    ("fineweb", "characters in repeated lines",
     "\n".join(f"{line}\n{REFRAIN}" if n % 5 in (1, 3) else line for n, line in enumerate(BARE))),
]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_prose_stays_as_it_is(preset):
    assert judge(GOOD, preset) == (GOOD, None)


@pytest.mark.parametrize(("preset", "rule", "text"), BAD)
def test_each_rule_refuses_what_breaks_it(preset, rule, text):
    assert judge(text, preset)[1] == rule


def test_every_rule_is_broken_by_a_case():
    named = {name for steps in PRESETS.values() for _, rules in steps for name, _ in rules}
    assert named == {rule for _, rule, _ in BAD} - {"no line left"}


def test_lines_that_c4_drops():
    extra = ["Too short.", "No end to this line of words", "Please enable JavaScript to read this page.", "And so it goes on..."]
    assert judge("\n".join([*GOOD.splitlines(), *extra]), "c4") == (GOOD, None)
    assert judge("\n".join([*GOOD.splitlines(), *extra]), "fineweb")[0].splitlines()[-2:] == [extra[1], extra[3]]


def test_shares_are_those_of_a_count_by_hand():
    """Characters in repeats of runs, each character once, against a plain loop."""
    dice = random.Random(2)
    words = [dice.choice(["ab", "cde", "fghi", "jk"]) for _ in range(200)]
    page = Page(" ".join(words))
    for size in (2, 5, 7):
        runs = page.runs(size)
        seen, covered = set(), set()
        for start in range(len(words) - size + 1):
            run = tuple(words[start : start + size])
            covered |= set(range(start, start + size)) if run in seen else set()
            seen.add(run)
        again = np.ones(len(runs), bool)
        again[np.unique(runs, return_index=True)[1]] = False
        expected = sum(len(words[i]) for i in covered) / sum(map(len, words))
        assert page.share_of(np.flatnonzero(again), size) == pytest.approx(expected)
    assert repeats(["x", "yy", "yy", "yy"]) == (0.5, 4 / 7)


def test_rules_are_counted_in_the_manifest(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(4):
        (corpus / f"good{number}.txt").write_text(prose(30, number))
    (corpus / "short.txt").write_text("Too short.")
    (corpus / "braces.txt").write_text(prose(30, 9) + "\nThe body { is here } and that ends.")
    said: list[str] = []
    plan = load([*TINY, f"data.path={corpus}", "data.filter=fineweb"])
    Life(plan, tmp_path / "run", said.append).data(["extract"])
    counters = Manifest.read(tmp_path / "run" / "extract").counters
    assert (counters["documents"], counters["refused"], counters["refused: words"], counters["refused: braces"]) == (4, 2, 1, 1)
    assert any("2 refused (" in line and "words 1" in line for line in said)
    for path in corpus.glob("good*"):
        path.unlink()
    with pytest.raises(Refused, match=r"data\.filter=fineweb refused all of it"):
        Life(plan, tmp_path / "none", said.append).data(["extract"])


def test_sim_leaves_out_the_expected_share():
    plan = load([*TINY, "data.filtered=0.25"])
    left = kept(Corpus((100.0, 60.0), 8.0), plan.data)
    assert list(left.shards) == [75.0, 45.0] and left.documents == 6.0
