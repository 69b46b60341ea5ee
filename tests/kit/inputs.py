"""What configurations read: a shard of tokens drawn from Zipf's law, a tokenizer of bytes, prompts and pairs, a base with drawn weights."""

import json
import random
import string
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from conf.files import write
from conf.plan import Plan
from real import huggingface, pairs, stage
from real.bpe import END
from real.shards import write_shard
from real.stage import Task
from real.timeline import Timeline
from real.trainer import filled

COUNT = 2_000_000  # tokens of the shard; order and epochs are the plan's
LINES = 512  # prompts, or pairs


def tokens(folder: Path, vocab: int) -> Path:
    """The folder of a shard for a vocabulary."""
    place = folder / f"tokens-{vocab}"
    _run(place, [Task("shard", _shard, (vocab,), (str(vocab), str(COUNT)))], {})
    return place


def _shard(folder: Path, name: str, vocab: int) -> dict[str, Any]:
    """Documents of 64 to 4096 tokens, the r-th commonest token 1 / r as common as the first (Zipf 1949)."""
    dice = np.random.default_rng(0)
    edges = np.cumsum(1 / np.arange(1, vocab + 1))
    drawn = np.searchsorted(edges, dice.random(COUNT) * edges[-1]).astype(np.uint16 if vocab <= 2**16 else np.int32)
    ends = np.cumsum(dice.integers(64, 4096, COUNT // 64))
    write_shard(folder / f"train-{name}", np.split(drawn, ends[ends < COUNT]))
    return {"tokens": COUNT}


def _run(folder: Path, tasks: list[Task], config: dict[str, Any]) -> None:
    """In threads: a process that holds a GPU is not forked."""
    with ThreadPoolExecutor(1) as pool:
        stage.run(folder, tasks, config, pool, {}, lambda _: None)


def tokenizer(folder: Path) -> Path:
    """One token a byte, and one that ends a text."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
        made.add_special_tokens([END])
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        write(path, made.to_str())
    return path


def base(folder: Path, plan: Plan) -> Path:
    """A Hugging Face folder of the plan's model with its initial weights; one a model."""
    model = plan.model
    target = folder / f"base-{model.layers}-{model.hidden}"
    if not target.is_dir():
        alone = plan.but(gpu=plan.gpu.but(kind="cpu"), train=plan.train.but(compile=False, precision="fp32"))
        named = dict(filled(alone, None, Timeline(), [None])[0].named_parameters())
        huggingface.write_model(lambda names: [named[name].detach() for name in names], list(named), model, plan.align.longest, target,
                                tokenizer(folder))  # fmt: skip
    return target


def alignment(folder: Path, plan: Plan) -> tuple[Plan, Path]:
    """The plan with data that fill its prompts and answers, and the folder of its run with what they become."""
    align = plan.align
    place = folder / plan.id
    path, dice = place / "data.jsonl", random.Random(0)

    def text(length: int) -> str:
        return "".join(dice.choices(string.ascii_lowercase, k=length))

    def line() -> dict[str, str]:
        if align.rollouts:
            return {"question": text(align.prompt_tokens), "answer": text(align.new_tokens)}
        return {"prompt": text(align.prompt_tokens), **{kind: text(align.new_tokens - 1) for kind in ("chosen", "rejected")}}

    write(path, "".join(json.dumps(line()) + "\n" for _ in range(LINES)))
    plan = plan.but(**{"align.data": str(path)})
    write(place / "tokens" / "tokenizer.json", tokenizer(folder).read_bytes())
    if not align.rollouts:
        _run(place / "tokens", list(pairs.tasks(plan.align, tokenizer(folder))), pairs.config(plan.align))
    return plan, place
