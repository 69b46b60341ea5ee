"""Files of every kind → pages: what one document of a corpus may become.

A file that is cut short or malformed costs what follows the damage: the pages before it stand. Web archives hold many other things
than pages (requests, images, redirects); those are passed over and counted.
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from conf.corpus import ARCHIVES, kind_of
from conf.errors import Refused, nearest

TEXT = ("text/plain", "text/markdown")
HTML = ("text/html", "application/xhtml+xml")
MAGIC = (b"%PDF", b"GIF8", b"PK\3\4", b"\x89PNG", b"\xff\xd8\xff", b"\x1f\x8b", b"\x7fELF", b"RIFF", b"OggS")
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\x1b"))


class Page(NamedTuple):
    """What a file or a record holds, before anything is judged."""

    number: int  # of the record or line in its file
    url: str
    text: str
    html: bool


class Passed(Exception):
    """A page that cannot be read, by the name under which it is counted; its file goes on."""


def read(path: Path, text_field: str, largest: float, counted: Counter[str]) -> Iterator[Page]:
    """The pages of one file, by its ending; what is passed over is counted.

    Raises Refused for a Parquet or JSONL file without the text field; OSError, ValueError or EOFError where the file is damaged.
    """
    kind = kind_of(path.name)
    if kind == ".parquet":
        yield from _parquet(path, text_field)
    elif kind in (".jsonl", ".jsonl.gz"):
        yield from _lines(path, text_field)
    elif kind in ARCHIVES:
        yield from _archive(path, largest, counted)
    elif kind in (".html", ".htm"):
        yield from _whole(path, largest, counted)
    else:
        yield Page(0, "", path.read_bytes().decode("utf-8", errors="replace").replace("\0", ""), False)


def _parquet(path: Path, text_field: str) -> Iterator[Page]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"no Parquet file: {error}") from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise Refused(f"{path} has no column {text_field}; {nearest(text_field, names)}; set data.text_field=…")
    number = 0
    for batch in file.iter_batches(columns=[text_field]):
        for text in batch.column(0).to_pylist():
            yield Page(number, "", str(text or "").replace("\0", ""), False)
            number += 1


def _lines(path: Path, text_field: str) -> Iterator[Page]:
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    with opener(path, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number + 1} holds no object")
                if text_field not in row:
                    raise Refused(f"{path} has a line without {text_field}; it has {', '.join(row)}; set data.text_field=…")
                yield Page(number, str(row.get("url") or ""), str(row[text_field] or "").replace("\0", ""), False)
                number += 1


def _whole(path: Path, largest: float, counted: Counter[str]) -> Iterator[Page]:
    try:
        if path.stat().st_size > largest:
            raise Passed("too large")
        yield Page(0, "", decoded(path.read_bytes(), None), True)
    except Passed as reason:
        counted[f"passed: {reason}"] += 1


# -- web archives


def _archive(path: Path, largest: float, counted: Counter[str]) -> Iterator[Page]:
    """The pages of a WARC, WET or ARC file."""
    records = _arc(path) if kind_of(path.name) in (".arc", ".arc.gz") else _warc(path, largest)
    for number, record in enumerate(records):
        counted["records"] += 1
        try:
            page = record(number)
        except Passed as reason:
            counted[f"passed: {reason}"] += 1
            continue
        if page.text.strip():
            yield page
        else:
            counted["passed: empty page"] += 1


def _warc(path: Path, largest: float) -> Iterator[Callable[[int], Page]]:
    from fastwarc import ArchiveIterator, WarcRecordType

    wanted = WarcRecordType.response | WarcRecordType.conversion | WarcRecordType.resource
    for record in ArchiveIterator(str(path), record_types=wanted, parse_http=False, quirks_mode=True, fsspec_args=False):
        yield lambda number, record=record: _of_warc(number, record, largest)


def _of_warc(number: int, record: Any, largest: float) -> Page:
    """Raises Passed for a record that is no page."""
    said = int(record.content_length)
    if said > largest:
        raise Passed("too large")
    record.freeze()
    url, content = str(record.headers.get("WARC-Target-URI") or "").strip("<>"), record.reader.read()
    if len(content) < said:  # its file was cut, or its length is a lie
        raise Passed("cut short")
    if not record.is_http:
        return _page(number, url, record.headers.get("Content-Type"), None, content, largest)
    answer, body = _http(content, int(min(largest, 2**62)) + 1)
    if answer.http_headers is None or not str(answer.http_headers.status_code or 200).startswith("2"):
        raise Passed("status")
    return _page(number, url, answer.http_content_type, answer.http_charset, body, largest)


def _http(content: bytes, most: int) -> tuple[Any, bytes]:
    """An answer parsed, and its body: plain even where it says that it is compressed or chunked, as crawlers leave it."""
    from fastwarc import WarcRecord

    head = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n"
    whole = head % len(content) + content
    try:
        answer = WarcRecord.from_bytes(whole)
        answer.parse_http(auto_decode="all")
        return answer, answer.reader.read(most)
    except OSError:
        answer = WarcRecord.from_bytes(whole)
        answer.parse_http(auto_decode="none")
        return answer, answer.reader.read(most)


def _arc(path: Path) -> Iterator[Callable[[int], Page]]:
    """ARC, the form before WARC, which FastWARC does not read."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    with path.open("rb") as file:
        try:
            for record in ArchiveIterator(file):
                yield lambda number, record=record: _of_arc(number, record)
        except ArchiveLoadFailed as error:
            raise ValueError(error) from error


def _of_arc(number: int, record: Any) -> Page:
    headers = record.http_headers
    if headers is None or not headers.get_statuscode().startswith("2"):
        raise Passed("status")
    kind, _, charset = str(headers.get_header("Content-Type") or "").partition(";")
    named = charset.partition("charset=")[2].strip(" \"'") or None
    return _page(number, record.rec_headers.get_header("uri") or "", kind, named, record.content_stream().read(), float("inf"))


def _page(number: int, url: str, kind: str | None, charset: str | None, content: bytes, largest: float) -> Page:
    what = (kind or "").partition(";")[0].strip().lower()
    if what not in (*TEXT, *HTML):
        raise Passed("other content")
    if len(content) > largest:
        raise Passed("too large")
    return Page(number, url, decoded(content, charset), what in HTML)


def decoded(content: bytes, charset: str | None) -> str:
    """Text of bytes: in UTF-8 where they are that, whatever is declared; else as declared, if they can be; else as they look.

    Raises Passed for what is no text.

    >>> decoded("né".encode("latin-1"), "iso-8859-1"), decoded("né".encode(), "iso-8859-1")
    ('né', 'né')
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace").replace("\0", "")
    head = content[:4096]
    if content.startswith(MAGIC) or len(head) - len(head.translate(None, _CONTROL)) > 0.05 * len(head):
        raise Passed("binary")
    for name in ("utf-8", charset) if b"\x1b$" not in head else (charset,):  # ISO-2022 is also valid ASCII
        with suppress(UnicodeDecodeError, LookupError):
            return content.decode(name or "utf-8").replace("\0", "")
    return _guessed(content).replace("\0", "")


def _guessed(content: bytes) -> str:
    try:
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError:  # an extra; without it a page of another charset keeps what is readable
        return content.decode("utf-8", errors="replace")
    return str(bytes_to_str(content, detect_encoding(content, from_html_meta=True), errors="replace"))
