"""Completions over HTTP: a server in a process of its own draws what the engine here draws; and servers that are not as they should be."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import Refused
from conf.program import load
from real import huggingface
from real.initial import initialise
from real.model import Decoder
from real.rollout import Engine, Request, Sample
from real.server import Remote, Server

ROOT = Path(__file__).parents[1]
SHAPE = ["model=tiny_llama3", "model.layers=2", "model.hidden=64", "model.heads=4", "model.kv_heads=2", "model.ffn=96", "model.tied=false"]
ENGINE: dict[str, Any] = {"slots": 3, "longest": 32, "new_tokens": 12, "end": 3, "temperature": 0.7}
SERVE = """
import sys, torch
torch.set_num_threads(1)  # threads that wait for each other on busy cores wait long
from real.server import Server
from tests.test_server import ENGINE, decoder
from real.rollout import Engine
server = Server(Engine(decoder(0), **ENGINE, device="cpu"), "tiny")
print(server.address, flush=True)
sys.stdin.read()
server.close()
"""


def decoder(seed: int) -> Decoder:
    model = Decoder(load(SHAPE).model)
    initialise(model, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(7.0)
    return model


def engine(seed: int = 0) -> Engine:
    return Engine(decoder(seed), **ENGINE, device="cpu")


def requests(count: int = 9) -> list[Request]:
    return [Request(i // 2, i % 2, tuple((31 * (i // 2) + 7 * j) % 512 for j in range(1 + i % 7)), 100 + i) for i in range(count)]


def run(engine: Any, work: list[Request | Sample]) -> list[Sample]:
    engine.submit(work)
    return sorted(engine.run(), key=lambda sample: sample.request)


def same(some: list[Sample], others: list[Sample]) -> None:
    assert [(s.request, s.tokens, s.ended) for s in some] == [(s.request, s.tokens, s.ended) for s in others]
    for one, other in zip(some, others, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    yield process.stdout.readline().strip()
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture
def remote(address: str) -> Iterator[Remote]:
    found = Remote(address, **ENGINE)
    yield found
    found.close()


def ask(address: str, path: str, told: Any = None) -> tuple[int, Any]:
    connection = HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("GET" if told is None else "POST", path, told if told is None or isinstance(told, str) else json.dumps(told))
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text else None


PLAIN = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0.7, "seed": 4}


def test_a_server_draws_what_the_engine_draws(remote):
    here, there = run(engine(), requests(20)), run(remote, requests(20))
    same(there, here)
    assert all(s.versions == [0] * len(s.tokens) for s in there) and len({tuple(s.tokens) for s in there}) == 20


def test_what_was_begun_here_goes_on_there_and_back(remote):
    here, whole = engine(), run(engine(), requests())
    here.submit(requests())
    done = [sample for _ in range(5) for sample in here.step()]
    remote.submit(here.interrupt())
    done += remote.step()
    here.submit(remote.interrupt())
    assert remote.live == remote.waiting == 0
    same(sorted([*done, *here.run()], key=lambda sample: sample.request), whole)


def test_answers_have_vllms_shape(address):
    status, answer = ask(address, "/v1/completions", PLAIN | {"n": 2, "logprobs": 0, "return_tokens_as_token_ids": True,
                                                              "return_token_ids": True, "stop_token_ids": [3]})  # fmt: skip
    assert status == 200 and answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    wanted = run(engine(), [Request(0, number, (5, 6, 7), 4 + number) for number in range(2)])
    for choice, sample in zip(answer["choices"], wanted, strict=True):
        assert choice["token_ids"] == sample.tokens and choice["prompt_token_ids"] == [5, 6, 7]
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in sample.tokens]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(sample.logp, abs=1e-5)
        assert choice["finish_reason"] == ("stop" if sample.ended else "length")
        assert choice["stop_reason"] == (3 if sample.ended else None) and {"text", "prompt_logprobs"} <= choice.keys()
    drawn = sum(len(sample.tokens) for sample in wanted)
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": drawn, "total_tokens": 3 + drawn}
    status, short = ask(address, "/v1/completions", PLAIN | {"prompt": [[5, 6, 7], [8]], "max_tokens": 2, "return_token_ids": True})
    assert short["choices"][0]["token_ids"] == wanted[0].tokens[:2] and len(short["choices"]) == 2
    assert short["choices"][0]["logprobs"] is None and short["choices"][0]["finish_reason"] == "length"
    assert ask(address, "/health") == (200, None)
    models = ask(address, "/v1/models")[1]
    assert models["object"] == "list" and models["data"][0]["id"] == "tiny" and models["data"][0]["max_model_len"] == 32


@pytest.mark.parametrize(("path", "told", "words"), [
    ("/v1/completions", "{", "Expecting property name"), ("/v1/completions", [1], "the body is no object"),
    ("/v1/completions", PLAIN | {"prompt": "text"}, "prompt has to be token ids"),
    ("/v1/completions", PLAIN | {"prompt": [1, "a"]}, "prompt has to be token ids"),
    ("/v1/completions", PLAIN | {"prompt": []}, "prompt has to be token ids"),
    ("/v1/completions", PLAIN | {"prompt": [[1], [600]]}, "token 600"),
    ("/v1/completions", PLAIN | {"prompt": [[1], []]}, "a prompt of 0 tokens"),
    ("/v1/completions", PLAIN | {"prompt": [1, 600], "begun": 1, "max_tokens": 3}, "token 600"),
    ("/v1/completions", PLAIN | {"prompt": [1] * 30}, "a prompt of 30 tokens"),
    ("/v1/completions", PLAIN | {"temperature": 1.0}, "this server samples at 0.7"),
    ("/v1/completions", PLAIN | {"max_tokens": 13}, "this server draws 1 to 12"),
    ("/v1/completions", PLAIN | {"top_p": 0.9}, "top_p=0.9"), ("/v1/completions", PLAIN | {"stream": True}, "stream=True"),
    ("/v1/completions", PLAIN | {"ignore_eos": True}, "ends at token 3"), ("/v1/completions", PLAIN | {"n": 1.5}, "n and seed"),
    ("/v1/completions", PLAIN | {"stop_token_ids": [7]}, "ends at token 3 alone"), ("/v1/completions", PLAIN | {"begun": 3}, "begun=3"),
    ("/load", {"path": "/nowhere", "version": 1}, "no config.json"), ("/load", {"version": 1}, "path is missing"),
    ("/v2/completions", PLAIN, "there is no /v2"),
])  # fmt: skip
def test_what_a_server_cannot_do_it_refuses(address, path, told, words):
    status, answer = ask(address, path, told)
    assert status == (404 if "v2" in path else 400) and words in answer["error"]["message"] and answer["error"]["code"] == status
    assert ask(address, "/health")[0] == 200


def test_new_weights_are_loaded_from_a_folder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    remote = Remote(process.stdout.readline().strip(), **ENGINE)
    new = decoder(1)
    named = {name: parameter.detach() for name, parameter in new.named_parameters()}
    huggingface.write_model(lambda names: [named[name] for name in names], list(named), new.shape, 32, tmp_path / "new", None)
    old = run(remote, requests())
    remote.load(tmp_path / "new", 5)
    after = run(remote, requests())
    same(after, run(engine(1), requests()))
    assert all(set(s.versions) == {5} for s in after) and [s.tokens for s in after] != [s.tokens for s in old]
    other = Decoder(load([*SHAPE, "model.ffn=80"]).model)
    initialise(other, 0)
    named = {name: parameter.detach() for name, parameter in other.named_parameters()}
    huggingface.write_model(lambda names: [named[name] for name in names], list(named), other.shape, 32, tmp_path / "other", None)
    with pytest.raises(Refused, match=r"/load answers with status 400: .*intermediate_size is 80"):
        remote.load(tmp_path / "other", 6)
    same(run(remote, requests()), after)
    process.communicate(timeout=30)
    with pytest.raises(Refused, match=r"does not answer .*start the server"):
        run(remote, requests(1))
    remote.close()


GOOD = {"choices": [{"index": 0, "text": "", "finish_reason": "stop", "logprobs": {"tokens": ["token_id:9", "token_id:3"],
                                                                                   "token_logprobs": [-1.5, -0.25]}}]}  # fmt: skip


class Odd(BaseHTTPRequestHandler):
    """Says what it is told to."""

    said: Any = GOOD

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": "odd"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(*(self.said if isinstance(self.said, tuple) else (200, self.said)))

    def _say(self, status: int, told: Any) -> None:
        body = told.encode() if isinstance(told, str) else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def odd() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def choice(**changes: Any) -> dict[str, Any]:
    return {"choices": [GOOD["choices"][0] | changes]}


def test_an_answer_without_versions_has_the_clients(odd, monkeypatch):
    remote = Remote(odd + "/v1/", **ENGINE)
    remote.refresh(4)
    (sample,) = run(remote, requests(1))
    assert (sample.tokens, sample.logp, sample.versions, sample.ended) == ([9, 3], [-1.5, -0.25], [4, 4], True)


@pytest.mark.parametrize(("said", "words"), [
    (choice(logprobs=None), "token ids with a log-probability each"),
    (choice(logprobs={"tokens": ["a", "b"], "token_logprobs": [-1.0, -1.0]}), "token ids with a log-probability each"),
    (choice(logprobs={"tokens": ["token_id:9", "token_id:3"], "token_logprobs": [None, -1.0]}), "token ids with a log-probability each"),
    (choice(logprobs={"tokens": ["token_id:3"], "token_logprobs": []}), "token ids with a log-probability each"),
    ({"choices": []}, "token ids with a log-probability each"), (["odd"], "token ids with a log-probability each"),
    (choice(finish_reason="length"), "ended a completion by length after 2 tokens"),
    (choice(logprobs={"tokens": ["token_id:9"], "token_logprobs": [-1.0]}), "the last of them 9; it has to keep token 3"),
    ((500, {"error": {"message": "out of\nmemory"}}), "answers with status 500: out of memory"),
    ((404, {"object": "error", "message": "no such model"}), "status 404: no such model"),
    ((503, "<html>"), "status 503: <html>"), ((200, "<html>"), "something that is no JSON: <html>"),
])  # fmt: skip
def test_an_answer_that_cannot_be_trained_on_is_one_line(odd, monkeypatch, said, words):
    monkeypatch.setattr(Odd, "said", said)
    with pytest.raises(Refused, match=words) as told:
        run(Remote(odd, **ENGINE), requests(1))
    assert "\n" not in str(told.value) and odd in str(told.value)


def test_a_server_that_is_none_is_one_line(address):
    for wrong, words in (("http://127.0.0.1:9", "does not answer"), ("127.0.0.1:8000", "is no address"), ("ftp://x", "is no address")):
        with pytest.raises(Refused, match=words):
            Remote(wrong, **ENGINE)
    with pytest.raises(Refused, match="takes 32 tokens, not 64"):
        Remote(address, **ENGINE | {"longest": 64})


def test_weights_that_give_no_numbers_are_told_and_others_can_follow(tmp_path):
    broken = engine()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    server = Server(broken, "broken")
    remote = Remote(server.address, **ENGINE)
    with pytest.raises(Refused, match="status 400: weights of version 0 give no numbers"):
        run(remote, requests(9))
    assert len(remote.interrupt()) == 9
    good = decoder(0)
    named = {name: parameter.detach() for name, parameter in good.named_parameters()}
    huggingface.write_model(lambda names: [named[name] for name in names], list(named), good.shape, 32, tmp_path / "good", None)
    remote.load(tmp_path / "good", 1)
    same(run(remote, requests()), run(engine(), requests()))
    remote.close()
    server.close()


def test_text_is_what_the_tokenizer_says(tmp_path):
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    made.save(str(tmp_path / "tokenizer.json"))
    server = Server(engine(), "words", tokenizer=tmp_path / "tokenizer.json")
    answer = ask(server.address, "/v1/completions", PLAIN | {"logprobs": 0, "return_token_ids": True})[1]["choices"][0]
    server.close()
    words = [f"w{token}" for token in answer["token_ids"]]
    assert answer["logprobs"]["tokens"] == words and answer["text"].split() == [word for word in words if word != "w3"]
