"""Generation over HTTP: our engine behind the completions API of OpenAI as vLLM serves it, and a client of any such server.

    GET  /health                nothing, with status 200
    GET  /v1/models             the model's name and `max_model_len`
    POST /v1/completions        `prompt` as token ids (one list or several), `n`, `max_tokens`, `temperature`, `seed`, `logprobs` 0,
                                `stop_token_ids`, `return_tokens_as_token_ids`, `return_token_ids`
    POST /load                  ours alone: {"path": FOLDER, "version": N} takes the weights of a folder in Hugging Face's layout

Ours alone too: `begun` in a request says how many tokens at the end of the prompt are a completion that goes on, `versions` in a choice
whose weights drew each token. What the server cannot do it refuses: it samples at one temperature, from all tokens, to one length at most.
vLLM has to run with --logprobs-mode processed_logprobs where the temperature is not 1: by itself it tells log-probabilities before it.
"""

import http.client
import itertools
import json
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from conf.errors import Refused
from real import huggingface
from real.rollout import Engine, Request, Sample

TOKEN = "token_id:"  # vLLM's spelling of a token that is not to become text
PATIENCE = 3600.0  # seconds for the longest completion
PAUSE = 0.2  # seconds between two looks at what is under way
# What would change the distribution that is sampled, with the values that leave it alone.
PLAIN: dict[str, tuple[Any, ...]] = {
    "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,),
    "stream": (False,), "echo": (False,), "best_of": (1,), "use_beam_search": (False,), "stop": ([], ""), "logit_bias": ({},),
    "min_tokens": (0,), "logprobs": (0,), "prompt_logprobs": (),
}  # fmt: skip


# -- the server


class Server(ThreadingHTTPServer):
    """Serves an engine from threads of its own until it is closed; port 0 is a free one."""

    request_queue_size, daemon_threads = 1024, True

    def __init__(self, engine: Engine, name: str, port: int = 0, host: str = "127.0.0.1", tokenizer: Path | None = None) -> None:
        super().__init__((host, port), _Handler)
        self.engine, self.name = engine, name
        self.decode: Callable[[list[int]], str] = lambda _: ""
        if tokenizer is not None:
            from tokenizers import Tokenizer

            self.decode = Tokenizer.from_file(str(tokenizer)).decode
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._wanted: dict[tuple[int, int], Future[Sample]] = {}
        self._tickets = itertools.count()
        self._workers = [threading.Thread(target=work, daemon=True) for work in (self._draw, self.serve_forever)]
        for thread in self._workers:
            thread.start()

    @property
    def address(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    def complete(self, work: list[Sample]) -> list[Sample]:
        """Each of them finished; called from any thread."""
        ticket, futures = next(self._tickets), [Future[Sample]() for _ in work]
        for number, sample in enumerate(work):
            sample.request = sample.request._replace(prompt=ticket, number=number)

        def begin() -> None:
            self.engine.submit(work)
            self._wanted.update({(ticket, number): future for number, future in enumerate(futures)})

        self._ask(begin).result()
        return [future.result() for future in futures]

    def load(self, folder: Path, version: int) -> None:
        """New weights between two steps, for whatever is under way too."""

        def take() -> None:
            if not (folder / "config.json").is_file():
                raise Refused(f"{folder} is no model in Hugging Face's layout: it has no config.json")
            model = self.engine.model
            huggingface.refuse_other(folder, model.shape)
            huggingface.load(folder, model.shape, [model])
            self.engine.refresh(version)

        self._ask(take).result()

    def close(self) -> None:
        self._jobs.put(None)
        self.shutdown()
        self.server_close()
        for thread in self._workers:
            thread.join()

    def _ask(self, work: Callable[[], None]) -> Future[None]:
        """Have the thread that draws do it between two steps."""
        done = Future[None]()

        def job() -> None:
            try:
                work()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._jobs.put(job)
        return done

    def _draw(self) -> None:
        """The thread of the engine: what is asked, then a step, until nothing is asked any more."""
        while True:
            while not self._jobs.empty() or not (self.engine.live or self.engine.waiting):
                if (job := self._jobs.get()) is None:
                    return self._fail(Refused("the server is closing"))
                job()
            try:
                for sample in self.engine.step():
                    self._wanted.pop((sample.request.prompt, sample.request.number)).set_result(sample)
            except Exception as error:  # weights that give no numbers: who waits is told
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.engine.interrupt()
        for future in self._wanted.values():
            future.set_exception(error)
        self._wanted.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1  # headers and body in one packet
    server: Server

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        if self.path == "/health":
            return self._answer(200, None)
        if self.path == "/v1/models":
            card = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "foretold",
                    "max_model_len": self.server.engine.longest}  # fmt: skip
            return self._answer(200, {"object": "list", "data": [card]})
        return self._refuse(404, f"there is no {self.path}")

    def do_POST(self) -> None:
        try:
            told = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            if not isinstance(told, dict):
                raise ValueError("the body is no object")
            if self.path == "/v1/completions":
                return self._answer(200, self._complete(told))
            if self.path == "/load":
                self.server.load(Path(_of(told, "path", str)), _of(told, "version", int))
                return self._answer(200, {"version": told["version"]})
            return self._refuse(404, f"there is no {self.path}")
        except (ValueError, Refused) as error:
            return self._refuse(400, str(error))
        except Exception as error:
            return self._refuse(500, f"{type(error).__name__}: {error}")

    def _complete(self, told: dict[str, Any]) -> dict[str, Any]:
        limit, prompts = self._asked(told)
        seed, begun = told.get("seed"), told.get("begun", 0)
        work = []
        for ids in prompts:
            for number in range(told.get("n") or 1):
                own = secrets.randbits(48) if seed is None else seed + number
                drawn = list(ids[len(ids) - begun :])
                request = Request(0, 0, tuple(ids[: len(ids) - begun]), own)
                work.append(Sample(request, drawn, [0.0] * begun, [0] * begun))
        done = self.server.complete(work)
        choices = [self._choice(number, sample, begun, limit, told) for number, sample in enumerate(done)]
        asked, drew = sum(map(len, prompts)), sum(len(choice["versions"]) for choice in choices)
        return {"id": f"cmpl-{secrets.token_hex(16)}", "object": "text_completion", "created": int(time.time()),
                "model": self.server.name, "choices": choices,
                "usage": {"prompt_tokens": asked, "completion_tokens": drew, "total_tokens": asked + drew}}  # fmt: skip

    def _asked(self, told: dict[str, Any]) -> tuple[int, list[list[int]]]:
        """Most new tokens, and the prompts.

        Raises ValueError for what this server does not do.
        """
        engine = self.server.engine
        for key, plain in PLAIN.items():
            if told.get(key) is not None and told[key] not in plain:
                raise ValueError(f"{key}={told[key]}: this server samples from all tokens as they are, and tells the drawn one's alone")
        if told.get("temperature", 1.0) != engine.temperature:
            raise ValueError(f"temperature={told.get('temperature')}: this server samples at {engine.temperature}")
        if told.get("ignore_eos") and engine.end not in (told.get("stop_token_ids") or []):
            raise ValueError(f"ignore_eos: this server ends at token {engine.end}")
        if set(told.get("stop_token_ids") or []) - {engine.end}:
            raise ValueError(f"stop_token_ids={told['stop_token_ids']}: this server ends at token {engine.end} alone")
        prompt, begun = told.get("prompt"), told.get("begun", 0)
        prompts = [prompt] if isinstance(prompt, list) and prompt and not isinstance(prompt[0], list) else prompt
        if not (isinstance(prompts, list) and prompts and all(isinstance(ids, list) and _whole(ids) for ids in prompts)):
            raise ValueError("prompt has to be token ids, one list of them or several")
        if not _whole([begun]) or any(begun and not 0 < begun < len(ids) for ids in prompts) or begun >= engine.new_tokens:
            raise ValueError(f"begun={begun} has to leave something of the prompt, and of {engine.new_tokens} new tokens")
        if not _whole([told.get("n") or 1, told.get("seed") or 0]) or (told.get("n") or 1) < 0:
            raise ValueError("n and seed have to be whole numbers")
        limit = told.get("max_tokens") or 16
        if not (_whole([limit]) and 0 < limit <= engine.new_tokens - begun):
            raise ValueError(f"max_tokens={limit}: this server draws 1 to {engine.new_tokens - begun}")
        return limit, prompts

    def _choice(self, number: int, sample: Sample, begun: int, limit: int, told: dict[str, Any]) -> dict[str, Any]:
        new, decode = slice(begun, begun + limit), self.server.decode
        tokens, logp = sample.tokens[new], sample.logp[new]
        ended = sample.ended and len(sample.tokens) <= begun + limit
        said = decode(tokens[: len(tokens) - ended])
        choice: dict[str, Any] = {"index": number, "text": said, "logprobs": None, "finish_reason": "stop" if ended else "length",
                                  "stop_reason": None, "prompt_logprobs": None, "versions": sample.versions[new]}  # fmt: skip
        if ended and told.get("stop_token_ids"):
            choice["stop_reason"] = sample.tokens[-1]
        if told.get("logprobs") is not None:
            words = [decode([token]) for token in tokens]
            names = [f"{TOKEN}{token}" for token in tokens] if told.get("return_tokens_as_token_ids") else words
            offsets = [*itertools.accumulate(map(len, words), initial=0)][:-1]
            choice["logprobs"] = {"tokens": names, "token_logprobs": logp, "text_offset": offsets,
                                  "top_logprobs": [{name: value} for name, value in zip(names, logp, strict=True)]}  # fmt: skip
        if told.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": [*sample.request.ids, *sample.tokens[:begun]]}
        return choice

    def _answer(self, status: int, told: Any) -> None:
        body = b"" if told is None else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, message: str) -> None:
        kind = "BadRequestError" if status == 400 else "NotFoundError" if status == 404 else "InternalServerError"
        self._answer(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})


def _of(told: dict[str, Any], key: str, kind: type) -> Any:
    if not isinstance(told.get(key), kind):
        raise ValueError(f"{key} is missing, or no {kind.__name__}")
    return told[key]


def _whole(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


# -- the client


class Remote:
    """An engine that is a server elsewhere, vLLM's or ours, with the engine's methods; `slots` requests are under way at once.

    Raises Refused when there is no such server, or its answers lack what is trained on.
    """

    def __init__(self, address: str, *, slots: int, longest: int, new_tokens: int, end: int, temperature: float) -> None:
        self.address, self.slots, self.longest, self.new_tokens = address.rstrip("/").removesuffix("/v1"), slots, longest, new_tokens
        self.end, self.temperature, self.version, self.paused = end, temperature, 0, False
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refused(f"align.generator={address} is no address; give one as in http://127.0.0.1:8000")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._path = parts.netloc, parts.path
        self._queue, self._under_way = deque[Sample](), dict[Future[Sample], Sample]()
        self._pool = ThreadPoolExecutor(slots)
        try:
            card = self._ask("GET", "/v1/models", None)["data"][0]
            self.model, room = card["id"], card.get("max_model_len") or longest
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Refused(f"align.generator={self.address} names no model at /v1/models; it has to be a server like vLLM's") from error
        if room < longest:
            raise Refused(
                f"align.generator={self.address} takes {room} tokens, not {longest}; lower align.prompt_tokens or align.new_tokens"
            )

    @property
    def live(self) -> int:
        return len(self._under_way)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, work: Iterable[Request | Sample]) -> None:
        self._queue.extend(Sample(item) if isinstance(item, Request) else item for item in work)

    def step(self) -> list[Sample]:
        """Send what there is room for, and wait a moment for something to have finished."""
        while self._queue and len(self._under_way) < self.slots and not self.paused:
            sample = self._queue.popleft()
            self._under_way[self._pool.submit(self._complete, sample, self.version)] = sample
        finished = wait(self._under_way, PAUSE, FIRST_COMPLETED).done
        done = {future: future.result() for future in self._under_way if future in finished}  # if one raises, all stay for `interrupt`
        self._under_way = {future: sample for future, sample in self._under_way.items() if future not in done}
        return [*done.values()]

    def run(self) -> list[Sample]:
        done = list[Sample]()
        while self.live or self.waiting:
            done += self.step()
        return done

    def interrupt(self) -> list[Sample]:
        """Take out all that is under way or waits; what the server draws meanwhile is not looked at."""
        out = [*self._under_way.values(), *self._queue]
        self._under_way, self._queue = {}, deque()
        return out

    def refresh(self, version: int) -> None:
        """The server's weights have changed; where it does not tell versions, what is sent from now on is believed to be of this one."""
        self.version = version

    def load(self, folder: Path, version: int) -> None:
        """Have our own server take the weights of a folder that both can read."""
        self._ask("POST", "/load", {"path": str(folder), "version": version})
        self.version = version

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _complete(self, sample: Sample, version: int) -> Sample:
        begun = len(sample.tokens)
        told = {
            "model": self.model, "prompt": [*sample.request.ids, *sample.tokens], "n": 1, "max_tokens": self.new_tokens - begun,
            "temperature": self.temperature, "seed": sample.request.seed, "logprobs": 0, "return_tokens_as_token_ids": True,
            "stop_token_ids": [self.end], "ignore_eos": True, "skip_special_tokens": False,
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        }  # fmt: skip
        tokens, logp, choice = self._drawn(self._ask("POST", "/v1/completions", told | ({"begun": begun} if begun else {})))
        ended = choice.get("finish_reason") == "stop"
        if ended != (tokens[-1] == self.end) or len(tokens) > self.new_tokens - begun:
            raise Refused(f"align.generator={self.address} ended a completion by {choice.get('finish_reason')} after {len(tokens)} tokens, "
                          f"the last of them {tokens[-1]}; it has to keep token {self.end}, which ends one, and max_tokens")  # fmt: skip
        versions = choice.get("versions", [version] * len(tokens))
        return Sample(sample.request, sample.tokens + tokens, sample.logp + logp, sample.versions + versions, ended)

    def _drawn(self, answer: Any) -> tuple[list[int], list[float], dict[str, Any]]:
        """Tokens, their log-probabilities and the rest of an answer."""
        try:
            choice = answer["choices"][0]
            names, logp = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
            tokens = [int(name.removeprefix(TOKEN)) for name in names if name.startswith(TOKEN)]
            good = 0 < len(names) == len(tokens) == len(logp) and all(math.isfinite(value) for value in logp)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            good = False
        if not good:
            wanted = "token ids with a log-probability each (logprobs, return_tokens_as_token_ids)"
            raise Refused(f"align.generator={self.address} does not answer with {wanted}; use a server that does, as vLLM")
        return tokens, [float(value) for value in logp], choice

    def _ask(self, method: str, path: str, told: dict[str, Any] | None) -> Any:
        connection = self._kind(self._host, timeout=PATIENCE)
        try:
            body = None if told is None else json.dumps(told)
            connection.request(method, self._path + path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise Refused(f"align.generator={self.address} does not answer ({why}); start the server, or mend the address") from error
        finally:
            connection.close()
        if status != 200:
            raise Refused(f"align.generator={self.address}{path} answers with status {status}: {_said(text)}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise Refused(f"align.generator={self.address}{path} answers with something that is no JSON: {_said(text)}") from error


def _said(text: bytes) -> str:
    """The message of an error in one line, as vLLM words it, or what there is."""
    try:
        told = json.loads(text)
        message = told.get("error", told).get("message", told)
    except (ValueError, AttributeError):
        message = text.decode(errors="replace")
    return " ".join(str(message).split())[:300] or "nothing"
