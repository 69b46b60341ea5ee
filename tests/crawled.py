"""A small web with traps, on hosts of this machine, that writes down who asked for what and when."""

import gzip
import time
from collections import Counter, defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Self

HUGE = 50_000_000
WORDS = "The river was high that morning, and the people of the village had gone to the bridge to see what it would do. "
SLOW = 5.0  # s, more than any test waits for an answer
CRAWL_DELAY = 0.01  # s, what host 1 asks for


class Web:
    """Hosts 0, 1, … and as the last one a stranger that nobody may ask."""

    def __init__(self, pages: int, hosts: int = 4) -> None:
        self.pages, self.count = pages, hosts
        self.seen: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self.servers = [ThreadingHTTPServer((f"127.0.0.{number + 1}", 0), self._handler(number)) for number in range(hosts + 1)]
        self.hosts = ["{}:{}".format(*server.server_address) for server in self.servers]
        self.stranger = self.hosts[-1]

    def __enter__(self) -> Self:
        for server in self.servers:
            server.daemon_threads = True
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    @property
    def asked(self) -> Counter[str]:
        return Counter(f"http://{host}{path}" for host, log in list(self.seen.items()) for _, path in list(log))

    def _handler(self, number: int) -> type[BaseHTTPRequestHandler]:
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are written one after the other

            def do_GET(self) -> None:
                web.seen[web.hosts[number]].append((time.monotonic(), self.path))
                web.answer(self, number)

            def handle(self) -> None:
                with suppress(ConnectionError):  # whoever asked was killed
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def answer(self, to: BaseHTTPRequestHandler, number: int) -> None:
        where, _, rest = to.path.lstrip("/").partition("/")
        special = getattr(self, f"_{where.partition('.')[0]}", None)
        if special:
            special(to, number, rest)
        elif where.isdigit() and int(where) < self.pages:
            self._page(to, number, int(where))
        else:
            send(to, b"", 404)

    def _page(self, to: BaseHTTPRequestHandler, number: int, page: int) -> None:
        """A tree of pages on every host; the root has all traps."""
        links = [f"/{child}" for child in (8 * page + k for k in range(1, 9)) if child < self.pages]
        if page == 0:
            links += [f"http://{host}/0" for host in self.hosts]
            links += [
                f"/{t}/0" for t in ("calendar", "huge", "loop", "hop", "gone", "failed", "nul", "charset", "image", "private", "packed")
            ]
            links += ["/1#part", "/2?", "/away/0", "/sneak/0", "mailto:me@example.org", "http://[::1", "javascript:void(0)", "/slow/0"]
        send(to, html(links, f"<h1>{number} {page}</h1>"))

    def _robots(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        delay = f"Crawl-delay: {CRAWL_DELAY}\n" if number == 1 else ""
        send(to, f"User-agent: *\nDisallow: /private\n{delay}".encode(), kind="text/plain") if number != 2 else send(to, b"", 404)

    def _calendar(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        send(to, html([f"/calendar/{int(rest) + 1}", f"/calendar/{int(rest) + 2}"]))

    def _huge(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        to.send_response(200)
        to.send_header("Content-Type", "text/html")
        to.send_header("Content-Length", str(HUGE))
        to.end_headers()
        for _ in range(HUGE // 100_000):
            to.wfile.write(b"<p>much</p>" * 9091)

    def _loop(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        move(to, f"/loop/{1 - int(rest)}")

    def _hop(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        move(to, f"/hop/{int(rest) + 1}")

    def _away(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        move(to, f"http://{self.stranger}/0")

    def _sneak(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        move(to, f"http://{self.hosts[0]}/private/behind-{number}")

    def _failed(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        send(to, b"", 500)

    def _nul(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        send(to, html(["/behind-nul", "/\0"], "a\0b" * 10))

    def _charset(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        send(to, "<p>caf\u00e9</p><a href='/caf\u00e9'>gone</a>".encode("latin-1"), kind="text/html; charset=no-such-thing")

    def _image(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        send(to, b"\x89PNG", kind="image/png")

    def _packed(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        send(to, gzip.compress(html(["/only-in-packed"]), mtime=0), **{"Content-Encoding": "gzip"})

    def _slow(self, to: BaseHTTPRequestHandler, number: int, rest: str) -> None:
        time.sleep(SLOW)


def html(links: list[str], text: str = "") -> bytes:
    anchors = " ".join(f'<a href="{link}">next</a>' for link in links)
    return f"<html><body>{text}<p>{WORDS * 10}</p>{anchors}</body></html>".encode()


def send(to: BaseHTTPRequestHandler, body: bytes, status: int = 200, kind: str = "text/html; charset=utf-8", **more: str) -> None:
    to.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **more}.items():
        to.send_header(name, value)
    to.end_headers()
    to.wfile.write(body)


def move(to: BaseHTTPRequestHandler, where: str) -> None:
    send(to, b"", 302, Location=where)
