"""Extract: files → pages → documents, in Parquet shards of id, source, number, url, language, text.

A page goes through its address, its main text, its language, the rules of quality, the runs that evaluation sets have, and the mask
over personal data, in this order; the first that refuses it is counted, in documents and in bytes, and shown by a few samples.
"""

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from conf.corpus import ARCHIVES, SHARD, File, kind_of
from conf.errors import Refused
from conf.plan import Plan
from real.contamination import hit
from real.filters import judge
from real.guard import Broken, Guard
from real.language import known, language
from real.maintext import LIBRARIES, main_text
from real.pages import Page, read
from real.private import masked
from real.remote import local
from real.stage import Task, sha256
from real.urls import Blocklist

VERSION = 4
SAMPLES = 3  # of each reason, in each shard
SHOWN = 400  # characters of a sample


class Document(NamedTuple):
    """A text and where it came from."""

    id: str
    source: str  # file
    number: int  # of the record or line in it
    url: str
    language: str  # "" where nobody looked
    text: str


@dataclass(frozen=True)
class Choices:
    """What the plan says of extraction, for the workers."""

    text_field: str
    extractor: str
    filter: str
    languages: tuple[str, ...]
    language_score: float
    blocklist: str
    evaluations: tuple[str, ...]
    mask: bool
    page_limit: float
    page_seconds: float
    page_memory: float

    @classmethod
    def of(cls, plan: Plan) -> "Choices":
        data = plan.data
        return cls(data.text_field, data.extractor, data.filter, tuple(data.languages), data.language_score, data.blocklist or "",
                   tuple(data.evaluations), data.mask, data.page_limit, data.page_seconds, data.page_memory)  # fmt: skip


def config(plan: Plan, found: Sequence[File]) -> dict[str, Any]:
    """What the shards depend on beside the files: the choices, what is in the files they name, and the libraries."""
    choices, used = Choices.of(plan), libraries(plan, found)
    named = [path for path in (choices.blocklist, *choices.evaluations) if path]
    return {"version": VERSION, **asdict(choices), "files": [sha256(Path(path)) for path in named], "libraries": used}


def libraries(plan: Plan, found: Sequence[File]) -> dict[str, str]:
    """Version of each library that has a say.

    Raises Refused for one that is not installed, a file that does not exist, or a language that is not known.
    """
    data = plan.data
    kinds = {kind_of(file.name) for file in found}
    archives = kinds & set(ARCHIVES)
    wanted = {LIBRARIES[data.extractor]: f"data.extractor={data.extractor}"} if data.extractor in LIBRARIES else {}
    wanted |= {"py3langid": f"data.languages=[{','.join(data.languages)}]"} if data.languages else {}
    wanted |= {"fastwarc": f"a {min(archives)} file"} if archives - {".arc", ".arc.gz"} else {}
    wanted |= {"warcio": f"a {min(archives)} file"} if archives & {".arc", ".arc.gz"} else {}
    used = {}
    for library, why in wanted.items():
        try:
            used[library] = version(library)
        except ImportError as error:
            raise Refused(f"{why} needs {library}, which is not installed; pip install 'foretold[data]'") from error
    for key, path in (("data.blocklist", data.blocklist), *(("data.evaluations", path) for path in data.evaluations)):
        if path and not Path(path).is_file():
            raise Refused(f"{key}={path}: no such file")
    if unknown := [code for code in data.languages if code not in ("any", *(known() if data.languages else ()))]:
        raise Refused(
            f"data.languages: {unknown[0]!r} is no language that py3langid {used['py3langid']} knows; it knows any, {', '.join(known())}"
        )
    return used


def tasks(plan: Plan, found: Sequence[File]) -> Iterator[Task]:
    """Groups of files of about SHARD bytes."""
    group: list[File] = []
    number = 0
    for file in found:
        group.append(file)
        if sum(member.bytes for member in group) >= SHARD:
            yield _task(number, group, plan)
            number, group = number + 1, []
    if group:
        yield _task(number, group, plan)


def _task(number: int, group: list[File], plan: Plan) -> Task:
    digests = tuple(":".join(map(str, file)) for file in group)
    return Task(f"part-{number:05}", extract, ([file.name for file in group], Choices.of(plan)), digests)


class Refusal(Exception):
    """A page that does not become a document, by its reason."""

    def __init__(self, reason: str, text: str, **more: Any) -> None:
        self.reason, self.text, self.more = reason, text, more


class Sieve:
    """What turns a page into a document, or refuses it."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        if choices.extractor in LIBRARIES:
            importlib.import_module(LIBRARIES[choices.extractor])  # here, so that no child has to, in the time of its first page
        self.guard = Guard(main_text(choices.extractor), choices.page_seconds, choices.page_memory)
        self.blocked = Blocklist(Path(choices.blocklist)) if choices.blocklist else None
        self.counted: Counter[str] = Counter()

    def document(self, page: Page, source: str) -> Document:
        """Raises Refusal."""
        choices = self.choices
        if self.blocked and page.url and (entry := self.blocked.hit(page.url)):
            raise Refusal("url", page.url, entry=entry)
        text = self._text(page)
        if not text.strip():
            raise Refusal("empty", "")
        self.counted["bytes"] += len(text.encode())
        code = self._language(text)
        if choices.filter != "none":
            kept, rule = judge(text, choices.filter)
            if rule:
                raise Refusal(rule, text)
            self.counted["dropped bytes"] += len(text.encode()) - len(kept.encode())
            text = kept
        if choices.evaluations and (found := hit(text, choices.evaluations, choices.text_field)):
            raise Refusal("contaminated", text, **found._asdict())
        if choices.mask:
            text, kinds = masked(text)
            self.counted.update({f"masked: {kind}": number for kind, number in kinds.items()})
        return Document(document_id(source, page.number), source, page.number, page.url, code, text)

    def _text(self, page: Page) -> str:
        if not page.html:
            return page.text
        try:
            return str(self.guard.call(page.text))
        except Broken as why:
            raise Refusal(f"page {why}", page.text[:SHOWN]) from why

    def _language(self, text: str) -> str:
        choices = self.choices
        if not choices.languages:
            return ""
        code, score = language(text)
        self.counted[f"language: {code}"] += 1
        if "any" not in choices.languages and (code not in choices.languages or score < choices.language_score):
            raise Refusal("language", text, language=code, score=round(score, 4))
        return code


def extract(folder: Path, name: str, sources: Sequence[str], choices: Choices) -> dict[str, Any]:
    """Write one shard; a file that is damaged is counted and named, and costs what follows the damage."""
    sieve, rows = Sieve(choices), []
    counted, damaged, samples = sieve.counted, list[str](), list[dict[str, Any]]()
    counted.update(dict.fromkeys(("files", "read", "unreadable", "bytes", "empty", "refused", "pages"), 0))
    try:
        for source in sources:
            counted["files"] += 1
            try:
                with local(source) as path:
                    counted["read"] += path.stat().st_size
                    for page in read(path, choices.text_field, choices.page_limit, counted):
                        counted["pages"] += 1
                        try:
                            rows.append(sieve.document(page, source))
                        except Refusal as refusal:
                            _refuse(refusal, page, source, counted, samples)
            except (OSError, ValueError, EOFError) as error:
                counted["unreadable"] += 1
                counted["files"] -= 1
                damaged.append(f"{source}: {error}")
    finally:
        sieve.guard.close()
    save(folder / f"{name}.parquet", rows)
    _listed(folder / f"{name}.unreadable.txt", damaged)
    _listed(folder / f"{name}.refused.jsonl", [json.dumps(sample, ensure_ascii=False) for sample in samples])
    return dict(counted) | {"documents": len(rows), "document bytes": sum(len(row.text.encode()) for row in rows)}


def _refuse(refusal: Refusal, page: Page, path: str, counted: Counter[str], samples: list[dict[str, Any]]) -> None:
    reason = refusal.reason
    if reason == "empty":
        counted["empty"] += 1
        return
    counted["refused"] += 1
    counted[f"refused: {reason}"] += 1
    counted[f"refused bytes: {reason}"] += len(refusal.text.encode())
    if counted[f"refused: {reason}"] <= SAMPLES or reason == "contaminated":  # of those each is reported
        told = {"reason": reason, "source": path, "number": page.number, "url": page.url, **refusal.more}
        samples.append(told | {"text": refusal.text[:SHOWN]})


def _listed(path: Path, lines: list[str]) -> None:
    if lines:
        path.write_text("".join(f"{line}\n" for line in lines))


def document_id(source: str, number: int) -> str:
    """128 bits that depend on the place of the document alone, not on how the work was divided."""
    return hashlib.blake2b(f"{source}\0{number}".encode(), digest_size=16).hexdigest()


def save(path: Path, rows: Sequence[Document]) -> None:
    """Rows by id, so that a shard's bytes depend on its documents alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"number": pa.int64()}
    columns = list(zip(*sorted(rows), strict=True)) or [()] * len(Document._fields)
    arrays = {name: pa.array(values, types.get(name, pa.large_string())) for name, values in zip(Document._fields, columns, strict=True)}
    pq.write_table(pa.table(arrays), path, compression="zstd")


def load(path: Path) -> list[Document]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return list(map(Document, *(table.column(name).to_pylist() for name in Document._fields)))
