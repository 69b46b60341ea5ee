"""A crawl of a small web with traps: polite, bounded, and the same however often it is killed."""

import asyncio
import errno
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastwarc import ArchiveIterator, WarcRecordType

from conf.errors import Refused
from conf.plan import Crawl
from conf.program import load
from conf.record import QUANTITIES, read_summary
from real.archive import Archive
from real.crawl import EVERYBODY, NOBODY, Answer, Crawler, crawl, links
from real.frontier import Frontier, Journal, Target, normal
from sim.life import live
from tests.conftest import TINY
from tests.crawled import CRAWL_DELAY, Web

DELAY = 0.002
ROOT = Path(__file__).parents[1]


def plan(web: Web, **more: Any) -> Crawl:
    kept = {"host_delay": DELAY, "timeout": 0.4, "page_limit": 1e5, "depth": 8, "segment": 1e5}
    return Crawl(**{"seeds": [f"http://{host}/0" for host in web.hosts[:-1]], **kept, **more})


def records(folder: Path) -> list[tuple[str, str, bytes]]:
    """Address, truncation and body of every page in the archives, as FastWARC reads them."""
    found = []
    for path in sorted(folder.glob("*.warc.gz")):
        for record in ArchiveIterator(str(path), record_types=WarcRecordType.response, parse_http=False):
            assert record.verify_block_digest()
            record.parse_http()
            found.append((record.headers["WARC-Target-URI"], record.headers.get("WARC-Truncated", ""), record.reader.read()))
    return found


def gaps(web: Web, host: str) -> float:
    """Least time between two requests to a host, as the host saw them."""
    return min(later - earlier for (earlier, _), (later, _) in pairwise(sorted(web.seen[host])))


@pytest.fixture(scope="module")
def crawled(tmp_path_factory: pytest.TempPathFactory):
    """A web of 4 × 240 pages and its traps, crawled once."""
    folder = tmp_path_factory.mktemp("crawled") / "crawl"
    with Web(240) as web:
        done = crawl(folder, plan(web), lambda _: None)
        yield web, folder, done


def test_what_is_forbidden_is_never_asked_for(crawled):
    web, _, done = crawled
    forbidden = [url for url in web.asked if "/private" in url and web.hosts[2] not in url]
    assert forbidden == []
    assert done.counters["robots"] == 3 + 4  # linked, and behind redirects
    assert web.seen[web.stranger] == []
    assert done.counters["outside"] == 4 + 4  # linked, and behind redirects


def test_hosts_are_asked_once_and_slowly(crawled):
    web, _, done = crawled
    assert set(web.asked.values()) == {1}
    assert gaps(web, web.hosts[1]) >= CRAWL_DELAY
    assert min(gaps(web, host) for host in web.hosts[:-1]) >= DELAY
    assert done.counters["hosts"] == 4


def test_the_archives_hold_every_page(crawled):
    web, folder, done = crawled
    found = records(folder)
    bodies = {url: body for url, _, body in found}
    assert len(found) == len(bodies) == done.counters["pages"]
    assert {f"http://{host}/{page}" for host in web.hosts[:-1] for page in range(240)} <= bodies.keys()
    assert sum(len(body) for body in bodies.values() if b"much" not in body) > 4 * 240 * 1000
    assert [(url.rpartition(":")[2].partition("/")[2], len(bodies[url])) for url, cut, _ in found if cut == "length"] == [
        ("huge/0", 100_000)
    ] * 4
    assert len(done.outputs) > 1 and not list(folder.glob("*.tmp"))


def test_traps_are_counted(crawled):
    web, folder, done = crawled
    told = json.loads((folder / "manifest.json").read_text())["counters"]
    assert told == done.counters
    calendar = [url for url in web.asked if "/calendar/" in url]
    assert len(calendar) < 4 * 2**4  # depth bounds what has no end
    assert told["too_large"] == told["timeouts"] == told["other_content"] == told["status 500"] == 4
    assert (
        told["status 404"] == 4 * len(("gone", "café", "only-in-packed", "behind-nul", "%EF%BF%BD")) + 1
    )  # and what host 2 does not forbid
    assert told["redirects"] == 4 * (2 + 6 + 1 + 1)  # loop, hop, away, sneak
    assert f"http://{web.hosts[0]}/caf%C3%A9" in web.asked and f"http://{web.hosts[0]}/only-in-packed" in web.asked


def test_a_finished_crawl_asks_nobody_again(crawled):
    web, folder, done = crawled
    before = sum(web.asked.values())
    again = crawl(folder, plan(web), lambda _: None)
    assert sum(web.asked.values()) == before
    assert (again.counters, again.outputs) == (done.counters, done.outputs)


def attempt(choices: Crawl, folder: Path) -> "subprocess.Popen[bytes]":
    code = ("import json, sys; from pathlib import Path; from conf.plan import Crawl; from real.crawl import crawl; "
            "crawl(Path(sys.argv[1]), Crawl(**json.loads(sys.argv[2])), lambda _: None)")  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code, str(folder), json.dumps(asdict(choices))], cwd=ROOT)


def test_killed_crawls_lose_only_what_was_in_flight(tmp_path):
    """Whatever the moment of SIGKILL: the same pages, each in one archive, and at most one request a host is repeated for each kill."""
    dice, kills = random.Random(3), 2
    with Web(30) as web:
        choices = plan(web, segment=2e4, host_delay=0.005)
        whole = crawl(tmp_path / "whole", choices, lambda _: None)
        unbroken = web.asked
        web.seen.clear()
        for _ in range(kills):
            running, before = attempt(choices, tmp_path / "killed"), sum(web.asked.values())
            until, deadline = before + dice.randint(20, 50), time.monotonic() + 10
            while sum(web.asked.values()) < until and time.monotonic() < deadline:
                time.sleep(0.002)
            running.send_signal(signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
            read = records(tmp_path / "killed")  # whole files, all that have their name
            known = {line["url"]: line for line in Journal(tmp_path / "killed").lines}
            assert {url for url, _, _ in read} <= known.keys()
        again = crawl(tmp_path / "killed", choices, lambda _: None)
        assert web.asked.keys() == unbroken.keys()
        repeated = Counter({url: count - 1 for url, count in web.asked.items() if count > 1})
        assert repeated.total() <= kills * 4
        assert min(gaps(web, host) for host in web.hosts[:-1]) >= 0.005
    assert again.counters == whole.counters
    one, other = ({url: (cut, body) for url, cut, body in records(tmp_path / name)} for name in ("whole", "killed"))
    assert one == other and len(records(tmp_path / "killed")) == len(one)


def test_a_journal_that_knows_more_than_the_disk(tmp_path):
    """After a loss of power: pages whose bytes are gone are asked for again, a torn line is cut off, a corrupt one is named."""
    archive = Archive(tmp_path, 1e9, [], {})
    journal = Journal(tmp_path)
    for number in range(3):
        answer = Answer(200, "OK", [("Content-Type", "text/html")], "text/html", None, b"<p>page</p>", False)
        segment, end = archive.write(f"http://a.example/{number}", answer, {})
        journal.write({**Target(f"http://a.example/{number}", 0)._asdict(), "outcome": "pages", "at": 0.0, "segment": segment, "end": end})
    aside = tmp_path / "crawl-00000.warc.gz.tmp"
    aside.write_bytes(aside.read_bytes()[:-10])
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b'{"url": "http://a.ex')
    kept = Journal(tmp_path).lines
    assert [line["url"][-1] for line in kept] == ["0", "1"]
    Archive(tmp_path, 1e9, kept, {}).close()
    assert [url[-1] for url, _, _ in records(tmp_path)] == ["0", "1"]
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b"\0\0\0\n")
    with pytest.raises(Refused, match="corrupt"):
        Journal(tmp_path)


def test_limits(tmp_path):
    """Exactly as many pages as the plan wants, and no host is asked for more than its share."""
    with Web(40) as web:
        done = crawl(tmp_path / "few", plan(web, pages=17), lambda _: None)
        assert done.counters["pages"] == len(records(tmp_path / "few")) == 17
        web.seen.clear()
        crawl(tmp_path / "share", plan(web, pages_per_host=5), lambda _: None)
        assert [sum(path != "/robots.txt" for _, path in web.seen[host]) for host in web.hosts[:-1]] == [5] * 4
        shallow = crawl(tmp_path / "shallow", plan(web, depth=0), lambda _: None)
        assert shallow.counters["pages"] == 4
        web.seen.clear()
        with pytest.raises(Refused, match="gave no page"):
            crawl(
                tmp_path / "impatient",
                plan(web, host_delay=0.0, delay_limit=0.001, seeds=[f"http://{web.hosts[1]}/{n}" for n in range(3)]),
                lambda _: None,
            )
        assert [path for _, path in web.seen[web.hosts[1]]] == ["/robots.txt"]


def head(status: int, where: str = "", body: bytes = b"") -> Answer:
    return Answer(status, "", [("Location", where)] if where else [], "text/plain", None, body, False)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([head(200, body=b"User-agent: *")], "User-agent: *"),
        ([head(404)], EVERYBODY),
        ([head(503)], NOBODY),
        (["timeouts"], NOBODY),
        ([head(301, "https://a.example/robots.txt"), head(200, body=b"#")], "#"),
        ([head(301, "http://stranger.example/robots.txt")], NOBODY),
        ([head(301, "/robots.txt")] * 9, NOBODY),
    ],
)
def test_robots_that_cannot_be_had_forbid_all(tmp_path, monkeypatch, answers, said):
    """RFC 9309, 2.3.1: none allows all, an error of the server nothing; redirects are followed, but not to a host that may not be asked."""
    told = iter(answers)

    async def ask(*_: object) -> Answer | str:
        return next(told)

    crawler = Crawler(Crawl(seeds=["http://a.example/"]), tmp_path, lambda _: None)
    monkeypatch.setattr(crawler, "_ask", ask)
    assert asyncio.run(crawler._robots("http://a.example")) == said


def test_what_hosts_say_of_themselves_is_kept_as_far_as_it_can_be(tmp_path):
    archive = Archive(tmp_path, 1e9, [], {})
    archive.write("http://a.example/", Answer(200, "\xffine", [("X-\xe9", "\xff\x01")], "text/html", None, b"page", False), {})
    archive.close()
    assert [body for _, _, body in records(tmp_path)] == [b"page"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_: object) -> tuple[str, int]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Archive, "write", full)
    with Web(1) as web, pytest.raises(Refused, match="the disk is full"):
        crawl(tmp_path, plan(web), lambda _: None)


def test_nobody_answers(tmp_path):
    """A host whose robots.txt cannot be had may not be asked for anything else."""
    with Web(1) as web:
        gone = plan(web, seeds=[f"http://{web.hosts[0]}/0"])
    with pytest.raises(Refused, match=r"gave no page; see .*journal\.log"):
        crawl(tmp_path, gone, lambda _: None)
    assert json.loads((tmp_path / "manifest.json").read_text())["counters"]["robots"] == 1


@pytest.mark.slow  # torch is loaded, and processes start
def test_from_the_web_to_documents(foretold):
    """The stage as a user runs it, and the next one on what it fetched."""
    with Web(30) as web:
        seeds = ",".join(f"http://{host}/0" for host in web.hosts[:-1])
        asked = [f"crawl.seeds=[{seeds}]", "crawl.host_delay=1 ms", "crawl.timeout=300 ms", "crawl.depth=3", "crawl.page_limit=100 kB"]
        status, out, err = foretold("real", "only=crawl,extract,dedup", "data.path=crawl", "data.dedup_within=folder", *asked, *TINY)
    assert status == 0, err
    assert "crawl: " in out and "pages of 4 hosts" in out
    told = read_summary(next(Path("runs").glob("*/real")))["quantities"]
    assert told["extract.documents"]["value"] == told["crawl.pages"]["value"] > 4 * 30


def test_wrong_options_are_a_line_each(foretold):
    wrong = ["crawl.seeds=[ftp://a.example/,'http://[::1/']", "crawl.host_delay=-1 s", "crawl.pages=0", "crawl.agent='0'"]
    status, _, err = foretold("real", "only=crawl", *wrong)
    assert status == 2 and "Traceback" not in err
    for said in ("crawl.seeds: 'ftp://a.example/' is no address of the web", "crawl.seeds: 'http://[::1/' is", "crawl.host_delay=-1.0 must",
                 "crawl.pages=0 must", "crawl.agent='0' must"):  # fmt: skip
        assert said in err
    status, _, err = foretold("real", "only=crawl", "data.path=crawl")
    assert (status, "data.path=crawl needs crawl.seeds" in err) == (2, True)


def test_without_seeds_there_is_no_crawl(foretold):
    status, _, err = foretold("real", "only=crawl")
    assert (status, "crawl.seeds=[] names no address" in err) == (2, True)
    assert load([]).id == load(["crawl.pages=5"]).id  # what is off changes nothing


@pytest.mark.parametrize(
    ("url", "base", "one"),
    [
        ("HTTP://A.Example:80/x/../y?b=2&a=1#top", "", "http://a.example/y?a=1&b=2"),
        ("https://a.example:443", "", "https://a.example/"),
        ("../z", "http://a.example/x/y/", "http://a.example/x/z"),
        ("//b.example/é", "https://a.example/", "https://b.example/%C3%A9"),
        ("http://a.example:99999/", "", None),
        ("data:text/html,x", "http://a.example/", None),
        ("http://me:secret@a.example/", "", None),
        ("/" + "x" * 3000, "http://a.example/", None),
    ],
)
def test_one_spelling_of_an_address(url, base, one):
    assert normal(url, base) == one
    assert one is None or normal(one) == one


def test_the_frontier_is_a_queue_a_host():
    frontier = Frontier(Crawl(seeds=["http://a.example/", "http://b.example/"], depth=1, redirects=1))
    pushed = [frontier.push(Target(f"http://{host}.example/{page}", 0)) for page in range(2) for host in "abc"]
    assert pushed == [True, True, False] * 2
    assert not frontier.push(Target("http://a.example/0", 0)) and not frontier.push(Target("http://a.example/deep", 2))
    assert not frontier.push(Target("http://a.example/far", 0, 2))
    assert [frontier.pop("a.example"), frontier.pop("a.example"), frontier.pop("a.example")] == [
        Target("http://a.example/0", 0), Target("http://a.example/1", 0), None]  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"\0" * 100, b"<div>" * 100_000, b"<a href=" * 1000, bytes(range(256)) * 10, b"%PDF-1.7"])
def test_hostile_pages_have_no_links(body):
    answer = Answer(200, "OK", [], "text/html", "utf-16\0", body, False)
    assert links(answer, "http://a.example/", 1e6) in ([], ["http://a.example/%3Ca"])


def test_links_follow_the_page_s_base_and_leave_out_nofollow():
    page = b"<base href='/deep/'><a href=x>1</a><a href='x#2'>2</a><a rel='me nofollow' href=y>3</a><a href='?q'>4</a><a>5</a>"
    answer = Answer(200, "OK", [], "text/html", None, page, False)
    assert links(answer, "http://a.example/0", 1e6) == ["http://a.example/deep/x", "http://a.example/deep/?q="]


# -- foretold


@pytest.fixture(scope="module")
def even():
    """Ten hosts of fifty pages; each in a row: robots.txt, then for every page a pause, an answer, a transfer."""
    return load(["data.path=crawl", "crawl.expected_hosts=10", "crawl.expected_pages=50", "crawl.seeds=[http://a.example/]",
                 "crawl.latency=0.25 s", "crawl.page_bytes=1 MB", "crawl.host_delay=2 s", "crawl.bandwidth=1 TB/s", "train.steps=1",
                 "train.warmup=0"])  # fmt: skip


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        ({}, 0.25 + 50 * (2 + 0.25)),
        # one request at a time and no pause: all requests in a row
        ({"hosts_at_once": 1, "host_delay": 0.0}, 10 * (0.25 + 50 * 0.25)),
        # the way to the web is full from the first page on
        ({"bandwidth": 1e6}, 0.25 + 2 + 0.25 + 10 * 50 * 1.0),
        # so many pages that a step stands for five
        ({"expected_hosts": 100, "expected_pages": 1000, "pages": 100_000}, 0.25 + 1000 * 2.25),
        # no more pages than the plan wants, the same from every host
        ({"pages": 200}, 0.25 + 20 * (2 + 0.25)),
    ],
)
def test_a_crawl_s_closed_form(even, more, seconds):
    told = live(even.but(**{f"crawl.{key}": value for key, value in more.items()})).told
    assert told["crawl"]["seconds"] == pytest.approx(seconds, rel=2e-3)
    assert told["crawl"]["bytes"] == told["crawl"]["pages"] * 1e6 == told["extract"]["read"]
    assert told["crawl"].keys() <= QUANTITIES.keys()
