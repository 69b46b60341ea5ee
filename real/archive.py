"""Web archives in segments: a record is a gzip member of its own, so that a file can be cut behind any of them."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter


class Archive:
    """The segment that is being written, aside until it is full; one that an earlier attempt left open goes on behind its last page."""

    def __init__(self, folder: Path, limit: float, lines: list[dict[str, Any]], about: dict[str, str]) -> None:
        self.folder, self.limit, self.about = folder, limit, about
        ends: dict[str, int] = {}
        for line in lines:
            if "segment" in line:
                ends[line["segment"]] = max(ends.get(line["segment"], 0), line["end"])
        self.number, self.file = 1 + max((int(name[6:11]) for name in ends), default=-1), None
        for aside in folder.glob("*.warc.gz.tmp"):
            name = aside.name.removesuffix(".tmp")
            if name not in ends:
                aside.unlink()  # holds nothing that the journal knows
                continue
            os.truncate(aside, ends[name])
            _finish(aside)

    @property
    def name(self) -> str:
        return f"crawl-{self.number:05}.warc.gz"

    def write(self, url: str, answer: Any, more: dict[str, str]) -> tuple[str, int]:
        """Add an answer; returns its segment and the byte behind it."""
        if self.file is None:
            self.file = (self.folder / f"{self.name}.tmp").open("wb")
            self.writer = WARCWriter(self.file, gzip=True)
            self.writer.write_record(self.writer.create_warcinfo_record(self.name, self.about))
        head = StatusAndHeaders(_ascii(f"{answer.status} {answer.reason}"), _headers(answer), protocol="HTTP/1.1")
        record = self.writer.create_warc_record(url, "response", BytesIO(answer.body), http_headers=head, warc_headers_dict=more)
        self.writer.write_record(record)
        self.file.flush()
        return self.name, self.file.tell()

    @property
    def full(self) -> bool:
        return self.file is not None and self.file.tell() >= self.limit

    def close(self) -> None:
        """Flush the segment to the disk and give it its name."""
        if self.file is not None:
            self.file.close()
            _finish(Path(self.file.name))
            self.number, self.file = self.number + 1, None


def _headers(answer: Any) -> list[tuple[str, str]]:
    """The headers as they came, but for those that would lie about the body as it is kept: without chunks, or cut."""
    lies = {"transfer-encoding"} | ({"content-length"} if answer.cut else set())
    return [(_ascii(f"X-Crawler-{name}" if name.lower() in lies else name), value) for name, value in answer.headers]


def _ascii(text: str) -> str:
    """Names and reasons are ASCII (RFC 9110), whatever a host sends; values that are not are escaped by the writer."""
    return text.encode("ascii", "replace").decode()


def _finish(aside: Path) -> None:
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.rename(aside.with_suffix(""))
