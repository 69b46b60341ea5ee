"""Tokens: documents → a byte-level BPE trained on a sample of them → token shards for training and held-out text."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import write
from conf.plan import Plan
from real import bpe
from real.data import trained, write_shard
from real.dedup import verified
from real.extract import load
from real.stage import Manifest, Task, sha256

VERSION = 2


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
    for row, ids in zip(rows, coder.encode(texts), strict=True):
        split = "held_out" if int(row.id[:8], 16) < held_out * 2**32 else _part(row.source, mixture)
        if split is not None:
            splits[split].append(np.append(ids, coder.end).astype(dtype))
    for split, documents in splits.items():
        write_shard(folder / f"{split}-{name}", documents)
    counts = {split: int(sum(map(len, documents))) for split, documents in splits.items()}
    held = counts.pop("held_out")
    return {"bytes": sum(len(row.text.encode()) for row in rows), "documents": len(rows), "train_tokens": sum(counts.values()),
            "held_out_tokens": held}  # fmt: skip


def _part(source: str, mixture: tuple[str, ...]) -> str | None:
    if not mixture:
        return "train"
    return next((f"train{i}" for i, pattern in enumerate(mixture) if fnmatch(source, pattern)), None)
