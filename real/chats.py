"""Conversations as tokens to be learned from: JSON Lines → text by a chat template → shards with a mask of what is learned.

Only what the assistant says counts, its end included: a template renders the messages before a turn with the words that begin an
answer, then with the answer, and what the second has beyond the first is learned. Pieces are tokenised apart: no token lies across an edge.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conf.errors import Refused
from conf.plan import Finetune
from real.bpe import END
from real.jsonl import held, lines, named, parts, row_of
from real.shards import write_shard
from real.stage import Task, sha256

VERSION = 1
HOLDS = "messages, or prompt and completion, or question and answer"
ENDS = (END, "<|end_of_text|>", "<|eot_id|>", "</s>", "<|im_end|>")  # tokens that end a text, by the tokenizers that have them
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
             "{% if add_generation_prompt %}Assistant:{% endif %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
              "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "bare": "{% for m in messages %}{{ m.content }}{% endfor %}",
}  # fmt: skip
Messages = list[dict[str, str]]


class Piece(NamedTuple):
    text: str
    learned: bool


class Template:
    """A chat template, of ours by its name or a user's file, as transformers writes them; `node` is the plan's that names it."""

    def __init__(self, name: str, node: str = "finetune") -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.name = name
        if name not in TEMPLATES and not Path(name).is_file():
            raise Refused(f"{node}.template={name} is no file; give one, or {', '.join(TEMPLATES)}")
        self.text = TEMPLATES.get(name) or Path(name).read_text()
        self.error = TemplateError
        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        world.globals["raise_exception"] = self._raise
        try:
            self.made = world.from_string(self.text)
        except TemplateError as error:
            raise Refused(f"{node}.template={name} is no template: {error}") from error

    def _raise(self, message: str) -> None:
        raise self.error(message)

    def render(self, messages: Messages, answer: bool = False) -> str:
        return self.made.render(messages=messages, add_generation_prompt=answer, bos_token="", eos_token="")

    def pieces(self, messages: Messages) -> list[Piece]:
        """The text, cut where what is learned begins and ends.

        Raises ValueError when the template refuses the messages, or does not go on where it stood.
        """
        found, done = list[Piece](), ""
        try:
            for number, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before, after = self.render(messages[:number], answer=True), self.render(messages[: number + 1])
                if not (before.startswith(done) and after.startswith(before)):
                    raise ValueError(f"message {number + 1} changes the text before it, so what is learned cannot be told from the rest")
                if message["content"].strip() not in after[len(before) :]:
                    raise ValueError(f"the template leaves out what message {number + 1} says")
                found += [Piece(before[len(done) :], False), Piece(after[len(before) :], True)]
                done = after
        except self.error as error:
            raise ValueError(f"the template refuses it: {error}") from error
        return found


def conversation(line: str) -> Messages:
    """The messages of a line.

    Raises ValueError with what is missing.

    >>> conversation('{"prompt": "2 + 2?", "completion": "4"}')
    [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
    """
    row = row_of(line)
    messages = row.get("messages") or _of_history(row) or _of_pair(row)
    if messages is None:
        raise ValueError(f"it has {', '.join(row) or 'no field'}; messages, or prompt and completion, or question and answer are needed")
    messages = spoken(messages)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise ValueError("no assistant says anything in it: there is nothing to learn")
    return list(messages)


def spoken(messages: Any) -> Messages:
    """Messages that each have a role and a content.

    Raises ValueError with the first that has not.
    """
    for number, message in enumerate(messages, 1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise ValueError(f"message {number} has no role and content")
    return list(messages)


def _of_history(row: dict[str, Any]) -> Messages | None:
    """Turns as [who, text] pairs before a response, as Open Assistant has them."""
    if not ({"history", "response"} <= set(row) and isinstance(row["history"], list)):
        return None
    turns = [*((turn[0], turn[1]) for turn in row["history"]), ("assistant", row["response"])]
    return [{"role": "assistant" if who == "assistant" else "user", "content": text} for who, text in turns]


def _of_pair(row: dict[str, Any]) -> Messages | None:
    for asked, answered in (("prompt", "completion"), ("question", "answer")):
        if asked in row and answered in row:
            return [{"role": "user", "content": row[asked]}, {"role": "assistant", "content": row[answered]}]
    return None


def config(tune: Finetune) -> dict[str, Any]:
    return {"version": VERSION, "template": Template(tune.template).text, "held_out": tune.held_out, "seq_len": tune.seq_len}


def tasks(tune: Finetune, tokenizer: Path) -> Iterator[Task]:
    """One for every LINES lines.

    Raises Refused where there is no such file, or nothing in it.
    """
    path = named(tune, HOLDS)
    digests = sha256(path), sha256(tokenizer)
    for first, stop in parts(path, HOLDS):
        arguments = (str(path), first, stop, str(tokenizer), tune.template, tune.held_out, tune.seq_len)
        yield Task(f"{first:09}", encode, arguments, (*digests, str(first)))


def encode(folder: Path, name: str, path: str, first: int, stop: int, tokenizer: str, template: str, held_out: float,
           longest: int) -> dict[str, Any]:  # fmt: skip
    """Write train-… and held_out-… shards with .learned beside them; what was asked first decides the split, so a prompt is in one."""
    coder, shape = Coder(tokenizer), Template(template)
    dtype = np.uint16 if coder.vocab < 65500 else np.int32
    splits: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "held_out": []}
    told = {"conversations": 0, "tokens": 0, "learned": 0, "cut": 0, "left out": 0}
    for number, line in lines(path, first, stop):
        try:
            messages = conversation(line)
            ids, learned = coder.encode(shape.pieces(messages))
        except ValueError as error:
            raise Refused(f"{path}, line {number}: {error}; mend or remove the line") from error
        told["cut"] += len(ids) > longest
        ids, learned = ids[:longest], learned[:longest]
        if not learned.any():
            told["left out"] += 1
            continue
        asked = next((m["content"] for m in messages if m["role"] == "user"), line)
        splits["held_out" if held(asked, held_out) else "train"].append((ids.astype(dtype), learned))
        told["conversations"] += 1
        told["tokens"] += len(ids)
        told["learned"] += int(learned.sum())
    for split, rows in splits.items():
        write_shard(folder / f"{split}-{name}", [ids for ids, _ in rows])
        np.concatenate([learned for _, learned in rows] or [np.zeros(0, bool)]).astype(np.uint8).tofile(folder / f"{split}-{name}.learned")
    return told


class Coder:
    """Text → ids."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(path)
        self.vocab = self.tokenizer.get_vocab_size()
        self.end = next((number for name in ENDS if (number := self.tokenizer.token_to_id(name)) is not None), None)
        if self.end is None:
            raise Refused(f"{path} has no token that ends a text ({', '.join(ENDS)}); add one to it")

    def encode(self, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and which of them are learned; the end token after the last answer is."""
        ids, learned = list[int](), list[bool]()
        for text, wanted in pieces:
            found = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += found
            learned += [wanted] * len(found)
        return np.array([*ids, self.end]), np.array([*learned, True])

    def turn_end(self, shape: Template) -> int:
        """The token that ends an answer: the first special one that the template puts behind it, else that which ends a text."""
        assert self.end is not None
        answer = "42"
        try:
            said = shape.pieces([{"role": "user", "content": "6 × 7?"}, {"role": "assistant", "content": answer}])[-1].text
        except ValueError:  # a template for other conversations
            return self.end
        behind = self.tokenizer.encode(said[said.index(answer) + len(answer) :], add_special_tokens=False).ids
        special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return next((number for number in behind if number in special), self.end)
