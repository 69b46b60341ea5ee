"""The section of the report on data: every page is accounted for, and what was refused can be read."""

import json
from pathlib import Path

import pytest

from analysis.funnel import counters, steps
from analysis.pair import open_pair
from tests.conftest import TINY
from tests.test_filters import GOOD, prose


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [prose(seed=seed) for seed in range(40)]
    texts += [texts[0], texts[1].replace(" and that.", " and that"), "Too short.", GOOD + " #" * 90]
    rows = [{"text": text, "url": f"http://host.example/{number}"} for number, text in enumerate(texts)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data.filter=gopher", "data.dedup=minhash", "data.languages=[any]", "data.mask=true", f"data.path={folder}"]


def test_the_report_has_a_funnel(foretold, pages):
    status, _, err = foretold("real", "only=extract,dedup,tokens", *TINY, *pages)
    assert status == 0, err
    real = open_pair("runs", "").real
    rows = steps(counters(real))
    told = {name: count for name, count, _ in rows}
    assert told == {"pages": 44, "– rule: words": -1, "– rule: symbols": -1, "documents": 42, "– duplicates": -1, "– near-duplicates": -1,
                    "unique documents": 40}  # fmt: skip
    for first, last in (("pages", "documents"), ("documents", "unique documents")):  # what goes in is what comes out and what was refused
        names = list(told)
        between = names[names.index(first) : names.index(last)]
        assert sum(told[name] for name in between) == told[last]
    status, out, _ = foretold("analysis", "report")
    page = Path(out.strip()).read_text()
    for words in ("From pages to tokens", "What was refused", "http://host.example/42", "Bytes a token", "Groups of near-duplicates"):
        assert words in page
