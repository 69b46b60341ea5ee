"""Prompts of rollouts: the same text, tokens and split as fine-tuning on the same lines has."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from conf.errors import Refused
from conf.program import load
from real import chats
from real.bpe import END
from real.prompts import question, read

from .conftest import SHARED

GSM8K = SHARED / "data/alignment/gsm8k_test.jsonl"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, and a token that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={END: 0} | {byte: i for i, byte in enumerate(alphabet, 1)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def align(path: Path, **changes):
    return load(["align=grpo", f"align.data={path}"]).align.but(**changes)


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROWS = [
    {"question": "what is 1 + 1?", "answer": "#### 2"},
    {"prompt": "12", "answer": "21"},
    {"prompt": "the sun", "completion": "runs"},
    {"question": "how many?", "answer": 3},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"},
                  {"role": "user", "content": "and?"}], "answer": "no"},
]  # fmt: skip


@pytest.mark.parametrize("template", [*chats.TEMPLATES])
def test_prompts_are_what_fine_tuning_learns_the_answer_after(tokenizer, tmp_path, template):
    path = write(tmp_path / "a.jsonl", *ROWS)
    found = read(align(path, template=template, held_out=0.0, prompt_tokens=1000), tokenizer)
    shape, coder = chats.Template(template), chats.Coder(str(tokenizer))
    assert found.left_out == 0 and len(found.held_out) == 0 and found.train.answers == ["#### 2", "21", "runs", "3", "no"]
    for row, text, ids in zip(ROWS, found.train.texts, found.train.ids, strict=True):
        messages, answer = question(json.dumps(row))
        assert text == shape.render(messages, answer=True) and coder.tokenizer.decode(ids) == text
        whole, learned = coder.encode(shape.pieces([*messages, {"role": "assistant", "content": answer}]))
        last = int(np.flatnonzero(~learned)[-1]) + 1
        assert list(ids) == whole[:last].tolist()
    assert found.train.texts[1] == {"bare": "12", "plain": "User: 12\nAssistant:"}.get(template, found.train.texts[1])


def test_the_split_is_by_prompt_and_fine_tunings(tokenizer, tmp_path):
    rows = [{"question": f"what is {i % 300} + 1?", "answer": str(i)} for i in range(600)]
    path = write(tmp_path / "a.jsonl", *rows)
    found = read(align(path, held_out=0.2), tokenizer)
    assert len(found.train) + len(found.held_out) == 600 and 0.1 < len(found.held_out) / 600 < 0.3
    assert not set(found.train.texts) & set(found.held_out.texts)
    tune = load(["finetune=full", f"finetune.data={path}"]).finetune
    (task,) = chats.tasks(tune.but(held_out=0.2, template="plain"), tokenizer)
    chats.encode(tmp_path, "0", *task.arguments)
    coder = chats.Coder(str(tokenizer))
    theirs = np.fromfile(tmp_path / "held_out-0.bin", np.uint16).tolist()
    said = coder.tokenizer.decode(theirs, skip_special_tokens=False).split(END)[:-1]
    assert [text + f" {answer}\n" for text, answer in zip(found.held_out.texts, found.held_out.answers, strict=True)] == said


def test_long_prompts_are_left_out_and_counted(tokenizer, tmp_path):
    rows = [{"prompt": "x" * length, "answer": "y"} for length in (3, 9, 10, 11, 40)]
    found = read(align(write(tmp_path / "a.jsonl", *rows), template="bare", held_out=0.0, prompt_tokens=10), tokenizer)
    assert found.left_out == 2 and [len(ids) for ids in found.train.ids] == [3, 9, 10]


@pytest.mark.parametrize(("line", "words"), [
    ("{", "it is no JSON"), ("[1]", "it is no object"), ("{}", "it has no field; a question, a prompt or messages is missing"),
    ('{"question": "a"}', "it has question; an answer is missing"), ('{"answer": "a"}', "it has answer; a question, a prompt or messages"),
    ('{"question": 3, "answer": "a"}', "what it asks is no text"), ('{"question": "a", "answer": ""}', "its answer is no text"),
    ('{"question": "a", "answer": true}', "its answer is no text"), ('{"question": "a", "answer": ["b"]}', "its answer is no text"),
    ('{"question": "", "answer": "a"}', "what it asks is empty"), ('{"messages": [], "answer": "a"}', "it has messages, answer; "),
    ('{"messages": ["a"], "answer": "a"}', "message 1 has no role and content"),
    ('{"messages": [{"role": "assistant", "content": "a"}], "answer": "a"}', "its last message is the assistant's"),
])  # fmt: skip
def test_a_malformed_line_says_where_and_what(tokenizer, tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", ROWS[0], "", line)
    with pytest.raises(Refused) as told:
        read(align(path, template="bare"), tokenizer)
    (problem,) = told.value.problems
    assert problem.startswith(f"{path}, line 3: {words}") and problem.endswith("mend or remove the line")


def test_what_gives_no_prompts_is_one_line(tokenizer, tmp_path):
    wrong = {
        "align.method=grpo needs a file": align(tmp_path).but(data=None), "is no file": align(tmp_path / "none.jsonl"),
        "is empty": align(write(tmp_path / "empty.jsonl", "", " ")),
        "align.template=odd is no file": align(write(tmp_path / "a.jsonl", ROWS[0]), template="odd"),
        "leaves no prompt to train on: 1 are longer than align.prompt_tokens=2": align(tmp_path / "a.jsonl", prompt_tokens=2),
    }  # fmt: skip
    for words, plan in wrong.items():
        with pytest.raises(Refused, match=words):
            read(plan, tokenizer)


def test_a_template_that_refuses_names_the_line(tokenizer, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
                        "{% for m in messages %}{{ m.content }}{% endfor %}")  # fmt: skip
    with pytest.raises(Refused, match="line 5: the template refuses it: no system message"):
        read(align(write(tmp_path / "a.jsonl", *ROWS), template=str(template)), tokenizer)


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs the data sets")
def test_every_question_of_gsm8k(tokenizer):
    found = read(align(GSM8K, prompt_tokens=2000), tokenizer)
    assert len(found.train) + len(found.held_out) == 1319 and found.left_out == 0
    assert all("####" in answer for answer in found.train.answers)


@pytest.mark.parametrize(("template", "known", "end"), [
    ("chatml", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    ("llama3", ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
    ("plain", ["<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>"),
    ("chatml", ["<|endoftext|>"], "<|endoftext|>"),
])  # fmt: skip
def test_an_answer_ends_where_its_turn_does(tmp_path, template, known, end):
    """By the template where the tokenizer knows its marks, as instruct models from elsewhere do."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(known)
    made.save(str(tmp_path / "tokenizer.json"))
    coder = chats.Coder(str(tmp_path / "tokenizer.json"))
    assert coder.turn_end(chats.Template(template)) == made.token_to_id(end)
