"""Pages in HTML → their text: all of it, or what the page is about."""

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

LIBRARIES = {"trafilatura": "trafilatura", "trafilatura_fast": "trafilatura", "resiliparse": "resiliparse"}


def main_text(extractor: str) -> Callable[[str], str]:
    """What the plan's extractor does with a page."""
    return {"tags": plain_text, "trafilatura": _trafilatura, "trafilatura_fast": _trafilatura_fast, "resiliparse": _resiliparse}[extractor]


def _trafilatura(html: str) -> str:
    from trafilatura import extract

    return extract(html, include_comments=False) or ""


def _trafilatura_fast(html: str) -> str:
    from trafilatura import extract

    return extract(html, include_comments=False, fast=True) or ""


def _resiliparse(html: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(html, main_content=True, alt_texts=False))


class _Text(HTMLParser):
    """The words of a page without its tags, scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in ("script", "style")
        if tag in ("p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style") and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def plain_text(html: str) -> str:
    """
    >>> plain_text("<h1>A</h1><p>b &amp; c<script>x()</script></p>")
    'A\\nb & c'
    """
    parser = _Text()
    parser.feed(html)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)
