"""Tokens: documents → a byte-level BPE trained on a sample of them → token shards for training and held-out text."""

import json
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import write
from conf.plan import Plan
from real import bpe
from real.dedup import verified
from real.extract import Document, load
from real.shards import trained, write_shard
from real.stage import Manifest, Task, sha256

VERSION = 3


def config(plan: Plan) -> dict[str, Any]:
    base = {"version": VERSION, "vocab": plan.tokenizer.vocab, "sample": plan.tokenizer.sample, "held_out": plan.data.held_out}
    return base | ({"mixture": list(plan.data.weights)} if plan.data.mixture else {})


def train_tokenizer(folder: Path, documents: Manifest, plan: Plan) -> Path:
    """tokenizer.json, trained on the first documents by id up to `tokenizer.sample` bytes; made once for each input."""
    path, slip = folder / "tokenizer.json", folder / "tokenizer.inputs.json"
    inputs = json.dumps([config(plan), [o["sha256"] for o in documents.paths(".parquet")]])
    if path.is_file() and slip.is_file() and slip.read_text() == inputs:
        return path
    trained, _ = bpe.train(sample(documents, plan.tokenizer.sample), plan.tokenizer.vocab)
    write(path, trained)
    write(slip, inputs)
    return path


def sample(documents: Manifest, limit: float) -> Iterator[str]:
    """Texts, shard after shard, until `limit` bytes."""
    total = 0.0
    for output in documents.paths(".parquet"):
        for document in load(documents.verified(output)):
            if total >= limit:
                return
            total += len(document.text.encode())
            yield document.text


def tasks(documents: Manifest, tokenizer: Path, plan: Plan) -> Iterator[Task]:
    digest = sha256(tokenizer)
    for output in documents.paths(".parquet"):
        path = str(documents.folder / output["path"])
        arguments = (path, output["sha256"], str(tokenizer), plan.data.held_out, tuple(plan.data.weights))
        yield Task(Path(path).stem, encode, arguments, (output["sha256"], digest))


def encode(folder: Path, name: str, path: str, digest: str, tokenizer: str, held_out: float, mixture: tuple[str, ...]) -> dict[str, Any]:
    """Write train-… and held_out-… shards; a document's split depends on its id alone. With a mixture train0-…, train1-… hold
    the documents whose file fits the first pattern, the second, …; those that fit none are left out."""
    coder, rows = bpe.Coder(tokenizer), load(verified(path, digest))
    texts = [row.text for row in rows]
    coder.check(texts)
    dtype = np.uint16 if coder.vocab < 65500 else np.int32  # Megatron's own threshold
    splits: dict[str, list[np.ndarray]] = {split: [] for split in (*trained(mixture), "held_out")}
    told: Counter[str] = Counter()
    for row, ids in zip(rows, coder.encode(texts), strict=True):
        split = split_of(row, held_out, mixture)
        if split is not None:
            splits[split].append(np.append(ids, coder.end).astype(dtype))
            told.update(_described(row, len(ids)))
    for split, documents in splits.items():
        write_shard(folder / f"{split}-{name}", documents)
    counts = {split: int(sum(map(len, documents))) for split, documents in splits.items()}
    held = counts.pop("held_out")
    return {"bytes": sum(len(text.encode()) for text in texts), "documents": len(rows), "train_tokens": sum(counts.values()),
            "held_out_tokens": held, **told}  # fmt: skip


def _described(row: Document, tokens: int) -> dict[str, int]:
    """What a document adds to the statistics: lengths in powers of two of tokens, and how well the vocabulary serves its language."""
    of = f"of language {row.language or 'unknown'}"
    length = f"length: {2 ** max(0, tokens - 1).bit_length()}"
    return {length: 1, f"bytes {of}": len(row.text.encode()), f"words {of}": len(row.text.split()), f"tokens {of}": tokens}


def split_of(row: Document, held_out: float, mixture: tuple[str, ...]) -> str | None:
    """Where a document goes, by its id and its file alone; None for one that fits no pattern of the mixture."""
    if int(row.id[:8], 16) < held_out * 2**32:
        return "held_out"
    if not mixture:
        return "train"
    return next((f"train{i}" for i, pattern in enumerate(mixture) if fnmatch(row.source, pattern)), None)
