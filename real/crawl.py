"""Crawl: seeds → pages of the web, in WARC segments, politely.

A postman with many streets: at each host one letter at a time and a pause after it, as long as its robots.txt asks; what he has
delivered stands in the journal, so that whoever takes over tomorrow goes on at the next door.
"""

import asyncio
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from protego import Protego
from resiliparse.parse.html import HTMLTree
from yarl import URL

from conf.errors import Refused
from conf.files import refusal, write
from conf.plan import Crawl
from real.archive import Archive
from real.frontier import Frontier, Journal, Target, found, normal
from real.pages import HTML, TEXT, Passed, decoded
from real.stage import Manifest, sha256

ROBOTS = 512_000  # bytes of a robots.txt that are read: RFC 9309, 2.5, asks for 500 KiB at least
STALE = 86_400.0  # s for which a robots.txt holds: RFC 9309, 2.4
NOBODY, EVERYBODY = "User-agent: *\nDisallow: /", ""
COUNTED = ("pages", "bytes", "robots", "redirects", "other_content", "too_large", "timeouts", "broken", "outside")


class Answer(NamedTuple):
    """What a host said; of a page that is not wanted only the head."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    kind: str
    charset: str | None
    body: bytes
    cut: bool  # the page is longer than what is kept


class Host:
    """One request at a time, and a pause after each."""

    def __init__(self, delay: float, ready: float) -> None:
        self.delay, self.ready = delay, ready
        self.turn = asyncio.Lock()
        self.served = False  # somebody works through its queue
        self.rules: dict[str, tuple[Any, float]] = {}  # by origin: what robots.txt says, and when that was

    async def pause(self) -> None:
        while (left := self.ready - time.monotonic()) > 0:
            await asyncio.sleep(left)


class Crawler:
    """The frontier, its hosts, and those who serve them."""

    def __init__(self, plan: Crawl, folder: Path, progress: Callable[[float], None]) -> None:
        self.plan, self.progress = plan, progress
        self.name = plan.agent.partition("/")[0]
        self.journal, self.frontier = Journal(folder), Frontier(plan)
        lines = self.journal.lines
        self.archive = Archive(folder, plan.segment, lines, {"software": plan.agent, "format": "WARC File Format 1.0", "robots": "classic"})
        self.frontier.replay(lines)
        self.counted: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        for line in lines:
            self._count(line)
        self.hosts: dict[str, Host] = {}
        self.first = time.monotonic() + (plan.host_delay if lines else 0.0)  # a killed attempt may have asked just now
        self.seconds = max((line["at"] for line in lines), default=0.0)  # until the latest answer
        self.began = time.monotonic() - self.seconds
        self.tasks: set[asyncio.Task[None]] = set()
        self.trouble: BaseException | None = None

    async def run(self) -> None:
        """Until nothing is left, or there are pages enough."""
        self.slots = asyncio.Semaphore(self.plan.hosts_at_once)
        self.room = asyncio.Semaphore(max(0, self.plan.pages - self.counted["pages"]))
        self.over = asyncio.Event()
        headers = {"User-Agent": self.plan.agent, "Accept-Encoding": "gzip", "Accept": ", ".join((*HTML, *TEXT))}
        timeout = aiohttp.ClientTimeout(total=self.plan.timeout)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout, auto_decompress=False,
                                         cookie_jar=aiohttp.DummyCookieJar()) as self.session:  # fmt: skip
            for seed in self.plan.seeds:
                if url := normal(seed):
                    self.frontier.push(Target(url, 0))
            for host in list(self.frontier.queues):
                self._serve(host)
            if self.tasks and self.counted["pages"] < self.plan.pages:
                await self.over.wait()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.trouble:
            raise self.trouble
        self.journal.sync()
        self.archive.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The last who serves ends the crawl, and so does the first who cannot go on: the disk is full."""
        self.tasks.discard(task)
        if not task.cancelled() and task.exception():
            self.trouble = task.exception()
        if not self.tasks or self.trouble:
            self.over.set()

    def _host(self, name: str) -> Host:
        if name not in self.hosts:
            self.hosts[name] = Host(self.plan.host_delay, self.first)
        return self.hosts[name]

    def _serve(self, name: str) -> None:
        """See that somebody works through a host's queue."""
        host = self._host(name)
        if not host.served:
            host.served = True
            task = asyncio.create_task(self._work(name, host))
            self.tasks.add(task)
            task.add_done_callback(self._ended)

    async def _work(self, name: str, host: Host) -> None:
        """A host's queue, one address after the other; a page more than the plan wants is never asked for."""
        while self.frontier.queues.get(name):
            await host.pause()
            await self.room.acquire()
            target = self.frontier.pop(name)
            if target is None:
                self.room.release()
                break
            line = await self._visit(host, target)
            self._note(line)
            if line["outcome"] != "pages":
                self.room.release()
            elif self.counted["pages"] >= self.plan.pages:
                self.over.set()
                return
        host.served = False

    def _note(self, line: dict[str, Any]) -> None:
        """One answer into the journal, and what it led to into the frontier."""
        line["at"] = self.seconds = time.monotonic() - self.began
        line["found"] = [target.url for target in found(line) if self.frontier.push(target)]
        self.journal.write(line)
        if self.archive.full:
            self.journal.sync()
            self.archive.close()
        self._count(line)
        for url in line["found"]:
            self._serve(urlsplit(url).netloc)
        self.progress(self.counted["pages"] / self.plan.pages)

    def _count(self, line: dict[str, Any]) -> None:
        self.counted[line["outcome"]] += 1
        self.counted["bytes"] += line.get("bytes", 0)
        self.counted["too_large"] += line.get("cut", False)
        self.counted["outside"] += line.get("outside", 0)

    async def _visit(self, host: Host, target: Target) -> dict[str, Any]:
        """Ask for an address, if robots.txt lets us; returns the journal's line."""
        line = target._asdict()
        rules = await self._rules(host, target.url)
        if not rules.can_fetch(target.url, self.name):
            return line | {"outcome": "robots"}
        answer = await self._ask(host, target.url, self.plan.page_limit, (*HTML, *TEXT))
        if isinstance(answer, str):
            return line | {"outcome": answer}
        if 300 <= answer.status < 400 and (to := _location(answer, target.url)):
            return line | {"outcome": "redirects", **self._leading([to])}
        if not 200 <= answer.status < 300:
            return line | {"outcome": f"status {answer.status}"}
        if answer.kind not in (*HTML, *TEXT):
            return line | {"outcome": "other_content"}
        segment, end = self.archive.write(target.url, answer, {"WARC-Truncated": "length"} if answer.cut else {})
        more = {"segment": segment, "end": end, "bytes": len(answer.body), "cut": answer.cut}
        return line | {"outcome": "pages", **more, **self._leading(links(answer, target.url, self.plan.page_limit))}

    def _leading(self, urls: list[str]) -> dict[str, Any]:
        inside = [url for url in urls if self.frontier.allows(url)]
        return {"found": inside, "outside": len(urls) - len(inside)}

    async def _rules(self, host: Host, url: str) -> Any:
        """What the robots.txt of an address says, asked for once a day."""
        origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        rules, at = host.rules.get(origin, (None, 0.0))
        if rules is None or time.time() - at > STALE:
            kept = self.journal.robots.get(origin)
            if kept is None or time.time() - kept["since"] > STALE:
                kept = {"robots": origin, "since": time.time(), "text": await self._robots(origin)}
                self.journal.robots[origin] = kept
                self.journal.write(kept)
            rules = Protego.parse(kept["text"])
            asked = float(rules.crawl_delay(self.name) or 0.0)
            if not asked <= self.plan.delay_limit:  # nor is a number
                rules, asked = Protego.parse(NOBODY), 0.0
            host.rules[origin] = rules, kept["since"]
            host.ready += max(0.0, asked - host.delay)  # the pause that has begun is the longer one already
            host.delay = max(host.delay, asked)
        return rules

    async def _robots(self, origin: str) -> str:
        """The robots.txt of an origin; as RFC 9309 has it, none allows all, and one that cannot be had allows nothing."""
        url: str | None = f"{origin}/robots.txt"
        for _ in range(self.plan.redirects + 1):
            if url is None or not self.frontier.allows(url):
                break
            answer = await self._ask(self._host(urlsplit(url).netloc), url, ROBOTS, None)
            if isinstance(answer, str) or answer.status >= 500:
                break
            if 200 <= answer.status < 300:
                return _plain(answer, ROBOTS).decode("utf-8", errors="replace")
            if not 300 <= answer.status < 400:
                return EVERYBODY
            url = _location(answer, url)
        return NOBODY

    async def _ask(self, host: Host, url: str, most: float, kinds: Iterable[str] | None) -> Answer | str:
        """One request, when the host's pause is over; what went wrong by its name."""
        async with host.turn:
            await host.pause()
            async with self.slots:
                try:
                    return await self._read(url, int(most), kinds)
                except TimeoutError:
                    return "timeouts"
                except (aiohttp.ClientError, OSError, ValueError):
                    return "broken"
                finally:
                    host.ready = time.monotonic() + host.delay

    async def _read(self, url: str, most: int, kinds: Iterable[str] | None) -> Answer:
        """The head of an answer, and its body if that is wanted, as far as it is."""
        async with self.session.get(URL(url, encoded=True), allow_redirects=False) as response:
            body = bytearray()
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if 200 <= response.status < 300 and (kinds is None or kind in kinds):
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > most:
                        response.close()
                        break
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.raw_headers]
            return Answer(response.status, response.reason or "", headers, kind, response.charset, bytes(body[:most]), len(body) > most)


def _location(answer: Answer, base: str) -> str | None:
    return next((normal(value, base) for name, value in answer.headers if name.lower() == "location"), None)


def _plain(answer: Answer, most: float) -> bytes:
    """A body as it was before it was packed, as much of it as is wanted: a bomb does not go off.

    A body that says that it is packed and is not stays as it is.
    """
    if "gzip" in next((value.lower() for name, value in answer.headers if name.lower() == "content-encoding"), ""):
        with suppress(zlib.error):
            return zlib.decompressobj(31).decompress(answer.body, int(most))
    return answer.body


def links(answer: Answer, base: str, most: float) -> list[str]:
    """The addresses that a page of HTML links to, each once, in their order; those marked nofollow are left out."""
    if answer.kind not in HTML:
        return []
    try:
        page = HTMLTree.parse(decoded(_plain(answer, most), answer.charset)).document
    except (Passed, ValueError, RuntimeError):  # no text, whatever its head says, or nothing that a parser takes
        return []
    for element in page.get_elements_by_tag_name("base")[:1]:
        base = normal(element.getattr("href") or "", base) or base
    anchors = [e for e in page.get_elements_by_tag_name("a") if "nofollow" not in (e.getattr("rel") or "").lower()]
    urls = (normal(element.getattr("href") or "", base) for element in anchors if element.getattr("href"))
    return list(dict.fromkeys(url for url in urls if url))


def crawl(folder: Path, plan: Crawl, progress: Callable[[float], None]) -> Manifest:
    """Fetch what is missing, then write the manifest.

    Raises Refused where the disk is full, or no seed gave a page.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        crawler = Crawler(plan, folder, progress)
        asyncio.run(crawler.run())
    except OSError as error:
        raise refusal(error, folder) from error
    counters = dict(crawler.counted) | {"hosts": len(crawler.frontier.asked), "left": crawler.frontier.left}
    outputs = [{"path": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.glob("*.warc.gz"))]
    facts = {"seeds": list(plan.seeds)}
    content = {"stage": "crawl", "outputs": outputs, "counters": counters, "seconds": crawler.seconds, "facts": facts}
    write(folder / "manifest.json", json.dumps(content, indent=1))
    if not counters["pages"]:
        raise Refused(f"crawl.seeds=[{','.join(plan.seeds)}] gave no page; see {folder / 'journal.log'}")
    return Manifest(folder, outputs, dict(counters), crawler.seconds, facts)
