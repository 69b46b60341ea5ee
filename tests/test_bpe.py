"""Faster tokenizers give the same merges and the same ids, or are not used."""

import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from real import bpe


@pytest.fixture(autouse=True)
def _less_is_small(monkeypatch):
    monkeypatch.setattr(bpe, "SMALL", 250_000)


@pytest.fixture(scope="module")
def texts():
    """A megabyte of source code, and what is hard."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return [file.read_text(errors="replace") for file in files] + [
        bpe.HARD,
        f"in the {bpe.END} middle",
        "",
        bpe.END,
        " ",
        "日本語のテキスト" * 50,
    ]


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(bpe._trained(texts, 3000))
    return path


def test_gigatoken_trains_the_same_tokenizer(texts, trained):
    found, library = bpe.train(iter(texts), 3000)
    assert library == "gigatoken" and found == trained.read_text()


@pytest.mark.parametrize("library", ["gigatoken", "tiktoken", "tokenizers"])
def test_all_libraries_give_the_same_ids(texts, trained, library, monkeypatch):
    for name in ("gigatoken", "tiktoken", "tokenizers"):
        if name == library:
            break
        monkeypatch.setitem(sys.modules, name, None)
    coder = bpe.Coder(str(trained))
    coder.check(texts)
    canonical = Tokenizer.from_file(str(trained))
    canonical.encode_special_tokens = True
    found = coder.encode(texts)
    assert coder.library == library
    assert all(ids.tolist() == canonical.encode(text).ids for ids, text in zip(found, texts, strict=True))
    assert all(coder.end not in ids for ids in found)  # a text cannot end a document
    assert canonical.decode(found[-1].tolist()) == texts[-1]


def test_what_differs_is_not_used(texts, trained, monkeypatch):
    wrong = lambda *_: lambda texts: [np.zeros(3, np.int64) for _ in texts]  # noqa: E731
    monkeypatch.setattr(bpe.Coder, "_gigatoken", wrong)
    monkeypatch.setattr(bpe.Coder, "_tiktoken", wrong)
    monkeypatch.setattr(bpe, "_gigatoken_trained", lambda *_: "{}")
    coder = bpe.Coder(str(trained))
    coder.check(texts)
    assert coder.library == "tokenizers" and bpe.train(iter(texts), 3000) == (trained.read_text(), "tokenizers")


def test_for_little_text_nothing_is_imported(texts, trained, monkeypatch):
    monkeypatch.setattr(bpe, "SMALL", 10**9)
    for name in ("gigatoken", "tiktoken"):
        monkeypatch.setitem(sys.modules, name, None)
    coder = bpe.Coder(str(trained))
    coder.check(texts)
    assert coder.library == "tokenizers" and bpe.train(iter(texts), 3000) == (trained.read_text(), "tokenizers")
