"""A corpus that lies in no folder: here a server of the web, read through the same library as S3 and its like."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conf.corpus import files
from conf.errors import Refused
from conf.program import load
from real import extract
from real.life import Life


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nobody listens."""


@pytest.fixture
def address(corpus: Path) -> Iterator[str]:
    """The small corpus, served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(corpus)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def read_from(path: object, folder: Path) -> list[extract.Document]:
    life = Life(load([f"data.path={path}", "cluster.cores_per_node=1"]), folder, lambda _: None)
    life.data(["extract"])
    return [row for shard in sorted((folder / "extract").glob("*.parquet")) for row in extract.load(shard)]


def test_objects_give_the_documents_that_files_give(corpus, address, tmp_path):
    there, here = read_from(address, tmp_path / "there"), read_from(corpus, tmp_path / "here")
    assert sorted(row.text for row in there) == sorted(row.text for row in here)
    assert {row.source for row in there} == {f"{address}{path.name}" for path in corpus.iterdir()}


def test_one_object_or_those_of_a_pattern(corpus, address):
    of = [(f"{address}000.txt", 1), (f"{address}00*.txt", 10)]
    for path, count in of:
        found = files(load([f"data.path={path}"]).data)
        assert len(found) == count and all(file.bytes == (corpus / file.name.rpartition("/")[2]).stat().st_size for file in found)


def test_an_object_that_cannot_be_fetched_is_counted_and_named(address, tmp_path):
    plan = load([f"data.path={address}"])
    gone = extract.Choices.of(plan)
    told = extract.extract(tmp_path, "part", [f"{address}000.txt", f"{address}nowhere.txt"], gone)
    assert (told["files"], told["unreadable"], told["documents"]) == (1, 1, 1)
    assert "nowhere.txt" in (tmp_path / "part.unreadable.txt").read_text()


@pytest.mark.parametrize(("path", "words"), [
    ("nowhere://bucket/web", "Protocol not known"),
    ("http://127.0.0.1:9/web/", "does not answer"),
])  # fmt: skip
def test_a_storage_that_does_not_answer_is_one_line(path, words):
    with pytest.raises(Refused) as refused:
        files(load([f"data.path={path}"]).data)
    assert words in str(refused.value) and "\n" not in str(refused.value)
