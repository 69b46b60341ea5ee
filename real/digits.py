"""A task of our own that a laptop learns in minutes, for those who have no data yet: the larger of two digits, written four times.

Conversations are notes in which most digits are wrong, so that fine-tuning teaches the form and leaves something to learn.
"""

import json
import random
from itertools import product
from pathlib import Path

from conf.alignment import Align
from conf.files import write
from conf.plan import Finetune, Plan

NAME = "digits"  # in the place of a file, as data.path=python is
TRUE = 0.5  # share of the notes' digits that are right
NOTES = 2000
LENGTH = 4


def tune_of(plan: Plan, folder: Path) -> Finetune:
    """The plan's fine-tuning, with a file of this task's in `folder` where it names the task."""
    return plan.finetune.but(data=_file(folder, "chats", plan.seed)) if plan.finetune.data == NAME else plan.finetune


def align_of(plan: Plan, folder: Path) -> Align:
    """The same of its alignment."""
    kind = "questions" if plan.align.rollouts else "pairs"
    return plan.align.but(data=_file(folder, kind, plan.seed)) if plan.align.data == NAME else plan.align


def _file(folder: Path, kind: str, seed: int) -> str:
    path = folder / f"{NAME}-{kind}.jsonl"
    if not path.is_file():
        rows = {"chats": chats, "pairs": pairs, "questions": questions}[kind](random.Random(seed))
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chats(dice: random.Random) -> list[dict[str, str]]:
    """Questions with answers of which each digit is right as often as TRUE says, and else any."""
    told = []
    for _ in range(NOTES):
        a, b = dice.randrange(10), dice.randrange(10)
        said = (str(max(a, b)) if dice.random() < TRUE else str(dice.randrange(10)) for _ in range(LENGTH))
        told.append({"question": _asked(a, b), "answer": "".join(said)})
    return told


def questions(_: random.Random) -> list[dict[str, str]]:
    return [{"question": _asked(a, b), "answer": str(max(a, b)) * LENGTH} for a, b in product(range(10), repeat=2)]


def pairs(dice: random.Random) -> list[dict[str, str]]:
    """The right answer is chosen over one with some digit wrong."""
    told = []
    for row in questions(dice) * 4:
        wrong = [*row["answer"]]
        for place in dice.sample(range(LENGTH), dice.randint(1, LENGTH)):
            wrong[place] = dice.choice([digit for digit in "0123456789" if digit != row["answer"][0]])
        told.append({"prompt": row["question"], "chosen": row["answer"], "rejected": "".join(wrong)})
    return told


def _asked(a: int, b: int) -> str:
    return f"{a} {b}: "
