"""Prompts for rollouts: JSON Lines → text by a chat template → tokens, with the answer that a reward compares with.

A line holds question or prompt with answer or completion, or messages and an answer. The tokens are those that fine-tuning on the same
line would have learned the answer after.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from conf.alignment import Align
from conf.errors import Refused
from real.chats import Coder, Messages, Template, spoken
from real.jsonl import held, lines, named, row_of

HOLDS = "question and answer, prompt and completion, or messages and answer"
ASKED, ANSWERED = ("question", "prompt"), ("answer", "completion")


@dataclass
class Prompts:
    """Of one split, in the file's order."""

    ids: list[tuple[int, ...]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # what the ids say
    answers: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class Splits(NamedTuple):
    train: Prompts
    held_out: Prompts
    left_out: int  # prompts longer than align.prompt_tokens


def read(align: Align, tokenizer: Path) -> Splits:
    """All prompts of `align.data`; what is asked first decides the split, as for fine-tuning.

    Raises Refused for a missing or empty file, for a malformed line, and when no prompt is left to train on.
    """
    path = named(align, HOLDS)
    coder, shape = Coder(str(tokenizer)), Template(align.template, "align")
    train, held_out, left_out, seen = Prompts(), Prompts(), 0, 0
    for number, line in lines(str(path)):
        seen = number
        try:
            messages, answer = question(line)
            text, ids = _begun(coder, shape, messages, answer)
        except ValueError as error:
            raise Refused(f"{path}, line {number}: {error}; mend or remove the line") from error
        if len(ids) > align.prompt_tokens:
            left_out += 1
            continue
        asked = next((m["content"] for m in messages if m["role"] == "user"), line)
        split = held_out if held(asked, align.held_out) else train
        split.ids.append(ids)
        split.texts.append(text)
        split.answers.append(answer)
    if not seen:
        raise Refused(f"{path} is empty; a line holds {HOLDS}")
    if not train.ids:
        shares = f"{left_out} are longer than align.prompt_tokens={align.prompt_tokens}, {len(held_out)} are held out"
        raise Refused(f"align.data={path} leaves no prompt to train on: {shares}; raise align.prompt_tokens, or lower align.held_out")
    return Splits(train, held_out, left_out)


def question(line: str) -> tuple[Messages, str]:
    """The messages of a line that ask, and its answer.

    Raises ValueError with what is missing.

    >>> question('{"question": "2 + 2?", "answer": 4}')
    ([{'role': 'user', 'content': '2 + 2?'}], '4')
    """
    row = row_of(line)
    messages, answer = _messages(row), _first(row, ANSWERED)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if messages is None or answer is None:
        missing = "an answer" if messages is not None else "a question, a prompt or messages"
        raise ValueError(f"it has {', '.join(row) or 'no field'}; {missing} is missing")
    if "messages" not in row and not isinstance(messages[0]["content"], str):
        raise ValueError("what it asks is no text")
    messages = spoken(messages)
    if messages[-1]["role"] == "assistant":
        raise ValueError("its last message is the assistant's; it has to be one that asks")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError("its answer is no text, or an empty one")
    return messages, answer


def _messages(row: dict[str, Any]) -> Messages | None:
    if isinstance(row.get("messages"), list) and row["messages"]:
        return list(row["messages"])
    asked = _first(row, ASKED)
    return None if asked is None else [{"role": "user", "content": asked}]


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _begun(coder: Coder, shape: Template, messages: Messages, answer: str) -> tuple[str, tuple[int, ...]]:
    """Text and ids up to where the assistant's answer begins."""
    pieces = [text for text, _ in shape.pieces([*messages, {"role": "assistant", "content": answer}])][:-1]
    ids = tuple(found for text in pieces for found in coder.tokenizer.encode(text, add_special_tokens=False).ids)
    if not ids:
        raise ValueError("what it asks is empty")
    return "".join(pieces), ids
