"""Pages from real and from hostile archives, and what becomes of each."""

import ctypes
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from conf.program import load
from real.contamination import hit
from real.extract import Choices, extract
from real.extract import load as documents
from real.guard import Broken, Guard
from real.language import language
from real.pages import decoded, read
from real.private import masked
from real.urls import Blocklist
from tests.conftest import TINY

REAL = Path(__file__).parents[2] / "shared" / "data" / "text_and_web"
real_archives = pytest.mark.skipif(not REAL.is_dir(), reason="the real archives of ../shared are not here")
PROSE = "The river was high that morning, and the people of the village had gone to the bridge to see what it would do. "


@real_archives
def test_archives_give_the_same_pages_in_every_form():
    """Captures of the same pages as WARC and ARC, gzip and lz4; a cut file gives what stands before the cut."""
    counted = Counter()

    def texts(name):
        return [hashlib.sha256(page.text.encode()).hexdigest() for page in read(REAL / "warc" / name, "text", 2e7, counted)]

    aut, lz4 = "aut/src/test/resources", "resiliparse/tests/data/warcfile.warc"
    assert len(texts(f"{aut}/warc/example.warc.gz")) == 129 == len(texts(f"{aut}/arc/example.arc.gz"))
    assert texts(f"{lz4}.lz4") == texts(f"{lz4}.gz") and len(texts(f"{lz4}.gz")) == 16
    assert len(texts("daft/tests/assets/example.warc.gz")) == 1  # said to be brotli, and plain
    counted.clear()
    assert texts("resiliparse/tests/data/clipped.warc.gz") == [] and counted["passed: cut short"] == 1
    page = next(read(REAL / "warc/whirlwind/whirlwind.warc.wet.gz", "text", 2e7, counted))
    assert page.url.startswith("https://") and not page.html and len(page.text) > 1000


def archive(path: Path, *answers: tuple[str, bytes], lie: int = 0) -> Path:
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=path.suffix == ".gz")
        for number, (kind, body) in enumerate(answers):
            headers = StatusAndHeaders("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body) + lie))], protocol="HTTP/1.1")
            url = f"http://host.example/{number}"
            writer.write_record(writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=headers))
    return path


def html(body: str, charset: str = "utf-8") -> bytes:
    return f"<html><head><title>t</title></head><body>{body}</body></html>".encode(charset)


def chosen(*overrides: str) -> Choices:
    return Choices.of(load([*TINY, "data.path=python", *overrides]))


def test_hostile_records_cost_only_themselves(tmp_path):
    hostile = {
        "a page": ("text/html", html(f"<p>{PROSE}</p>")),
        "a wrong charset": ("text/html; charset=ascii", html(f"<p>Ein schöner {PROSE}</p>")),
        "an old charset": ("text/html; charset=iso-8859-1", html(f"<p>Ein schöner {PROSE}</p>", "latin-1")),
        "an unknown charset": ("text/html; charset=klingon", html(f"<p>Ein schöner {PROSE}</p>")),
        "a picture called a page": ("text/html", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20),
        "noise called text": ("text/plain", bytes(range(256)) * 20),
        "a large page": ("text/html", html("<p>x</p>" * 40_000)),
        "an empty page": ("text/html", b""),
        "a page without text": ("text/html", html("<script>x()</script>")),
        "a deep page": ("text/html", html("<div>" * 5_000 + PROSE + "</div>" * 5_000)),
        "zeros": ("text/html", html(f"<p>{PROSE}\0\0</p>")),
        "no UTF-8": ("text/html; charset=utf-8", html(f"<p>{PROSE}").replace(b"river", b"riv\xff\xfeer") + b"</p>"),
        "a film": ("video/mp4", b"x"),
        "a dead link": ("text/html", html('<p>Links: <a href="http://[bad">bad</a></p>')),
    }
    path = archive(tmp_path / "a.warc.gz", *hostile.values())
    for extractor, more in (("tags", {8, 9}), ("trafilatura", set()), ("resiliparse", {9})):  # 8 has a title, 9 is deep
        told = extract(tmp_path, extractor, [str(path)], chosen(f"data.extractor={extractor}", "data.page_limit=300 kB"))
        assert told["passed: binary"] == 2 and told["passed: too large"] == 1 and told["passed: other content"] == 1, told
        assert told["passed: empty page"] == 1 and told["unreadable"] == 0 and told["records"] == len(hostile)
        texts = {row.number: row.text for row in documents(tmp_path / f"{extractor}.parquet")}
        for number, name in enumerate(hostile):
            if name.endswith("charset"):
                assert ("Ein schöner" in texts[number]) == (name != "a page"), (extractor, name)
        assert texts.keys() == {0, 1, 2, 3, 10, 11, 13} | more, (extractor, told)
        assert "\0" not in "".join(texts.values()) and "The river was high" in texts[0]
        assert all("of the village" in texts[number] for number in (10, 11))
        assert {row.url for row in documents(tmp_path / f"{extractor}.parquet")} == {f"http://host.example/{number}" for number in texts}


def test_a_damaged_file_costs_what_follows_the_damage(tmp_path):
    whole = archive(tmp_path / "whole.warc.gz", *[("text/html", html(f"<p>{PROSE}{n}</p>")) for n in range(50)])
    data = whole.read_bytes()
    (tmp_path / "cut.warc.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "spoilt.warc.gz").write_bytes(data[: len(data) // 2] + b"\xff" * 900 + data[len(data) // 2 + 900 :])
    (tmp_path / "not.warc").write_bytes(b"hello")
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as out:
        out.write("".join(json.dumps({"text": f"{PROSE}{n}"}) + "\n" for n in range(2000)))
    lines = (tmp_path / "lines.jsonl.gz").read_bytes()
    (tmp_path / "lines.jsonl.gz").write_bytes(lines[: len(lines) // 2])
    (tmp_path / "list.jsonl").write_text('{"text": "one"}\n[1, 2]\n{"text": "three"}\n')
    names = ["whole.warc.gz", "cut.warc.gz", "spoilt.warc.gz", "not.warc", "lines.jsonl.gz", "list.jsonl"]
    told = extract(tmp_path, "out", [str(tmp_path / name) for name in names], chosen())
    found = Counter(Path(row.source).name for row in documents(tmp_path / "out.parquet"))
    assert found["whole.warc.gz"] == 50 and 20 <= found["cut.warc.gz"] <= 25 and 20 <= found["spoilt.warc.gz"] <= 25
    assert 0 < found["lines.jsonl.gz"] < 2000 and found["list.jsonl"] == 1 and not found["not.warc"]
    damaged = (tmp_path / "out.unreadable.txt").read_text()
    assert told["unreadable"] == len(damaged.splitlines()) >= 2 and "lines.jsonl.gz" in damaged and "line 2 holds no object" in damaged


def test_charsets():
    assert decoded("日本".encode("iso-2022-jp"), "iso-2022-jp") == "日本"
    assert decoded("наука и жизнь на реке".encode("cp1251"), "windows-1251") == "наука и жизнь на реке"
    assert decoded("ab".encode("utf-16"), None) == "ab"
    russian = '<meta charset="windows-1251"><p>' + "наука и жизнь " * 20
    assert "наука" in decoded(russian.encode("cp1251"), None)


# -- one page can neither hang nor crash a worker


def _loop(page):
    hostile = {"hang": lambda: re.match(r"(a+)+$", "a" * 60 + "b"), "sleep": lambda: time.sleep(60), "crash": lambda: ctypes.string_at(0),
               "memory": lambda: len(bytearray(2 * 10**9)), "error": lambda: 1 / 0, "exit": lambda: sys.exit(3)}  # fmt: skip
    return hostile[page]() if page in hostile else page.upper()


@pytest.mark.parametrize(("page", "why"), [("hang", "too long"), ("sleep", "too long"), ("crash", "crash"), ("memory", "too much memory"),
                                           ("error", "error: ZeroDivisionError"), ("exit", "crash")])  # fmt: skip
def test_a_page_ends_its_own_process_alone(page, why):
    guard = Guard(_loop, seconds=0.1, memory=2e8)
    began = time.monotonic()
    assert guard.call("a") == "A"
    with pytest.raises(Broken, match=f"^{why}$"):
        guard.call(page)
    assert guard.call("b") == "B" and time.monotonic() - began < 5
    guard.close()


def test_pages_that_break_the_extractor_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("real.extract.main_text", lambda _: lambda page: _loop(re.sub("<[^>]*>", "", page)[1:]))
    pages = [("text/html", html(word)) for word in ("good", "hang", "crash", "good")]
    told = extract(tmp_path, "out", [str(archive(tmp_path / "a.warc", *pages))], chosen("data.page_seconds=0.1 s"))
    assert told["documents"] == 2 and told["refused: page too long"] == 1 and told["refused: page crash"] == 1
    samples = [json.loads(line) for line in (tmp_path / "out.refused.jsonl").read_text().splitlines()]
    assert [(sample["reason"], sample["number"]) for sample in samples] == [("page too long", 1), ("page crash", 2)]


# -- language, addresses, persons, evaluation sets


class _Paragraphs(HTMLParser):
    def __init__(self):
        super().__init__()
        self.parts, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "p"
        self.parts += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "p"

    def handle_data(self, data):
        if self.inside:
            self.parts[-1] += data


UDHR = """id ind hr hrv sr srp_cyrl no nob zh cmn_hans sw swh
af afr ar arb bg bul ca cat cs ces cy cym da dan de deu_1996 el ell_monotonic en eng eo epo es spa et est eu eus fa pes_1
fi fin fr fra ga gle gl glg he heb hi hin hu hun hy hye is isl it ita ja jpn ka kat ko kor la lat lt lit lv lvs mk mkd ml mal mn khk
nl nld pl pol pt por_PT ro ron_2006 ru rus sk slk sl slv sq als sv swe ta tam te tel th tha tr tur uk ukr ur urd vi vie"""


@real_archives
def test_languages_of_the_declaration_of_human_rights():
    """Asked: 97% of paragraphs, over 49 languages; here 55, Croatian and Indonesian, which it takes for their neighbours, among them."""
    right = Counter()
    with tarfile.open(REAL / "multilang" / "udhr.tar.gz") as tar:
        held = {Path(member.name).stem: member for member in tar.getmembers() if member.name.endswith(".html")}
        pairs = zip(*[iter(UDHR.split())] * 2, strict=True)
        wanted = [(code, name) for code, name in pairs if name in held]
        for code, name in wanted:
            parser = _Paragraphs()
            parser.feed(tar.extractfile(held[name]).read().decode())
            right.update(language(text)[0] == code for part in parser.parts if len(text := " ".join(part.split())) > 60)
    assert len(wanted) >= 55 and right[True] / right.total() >= 0.97, (len(wanted), right)


def test_only_wanted_languages_stay(tmp_path):
    (tmp_path / "en.txt").write_text(PROSE * 3)
    (tmp_path / "de.txt").write_text("Der Fluss stand an diesem Morgen hoch, und die Leute des Dorfes waren zur Brücke gegangen. " * 3)
    files = [str(tmp_path / name) for name in ("en.txt", "de.txt")]
    told = extract(tmp_path, "out", files, chosen("data.languages=[en]"))
    assert [row.language for row in documents(tmp_path / "out.parquet")] == ["en"]
    assert told["refused: language"] == 1 and told["language: de"] == 1
    told = extract(tmp_path, "all", files, chosen("data.languages=[any]"))
    assert told["documents"] == 2 and told["refused"] == 0


@pytest.mark.parametrize(("text", "after", "kinds"), [
    ("write to jo.doe+x@mail.example.org.", "write to someone@example.com.", {"e-mail": 1}),
    ("from 8.8.4.4 and 2001:4860:4860::8888", "from 192.0.2.1 and 2001:db8::1", {"IP address": 2}),
    ("home is 127.0.0.1 or 192.168.1.4", None, {}), ("version 1.2.3.4.5 of 10.10", None, {}), ("at 12:30:45 std::vector", None, {}),
    ("call +44 20 7946 0958 now", "call +1 555-555-0100 now", {"phone": 1}),
    ("call (212) 736-5000.", "call +1 555-555-0100.", {"phone": 1}),
    ("ISBN 978-0-13-468599-1 costs 1,234,567.89 in 2024-11-27", None, {}), ("pi is 3.14159265 and @home is no address", None, {}),
])  # fmt: skip
def test_personal_data_is_masked(text, after, kinds):
    assert masked(text) == (after or text, Counter(kinds))


def test_masking_takes_time_in_proportion():
    for piece in ("a" * 64, "1.", "1:", "a@", "+1 2 ", "a.b-"):
        began = time.process_time()
        masked(piece * (200_000 // len(piece)))
        assert time.process_time() - began < 2, piece


def test_addresses_keep_pages_out(tmp_path):
    (tmp_path / "list").write_text("# not these\nbad.example\ncasino  # a word\n")
    blocked = Blocklist(tmp_path / "list")
    hits = {"http://www.bad.example/x": "bad.example", "https://bad.example:80": "bad.example", "http://notbad.example/": None,
            "http://good.example/Casino-royale": "casino", "http://good.example/casinos": None, "http://[": None}  # fmt: skip
    assert {url: blocked.hit(url) for url in hits} == hits
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": PROSE, "url": url}) + "\n" for url in hits))
    told = extract(tmp_path, "out", [str(tmp_path / "lines.jsonl")], chosen(f"data.blocklist={tmp_path / 'list'}"))
    assert told["refused: url"] == 3 and told["documents"] == 3


def test_what_examines_a_model_is_not_taught(tmp_path):
    question = "If a train leaves the old station at noon with eleven cars, how many people can it carry to the sea?"
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": "Something else."}) + "\n" + json.dumps({"text": question}) + "\n")
    exam = (str(tmp_path / "exam.jsonl"),)
    found = hit(f"{PROSE} {question.upper().replace(',', ' –')} {PROSE}", exam, "text")
    assert found.number == 1 and found.run.startswith("if a train leaves") and len(found.run.split()) == 13
    assert hit(" ".join(question.split()[:12]) + " otherwise", exam, "text") is None
    (tmp_path / "a.txt").write_text(PROSE + question)
    (tmp_path / "b.txt").write_text(PROSE)
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    told = extract(tmp_path, "out", files, chosen(f"data.evaluations=[{exam[0]}]"))
    assert told["refused: contaminated"] == 1 and told["documents"] == 1
    assert json.loads((tmp_path / "out.refused.jsonl").read_text())["file"] == exam[0]


# -- from archives to tokens


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "web"
    (folder / "deep").mkdir(parents=True)
    pages = [("text/html", html("".join(f"<p>{PROSE}Number {n} of {k}.</p>" for k in range(8)))) for n in range(60)]
    archive(folder / "a.warc.gz", *pages[:40])
    archive(folder / "deep" / "b.warc", *pages[40:])
    return folder


def test_web_archives_become_tokens(foretold, web, tmp_path):
    status, out, err = foretold(
        "real", "only=extract,dedup,tokens", *TINY, f"data.path={web}", "data.extractor=trafilatura", "data.languages=[en]"
    )
    assert status == 0 and "60 documents" in out, out + err
    run = next((tmp_path / "runs").glob("*/real"))
    manifest = json.loads((run / "extract" / "manifest.json").read_text())
    assert set(manifest["config"]["libraries"]) == {"fastwarc", "trafilatura", "py3langid"}
    tables = [pq.read_table(path) for path in (run / "dedup").glob("*.parquet")]
    assert {url for table in tables for url in table.column("url").to_pylist()} == {f"http://host.example/{n}" for n in range(40)} | {
        f"http://host.example/{n}" for n in range(20)
    }


@pytest.mark.parametrize(("overrides", "line"), [
    (["data.languages=[english]"], "data.languages: 'english' is no language that py3langid"),
    (["data.blocklist=nowhere"], "data.blocklist=nowhere: no such file"),
    (["data.evaluations=[nowhere.jsonl]"], "data.evaluations=nowhere.jsonl: no such file"),
    (["data.extractor=trafilature"], "data.extractor"), (["data.page_seconds=0 s"], "data.page_seconds"),
])  # fmt: skip
def test_a_wrong_choice_is_one_line(foretold, web, overrides, line):
    status, _, err = foretold("real", "only=extract", *TINY, f"data.path={web}", *overrides)
    assert status != 0 and line in err and "Traceback" not in err, err


def test_a_missing_library_is_one_line(foretold, web, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("real.extract.version", missing)
    status, _, err = foretold("real", "only=extract", *TINY, f"data.path={web}")
    assert status != 0 and "needs fastwarc, which is not installed; pip install 'foretold[data]'" in err and "Traceback" not in err, err


def test_a_spoilt_blocklist_is_one_line(foretold, web, tmp_path):
    shutil.copy(web / "a.warc.gz", tmp_path / "list")
    (tmp_path / "list").write_text("http://bad.example/\n")
    status, _, err = foretold("real", "only=extract", *TINY, f"data.path={web}", f"data.blocklist={tmp_path / 'list'}")
    assert status != 0 and "line 1: 'http://bad.example/' is neither a domain" in err and "Traceback" not in err, err
