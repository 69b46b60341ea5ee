"""Tokens: documents → a byte-level BPE trained on a sample of them → token shards for training and held-out text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conf.files import write
from conf.plan import Plan
from real.data import write_shard
from real.dedup import verified
from real.extract import load
from real.stage import Manifest, Task, sha256

VERSION = 1
END = "<|endoftext|>"


def config(plan: Plan) -> dict[str, Any]:
    return {"version": VERSION, "vocab": plan.tokenizer.vocab, "sample": plan.tokenizer.sample, "held_out": plan.data.held_out}


def train_tokenizer(folder: Path, documents: Manifest, plan: Plan) -> Path:
    """tokenizer.json, trained on the first documents by id up to `tokenizer.sample` bytes; made once for each input."""
    path, slip = folder / "tokenizer.json", folder / "tokenizer.inputs.json"
    inputs = json.dumps([config(plan), [o["sha256"] for o in documents.paths(".parquet")]])
    if path.is_file() and slip.is_file() and slip.read_text() == inputs:
        return path
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=plan.tokenizer.vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sample(documents, plan.tokenizer.sample), trainer)
    write(path, tokenizer.to_str())
    write(slip, inputs)
    return path


def sample(documents: Manifest, limit: float) -> Iterator[str]:
    """Texts, shard after shard, until `limit` bytes."""
    total = 0.0
    for output in documents.paths(".parquet"):
        for _, _, text in load(documents.verified(output)):
            if total >= limit:
                return
            total += len(text.encode())
            yield text


def tasks(documents: Manifest, tokenizer: Path, plan: Plan) -> Iterator[Task]:
    digest = sha256(tokenizer)
    for output in documents.paths(".parquet"):
        path = str(documents.folder / output["path"])
        arguments = (path, output["sha256"], str(tokenizer), plan.data.held_out)
        yield Task(Path(path).stem, encode, arguments, (output["sha256"], digest))


def encode(folder: Path, name: str, path: str, digest: str, tokenizer: str, held_out: float) -> dict[str, Any]:
    """Write train-… and held_out-… shards; a document's split depends on its id alone."""
    from tokenizers import Tokenizer

    coder = Tokenizer.from_file(tokenizer)
    end = coder.token_to_id(END)
    dtype = np.uint16 if coder.get_vocab_size() < 65500 else np.int32  # Megatron's own threshold
    rows = load(verified(path, digest))
    splits: dict[str, list[np.ndarray]] = {"train": [], "held_out": []}
    for (identity, _, _), ids in zip(rows, coder.encode_batch_fast([text for _, _, text in rows]), strict=True):
        split = "held_out" if int(identity[:8], 16) < held_out * 2**32 else "train"
        splits[split].append(np.array([*ids.ids, end], dtype))
    for split, documents in splits.items():
        write_shard(folder / f"{split}-{name}", documents)
    return {"bytes": sum(len(text.encode()) for _, _, text in rows), "documents": len(rows),
            **{f"{split}_tokens": int(sum(map(len, documents))) for split, documents in splits.items()}}  # fmt: skip
