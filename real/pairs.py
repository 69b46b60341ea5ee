"""Preferences as tokens: JSON Lines of a prompt with a chosen and a rejected answer → shards in which the two follow each other.

Prompt and answers may be text, or messages; a conversation's earlier turns may stand in history. Only the answers are learned from.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.alignment import Align
from conf.errors import Refused
from real.chats import Coder, Messages, Piece, Template, spoken
from real.jsonl import held, lines, named, parts, row_of
from real.shards import read_index, write_shard
from real.stage import Manifest, Task, sha256

VERSION = 1
HOLDS = "prompt, chosen and rejected"
SPLITS = ("train", "held_out")
ASKED = np.dtype([("question", "<i8"), ("longer", "?")])  # of a pair: its question's number, and whether the chosen text is the longer one


class Preference(NamedTuple):
    asked: Messages
    chosen: str
    rejected: str


def preference(line: str) -> Preference:
    """The preference of a line.

    Raises ValueError with what is missing.

    >>> preference('{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}')
    Preference(asked=[{'role': 'user', 'content': '2 + 2?'}], chosen='4', rejected='5')
    """
    row = row_of(line)
    missing = [name for name in ("chosen", "rejected") if not row.get(name)]
    if missing:
        raise ValueError(f"{missing[0]} is missing or empty")
    asked = _asked(row)
    if not asked:
        raise ValueError("prompt is missing or empty, and there is no history")
    chosen, rejected = (_answer(row[name], name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("chosen equals rejected: there is nothing to prefer")
    return Preference(asked, chosen, rejected)


def _asked(row: dict[str, Any]) -> Messages:
    """What the answers answer, as messages."""
    prompt, history = row.get("prompt"), row.get("history")
    if isinstance(history, list):
        told = [{"role": "assistant" if turn[0] == "assistant" else "user", "content": turn[1]} for turn in history]
        return told + ([{"role": "user", "content": prompt}] if prompt else [])
    return spoken(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if prompt else []


def _answer(found: Any, name: str) -> str:
    if isinstance(found, str):
        return found
    if isinstance(found, list) and len(found) >= 1 and spoken(found)[-1]["role"] == "assistant":
        return str(found[-1]["content"])
    raise ValueError(f"{name} is neither text nor messages that end with the assistant's")


def config(align: Align) -> dict[str, Any]:
    return {"version": VERSION, "template": Template(align.template, "align").text, "held_out": align.held_out,
            "prompt_tokens": align.prompt_tokens, "new_tokens": align.new_tokens}  # fmt: skip


def tasks(align: Align, tokenizer: Path) -> Iterator[Task]:
    """One for every LINES lines.

    Raises Refused where there is no such file, or nothing in it.
    """
    path = named(align, HOLDS)
    digests = sha256(path), sha256(tokenizer)
    limits = align.held_out, align.prompt_tokens, align.new_tokens
    for first, stop in parts(path, HOLDS):
        arguments = (str(path), first, stop, str(tokenizer), align.template, *limits)
        yield Task(f"{first:09}", encode, arguments, (*digests, str(first)))


def encode(folder: Path, name: str, path: str, first: int, stop: int, tokenizer: str, template: str, held_out: float, prompt_tokens: int,
           new_tokens: int) -> dict[str, Any]:  # fmt: skip
    """Write train-… and held_out-… shards of two documents a pair, chosen first, with .learned and .asked beside them."""
    coder, shape = Coder(tokenizer), Template(template, "align")
    dtype = np.uint16 if coder.vocab < 65500 else np.int32
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {split: [] for split in SPLITS}
    beside: dict[str, list[tuple[int, bool]]] = {split: [] for split in SPLITS}
    told = {"pairs": 0, "tokens": 0, "cut": 0, "left out": 0}
    for number, line in lines(path, first, stop):
        try:
            one = preference(line)
            both = [coder.encode(_pieces(shape, one.asked, answer)) for answer in (one.chosen, one.rejected)]
        except ValueError as error:
            raise Refused(f"{path}, line {number}: {error}; mend or remove the line") from error
        asked = int(both[0][1].argmax())
        cut = [(ids[: asked + new_tokens].astype(dtype), learned[: asked + new_tokens]) for ids, learned in both]
        if asked > prompt_tokens or np.array_equal(cut[0][0], cut[1][0]):
            told["left out"] += 1
            continue
        question = json.dumps(one.asked)
        split = "held_out" if held(question, held_out) else "train"
        found[split] += cut
        beside[split].append((hash_of(question), len(one.chosen) > len(one.rejected)))
        told["pairs"] += 1
        told["tokens"] += sum(len(ids) for ids, _ in cut)
        told["cut"] += sum(len(ids) > asked + new_tokens for ids, _ in both)
    for split, rows in found.items():
        write_shard(folder / f"{split}-{name}", [ids for ids, _ in rows])
        np.concatenate([learned for _, learned in rows] or [np.zeros(0, bool)]).astype(np.uint8).tofile(folder / f"{split}-{name}.learned")
        np.array(beside[split], ASKED).tofile(folder / f"{split}-{name}.asked")
    return told


def hash_of(question: str) -> int:
    """A number of a question, by which pairs of the same one know each other."""
    from hashlib import blake2b

    return int.from_bytes(blake2b(question.encode(), digest_size=7).digest(), "big")


def _pieces(shape: Template, asked: Messages, answer: str) -> list[Piece]:
    """The text up to the answer, and the answer.

    Raises ValueError when the template refuses them.
    """
    try:
        before, after = shape.render(asked, answer=True), shape.render([*asked, {"role": "assistant", "content": answer}])
    except shape.error as error:
        raise ValueError(f"the template refuses it: {error}") from error
    if not after.startswith(before) or answer.strip() not in after[len(before) :]:
        raise ValueError("the template changes the text before the answer, or leaves the answer out")
    return [Piece(before, False), Piece(after[len(before) :], True)]


class Pairs:
    """The pairs of one split: tokens and what is learned of sequence 2 i, the chosen one of pair i, and 2 i + 1, the rejected one."""

    def __init__(self, folder: Path, split: str) -> None:
        manifest = Manifest.read(folder)
        self.tokens, self.learned, asked = list[np.ndarray](), list[np.ndarray](), [np.zeros(0, ASKED)]
        for output in manifest.outputs:
            if output["path"].startswith(f"{split}-") and output["path"].endswith(".bin") and output["bytes"]:
                dtype, lengths = read_index(manifest.verified_twin(output, ".idx"))
                edges = np.cumsum(lengths)[:-1]
                self.tokens += np.split(np.fromfile(manifest.verified(output), dtype).astype(np.int64), edges)
                self.learned += np.split(np.fromfile(manifest.verified_twin(output, ".learned"), np.uint8) > 0, edges)
                asked.append(np.fromfile(manifest.verified_twin(output, ".asked"), ASKED))
        self.asked = np.concatenate(asked)

    def by_length(self, most: int) -> list[int]:
        """The first pairs, shortest first, so that those that are padded together have nearly the same length."""
        return sorted(range(min(most, len(self))), key=lambda i: max(len(self.tokens[2 * i]), len(self.tokens[2 * i + 1])))

    def __len__(self) -> int:
        return len(self.asked)
