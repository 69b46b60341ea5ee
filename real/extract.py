"""Extract: files of text → documents, in Parquet shards of id, source, text."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from conf.corpus import SHARD, files, kind_of
from conf.errors import Refused, nearest
from conf.plan import Plan
from real.filters import judge
from real.stage import Task

VERSION = 1


def config(plan: Plan) -> dict[str, Any]:
    return {"version": VERSION, "text_field": plan.data.text_field, "filter": plan.data.filter}


def tasks(plan: Plan) -> Iterator[Task]:
    """Groups of files of about SHARD bytes."""
    group: list[tuple[str, int]] = []
    number = 0
    for path, size in files(plan.data):
        group.append((str(path), size))
        if sum(s for _, s in group) >= SHARD:
            yield _task(number, group, plan)
            number, group = number + 1, []
    if group:
        yield _task(number, group, plan)


def _task(number: int, group: list[tuple[str, int]], plan: Plan) -> Task:
    digests = tuple(f"{path}:{size}:{Path(path).stat().st_mtime_ns}" for path, size in group)
    return Task(f"part-{number:05}", extract, ([path for path, _ in group], plan.data.text_field, plan.data.filter), digests)


def extract(folder: Path, name: str, paths: list[str], text_field: str, preset: str = "none") -> dict[str, Any]:
    """Write one shard; a file that cannot be read is counted and named, and costs only itself."""
    rows: list[tuple[str, str, str]] = []
    counters: dict[str, int] = {"files": 0, "unreadable": 0, "bytes": 0, "empty": 0, "refused": 0}
    unreadable = []
    for path in paths:
        try:
            texts = list(read(Path(path), text_field))
        except (OSError, ValueError, EOFError) as error:
            counters["unreadable"] += 1
            unreadable.append(f"{path}: {error}")
            continue
        counters["files"] += 1
        for number, text in enumerate(texts):
            counters["bytes"] += len(text.encode())
            kept, refused = judge(text, preset) if preset != "none" and text.strip() else (text, None)
            if refused:
                counters["refused"] += 1
                counters[f"refused: {refused}"] = counters.get(f"refused: {refused}", 0) + 1
            elif kept.strip():
                rows.append((document_id(path, number), path, kept))
            else:
                counters["empty"] += 1
    save(folder / f"{name}.parquet", rows)
    if unreadable:
        (folder / f"{name}.unreadable.txt").write_text("\n".join(unreadable) + "\n")
    return counters | {"documents": len(rows)}


def document_id(source: str, number: int) -> str:
    """128 bits that depend on the place of the document alone, not on how the work was divided."""
    return hashlib.blake2b(f"{source}\0{number}".encode(), digest_size=16).hexdigest()


def read(path: Path, text_field: str) -> Iterator[str]:
    """Texts of one file, by its ending."""
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, text_field)
    elif kind in (".jsonl", ".jsonl.gz"):
        yield from _read_lines(path, text_field)
    else:
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "")
        yield plain_text(text) if kind == ".html" else text


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"no Parquet file: {error}") from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise Refused(f"{path} has no column {text_field}; {nearest(text_field, names)}; set data.text_field=…")
    for batch in file.iter_batches(columns=[text_field]):
        yield from (text or "" for text in batch.column(0).to_pylist())


def _read_lines(path: Path, text_field: str) -> Iterator[str]:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip():
                row = json.loads(line)
                if text_field not in row:
                    raise Refused(f"{path} has a line without {text_field}; it has {', '.join(row)}; set data.text_field=…")
                yield str(row[text_field])


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


def save(path: Path, rows: list[tuple[str, str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(zip(*sorted(rows), strict=True)) or [(), (), ()]
    table = pa.table({name: pa.array(values, pa.large_string()) for name, values in zip(("id", "source", "text"), columns, strict=True)})
    pq.write_table(table, path, compression="zstd")


def load(path: Path) -> list[tuple[str, str, str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return list(zip(*(table.column(name).to_pylist() for name in ("id", "source", "text")), strict=True))
