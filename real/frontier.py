"""The frontier of a crawl: which addresses are known, which wait at which host, and the journal that outlives a kill.

A post office: every host has its pigeonhole, a letter goes into it once, and the ledger says which have been answered.
"""

import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit, urlunsplit

from w3lib.url import canonicalize_url

from conf.errors import Refused
from conf.plan import Crawl

LONGEST = 2000  # characters of an address; longer ones are traps
PORTS = {"http": ":80", "https": ":443"}


class Target(NamedTuple):
    """An address, with the links and the redirects that led to it."""

    url: str
    depth: int
    hops: int = 0


def normal(url: str, base: str = "") -> str | None:
    """The one spelling of an address, without fragment; None for what is no address of the web.

    >>> normal("../b?z=1&a=%7e#top", "HTTP://Example.org:80/x/y")
    'http://example.org/b?a=~&z=1'
    >>> normal("mailto:me@example.org"), normal("http://[::1/")
    (None, None)
    """
    try:
        parts = urlsplit(canonicalize_url(urljoin(base, url.strip())))
        if parts.scheme not in PORTS or not parts.hostname:
            return None
        place = parts.netloc.removesuffix(PORTS[parts.scheme])
        found = urlunsplit((parts.scheme, place, parts.path or "/", parts.query, ""))
    except ValueError:
        return None
    return found if len(found) <= LONGEST and found.isprintable() and " " not in place and "@" not in place else None


class Frontier:
    """A queue a host. A host is a name and a port: http and https at their own ports are the same."""

    def __init__(self, plan: Crawl) -> None:
        self.plan = plan
        self.known: set[str] = set()
        self.queues: dict[str, deque[Target]] = {}
        self.asked: dict[str, int] = {}  # requests that count for pages_per_host
        self.allowed = {host for seed in plan.seeds if (url := normal(seed)) for host in [urlsplit(url).netloc]} | {
            host.lower() for host in plan.hosts
        }

    def allows(self, url: str) -> bool:
        return "any" in self.allowed or urlsplit(url).netloc in self.allowed

    def push(self, target: Target) -> bool:
        """Queue an address that is new, near enough and allowed; returns whether it was."""
        url, plan = target.url, self.plan
        if url in self.known or target.depth > plan.depth or target.hops > plan.redirects or not self.allows(url):
            return False
        self.known.add(url)
        self.queues.setdefault(urlsplit(url).netloc, deque()).append(target)
        return True

    def pop(self, host: str) -> Target | None:
        """The next address of a host, None when it has none or has been asked for enough."""
        if self.asked.get(host, 0) >= self.plan.pages_per_host or not self.queues.get(host):
            return None
        self.asked[host] = self.asked.get(host, 0) + 1
        return self.queues[host].popleft()

    @property
    def left(self) -> int:
        """Addresses that wait, or were too many for their host."""
        return sum(map(len, self.queues.values()))

    def replay(self, lines: list[dict[str, Any]]) -> None:
        """Stand where an earlier attempt stood: what it has answered is not asked for again."""
        for line in lines:
            self.known.add(line["url"])
            host = urlsplit(line["url"]).netloc
            self.asked[host] = self.asked.get(host, 0) + 1
        for line in lines:
            for target in found(line):
                self.push(target)


def found(line: dict[str, Any]) -> Iterator[Target]:
    """The addresses to which an answered one led."""
    redirect = line["outcome"] == "redirects"
    for url in line.get("found", ()):
        yield Target(url, line["depth"], line["hops"] + 1) if redirect else Target(url, line["depth"] + 1)


class Journal:
    """A JSON line for each answer, written after the page is in its archive and before anything else is asked.

    A kill loses the requests in flight and no more: their answers have no line. A torn last line is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, path = folder, folder / "journal.log"
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise Refused(f"{path} is corrupt ({error}); delete {folder} and run the same command again: it is made anew") from error
        self.lines = [line for line in lines if "url" in line and self._kept(line)]
        self.robots = {line["robots"]: line for line in lines if "robots" in line}
        self.file = path.open("ab")
        self.file.truncate(len(whole))

    def _kept(self, line: dict[str, Any]) -> bool:
        """Whether the archive still holds what a line says: a machine that lost power may have lost its last pages."""
        return "segment" not in line or line["end"] <= size(self.folder / line["segment"])

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()

    def sync(self) -> None:
        os.fsync(self.file.fileno())


def size(segment: Path) -> int:
    """Bytes of an archive, finished or not; 0 for one that is gone."""
    aside = segment.with_name(f"{segment.name}.tmp")
    path = segment if segment.exists() else aside
    return path.stat().st_size if path.exists() else 0
