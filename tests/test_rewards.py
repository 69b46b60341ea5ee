"""Rewards: rules on answers of the data set, and functions that behave as badly as functions can, in real processes."""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from conf.errors import Refused
from real.rewards import Judge, digits, gsm8k, reward_of

from .conftest import SHARED

GSM8K = SHARED / "data/alignment/gsm8k_train.jsonl"
ITEM = ("prompt", "completion", "answer")
NASTY = """
import ctypes, fractions, os, signal, subprocess, sys, time

def reward(prompt, completion, answer):
    match completion:
        case "raise": raise KeyError("no\\nsuch thing")
        case "exit": sys.exit(3)
        case "die": os._exit(3)
        case "kill": os.kill(os.getpid(), signal.SIGKILL)
        case "crash": ctypes.string_at(0)
        case "hang": time.sleep(60)
        case "loop":
            while True: pass
        case "stubborn":
            while True:
                try: time.sleep(60)
                except BaseException: pass
        case "leave":
            subprocess.Popen(["sleep", "60"], start_new_session=False)
            time.sleep(60)
        case "nan": return float("nan")
        case "inf": return float("inf")
        case "none": return None
        case "text": return "1.0"
        case "list": return [1.0]
        case "true": return True
        case "half": return fractions.Fraction(1, 2)
        case "print": print("a word", flush=True)
    return len(completion) / 10

class Third:
    def __call__(self, prompt, completion, answer, weight=2.0):
        return weight

third = Third()
def two(prompt, completion): return 1.0
def named(prompt, completion, *, answer): return 1.0
number = 7
"""


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "nasty.py"
    path.write_text(NASTY)
    return path


def completions(*said: str) -> list[tuple[str, str, str]]:
    return [("prompt", one, "answer") for one in said]


@pytest.mark.parametrize(("completion", "answer", "value"), [
    ("#### 18", "She has 9 * 2 = 18\n#### 18", 1.0),
    ("so 18.", "#### 18", 1.0),
    ("18 eggs, then 17 of them", "#### 18", 0.0),
    ("#### 18\nand so on", "#### 18", 1.0),
    ("17 then ####", "#### 17", 1.0),
    ("#### 1 ... #### 2", "2", 1.0),
    ("#### $1,234.00", "#### 1234", 1.0),
    ("#### 1234.50", "#### 1,234.5", 1.0),
    ("#### -5", "#### -5", 1.0),
    ("10-5", "#### 5", 1.0),
    ("x = -$7", "#### -7", 1.0),
    ("it is 1,2,3", "#### 3", 1.0),
    ("2,000,000", "#### 2000000", 1.0),
    ("2,0000", "#### 2", 0.0),
    ("", "#### 5", 0.0),
    ("five", "#### 5", 0.0),
    ("0.1", "#### .1", 0.0),
])  # fmt: skip
def test_numbers_at_the_end(completion, answer, value):
    assert gsm8k("", completion, answer) == value


@pytest.mark.parametrize(("completion", "answer", "value"), [
    ("1234", "1234", 1.0), ("1204", "1234", 0.75), ("12", "1234", 0.5), ("12345", "1234", 1.0), ("", "1234", 0.0),
    (" 12 34 ", "12 34\n", 1.0), ("4321", "1234", 0.0),
])  # fmt: skip
def test_digits_in_their_places(completion, answer, value):
    assert digits("", completion, answer) == value


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs the data sets")
def test_every_answer_of_gsm8k_is_right_by_itself_and_hardly_one_by_its_neighbours():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    with Judge("gsm8k", timeout=5.0) as judge:
        right = judge.score([("", answer, answer) for answer in answers])
        wrong = judge.score([("", answer, other) for answer, other in pairwise(answers)])
    assert all(score == (1.0, "") for score in right) and len(right) == len(answers)
    assert sum(score.value for score in wrong) < 0.05 * len(wrong)


def test_a_rule_without_an_answer_says_so():
    with Judge("gsm8k", timeout=5.0) as judge:
        bad, good = judge.score([("", "5", "no number"), ("", "5", "5")])
    assert math.isnan(bad.value) and bad.reason == "it raised ValueError: the answer has no number" and good == (1.0, "")


BAD = {
    "raise": "it raised KeyError: 'no\\nsuch thing'", "exit": "it raised SystemExit: 3", "die": "its process ended with status 3",
    "kill": "its process was ended by SIGKILL", "crash": "its process was ended by SIGSEGV", "hang": "it took longer than 1 s",
    "loop": "it took longer than 1 s", "stubborn": "it took longer than 1 s", "nan": "it returned nan", "inf": "it returned inf",
    "none": "it returned NoneType, which is no number", "text": "it returned str, which is no number",
    "list": "it returned list, which is no number",
}  # fmt: skip


def test_whatever_a_function_does_costs_its_own_sample(nasty, capfd):
    order = [said for bad in BAD for said in (bad, "four")]
    with Judge(f"{nasty}:reward", timeout=1.0) as judge:
        scores = judge.score(completions("true", *order, "half", "print"))
        again = judge.score(completions("four"))
    assert scores[0] == (1.0, "") and scores[-2:] == [(0.5, ""), (0.5, "")] and again == [(0.4, "")]
    assert scores[2:-2:2] == [(0.4, "")] * len(BAD)
    for bad, score in zip(BAD, scores[1:-2:2], strict=True):
        assert math.isnan(score.value) and score.reason == BAD[bad], bad
    out, err = capfd.readouterr()
    assert "a word" not in out and "a word" in err


def test_the_last_and_the_only_sample_may_be_the_bad_one(nasty):
    with Judge(f"{nasty}:reward", timeout=0.5) as judge:
        for bad in ("kill", "hang", "kill"):
            (score,) = judge.score(completions(bad))
            assert score.reason == BAD[bad].replace("1 s", "0.5 s")
        assert judge.score([]) == []


def test_what_a_function_started_ends_with_it(nasty):
    with Judge(f"{nasty}:reward", timeout=0.5) as judge:
        group = judge._process.pid
        judge.score(completions("leave"))
    assert _ends(group)


def _ends(group: int) -> bool:
    """Whether all processes of a group end within ten seconds."""
    for _ in range(100):
        if not _alive(group):
            return True
        time.sleep(0.1)
    return False


def _alive(group: int) -> bool:
    """Whether a process of a group runs; those that have ended and wait to be asked do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                return True
    return False


def test_a_process_that_fell_between_two_batches_is_replaced(nasty):
    with Judge(f"{nasty}:reward", timeout=5.0) as judge:
        judge.score(completions("four"))
        judge._process.kill()
        judge._process.wait()
        assert judge.score(completions("four", "four")) == [(0.4, "")] * 2


def test_a_file_that_has_gone_costs_the_samples_and_not_the_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\ndef f(a, b, c):\n    os._exit(1) if b == 'die' else None\n    return 1.0\n")
    with Judge(f"{path}:f", timeout=5.0) as judge:
        path.unlink()
        scores = judge.score(completions("fine", "die", "fine", "fine"))
    assert scores[0] == (1.0, "") and [math.isnan(score.value) for score in scores[1:]] == [True] * 3
    assert "there is no file" in scores[2].reason


def test_the_process_ends_with_the_one_that_asked(nasty, tmp_path):
    code = f"""
import os, sys
from real.rewards import Judge
judge = Judge({f"{nasty}:reward"!r}, timeout=0.5)
print(judge._process.pid, flush=True)
os._exit(0)
"""
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
                         env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}).stdout  # fmt: skip
    assert _ends(int(out))


def test_what_lies_beside_a_function_can_be_imported(tmp_path):
    (tmp_path / "helper.py").write_text("VALUE = 0.25\n")
    (tmp_path / "re.py").write_text("from dataclasses import dataclass\nfrom helper import VALUE\n@dataclass\nclass Box:\n    x: float\n"
                                    "def f(prompt, completion, answer):\n    return Box(VALUE).x\n")  # fmt: skip
    with Judge(f"{tmp_path / 're.py'}:f", timeout=5.0) as judge:
        assert judge.score([ITEM]) == [(0.25, "")]


@pytest.mark.parametrize(("name", "words"), [
    ("gsm9k", "align.reward=gsm9k is no reward; it is gsm8k, digits, model, or FILE.py:FUNCTION"),
    ("none.py:f", "there is no file none.py"),
    ("{nasty}:nothing", "has no function nothing; define nothing"),
    ("{nasty}:number", "has no function number"),
    ("{nasty}:two", "too many positional arguments"),
    ("{nasty}:named", "too many positional arguments"),
    ("{folder}/broken.py:f", "cannot be imported .SyntaxError"),
    ("{folder}/exits.py:f", "cannot be imported .SystemExit: 1"),
    ("{folder}/dies.py:f", "its process ended with status 4"),
])  # fmt: skip
def test_what_is_no_reward_is_one_line_at_once(nasty, tmp_path, name, words):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(1)\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(Refused, match=words) as told:
        Judge(name.format(nasty=nasty, folder=tmp_path), timeout=5.0)
    assert "\n" not in str(told.value)


def test_functions_are_found_by_their_names(nasty):
    assert reward_of(f"{nasty}:third")(*ITEM) == 2.0 and reward_of("digits") is digits
