"""Rollouts: completions of prompts, drawn token by token from a decoder that one rank holds whole.

A carriage with so many seats: samples sit in the slots of one key-value cache, every one at its own position, all draw a token in the same
pass, and who has finished gives the seat to the next in the queue (continuous batching; Yu et al. 2022, Orca). Those under way are always
the first rows. What is in the cache is every token but the newest, which the pass feeds: a fresh prompt, a sample that was begun elsewhere
and one whose weights have changed are filled by the same lines. Shapes: B samples, G key-value heads, E head width, V vocabulary.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.errors import Refused
from real.attention import Attend
from real.model import Decoder, rotary

FILL = 8192  # tokens of prompts, padding included, that are filled at once


class Request(NamedTuple):
    """What is to be completed; the sample depends on the weights, `ids` and `seed` alone."""

    prompt: int  # its index among all that the run has drawn
    number: int  # which completion of its group
    ids: tuple[int, ...]
    seed: int


@dataclass
class Sample:
    """A completion, whole or under way."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)  # of each token when it was drawn, at the temperature of sampling [nat]
    versions: list[int] = field(default_factory=list)  # of the weights that drew each
    ended: bool = False  # by the end token, rather than by the limit


class Engine:
    """Draws completions with `model`, whose parameters the owner may change between steps if he tells `refresh`.

    `longest` is the most tokens of prompt and completion together, `end` the token that ends one. Outside of a step the model is as it
    was: the cache takes the place of its attention for the time of a pass.

    Raises Refused for a model whose attention it has no cache for.
    """

    def __init__(self, model: Decoder, *, slots: int, longest: int, new_tokens: int, end: int, temperature: float,
                 device: torch.device | str) -> None:  # fmt: skip
        shape = model.shape
        if shape.mla.kv_rank or shape.positions == "alibi":
            kind = "latent attention" if shape.mla.kv_rank else "ALiBi"
            raise Refused(f"model={shape.name} has {kind}, for which rollouts have no cache; choose a model with rope or learned positions")
        if shape.position_rows and shape.position_rows < longest:
            rows = f"the learned positions, model.context={shape.position_rows}"
            raise Refused(f"prompts and completions of {longest} tokens exceed {rows}; lower align.prompt_tokens or align.new_tokens")
        self.model, self.slots, self.longest, self.new_tokens = model, slots, longest, new_tokens
        self.end, self.temperature, self.device, self.version = end, temperature, torch.device(device), 0
        self.paused = False  # whether what waits stays waiting
        self._columns = torch.arange(longest, device=self.device)
        self._turns = None
        if shape.positions == "rope":
            self._turns = rotary(self._columns, shape.head_dim, shape.rope_theta, shape.rope_scaling)
        self._live, self._queue = list[Sample](), deque[Sample]()
        self._pass = _Pass()
        self._room: Tensor | None = None
        self._layers = list[Cached]()
        self.wake()

    @property
    def live(self) -> int:
        """Samples in slots."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Samples without one."""
        return len(self._queue)

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values; none while it sleeps."""
        return 0 if self._room is None else self._room.nbytes

    def submit(self, work: Iterable[Request | Sample]) -> None:
        """Put requests in the queue; a sample that was begun elsewhere goes on where it stopped.

        Raises Refused for a prompt that is empty, too long, or of another vocabulary.
        """
        fresh = [Sample(item) if isinstance(item, Request) else item for item in work]
        for sample in fresh:
            self._check(sample.request.ids, sample.tokens)
        self._queue.extend(Sample(sample.request, [*sample.tokens], [*sample.logp], [*sample.versions]) for sample in fresh)

    def _check(self, ids: Sequence[int], tokens: Sequence[int]) -> None:
        room, vocab = self.longest - self.new_tokens, self.model.shape.vocab
        if not 0 < len(ids) <= room:
            raise Refused(f"a prompt of {len(ids)} tokens; an engine for {self.longest} takes 1 to {room}, and {self.new_tokens} new ones")
        if wrong := [token for token in (*ids, *tokens) if not 0 <= token < vocab]:
            raise Refused(f"a prompt holds token {wrong[0]}, model.vocab={vocab}; use the tokenizer of the model")

    def run(self) -> list[Sample]:
        """All that is left."""
        done = list[Sample]()
        with self._cached():
            while self.live or self.waiting:
                done += self.step()
        return done

    @torch.inference_mode()
    def step(self) -> list[Sample]:
        """Fill free slots from the queue, draw one token for every sample, and return those that have finished."""
        first = len(self._live)
        while self._queue and len(self._live) < self.slots and not self.paused:
            self._live.append(self._queue.popleft())
        if not self._live:
            return []
        with self._cached():
            self._fill(range(first, len(self._live)))
            logits = self._next()
        luck = [uniform(sample.request.seed, len(sample.tokens)) for sample in self._live]
        drawn = draw(logits.float() / self.temperature, torch.tensor(luck, dtype=torch.float64, device=self.device)).tolist()
        if math.isnan(sum(drawn[1])):
            raise Refused(f"weights of version {self.version} give no numbers to draw from; lower align.learning_rate")
        for sample, token, logp in zip(self._live, *drawn, strict=True):
            sample.tokens.append(int(token))
            sample.logp.append(logp)
            sample.versions.append(self.version)
            sample.ended = sample.tokens[-1] == self.end
        return self._leave([row for row, sample in enumerate(self._live) if sample.ended or len(sample.tokens) >= self.new_tokens])

    def interrupt(self) -> list[Sample]:
        """Take out all that is under way or waits, for another engine or this one to go on with."""
        out = [*self._live, *self._queue]
        self._live, self._queue = [], deque()
        return out

    def refresh(self, version: int) -> None:
        """The weights have changed: what they said of the tokens so far is said anew."""
        self.version = version
        if self._room is not None:
            self._again()

    def sleep(self) -> None:
        """Give the memory of the cache back; the samples stay."""
        self._room, self._layers = None, []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take it again."""
        if self._room is None:
            shape, like = self.model.shape, next(self.model.parameters()).dtype
            sizes = (shape.layers, 2, self.slots, shape.kv_heads, self.longest, shape.head_dim)
            with torch.inference_mode():  # zeros: what is masked counts nothing times whatever number lies there
                self._room = torch.zeros(sizes, dtype=like, device=self.device)
                self._layers = [Cached(layer[0], layer[1], self._pass) for layer in self._room]
            self._again()

    # -- passes

    @torch.inference_mode()
    def _again(self) -> None:
        with self._cached():
            self._fill(range(len(self._live)))

    @contextmanager
    def _cached(self) -> Iterator[None]:
        """The model with the cache for its attention, evaluating; within another such it changes nothing."""
        assert self._room is not None, "an engine that sleeps draws nothing; wake it first"
        training = self.model.training
        attentions: list[Any] = [block.self_attn for block in self.model.layers.values()]
        plain = [attention.attend for attention in attentions]
        if plain[0] is self._layers[0]:
            yield
            return
        if training:
            self.model.eval()
        try:
            _put(attentions, self._layers)
            yield
        finally:
            _put(attentions, plain)
            if training:
                self.model.train()

    def _fill(self, rows: Iterable[int]) -> None:
        """Keys and values of all tokens but the newest; what several samples begin with is computed once."""
        wanted: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            sample = self._live[row]
            if known := (*sample.request.ids, *sample.tokens)[:-1]:
                wanted.setdefault(known, []).append(row)
        for some in _portions(sorted(wanted, key=len)):
            width = max(len(known) for known in some)
            tokens = torch.tensor([[*known, *[0] * (width - len(known))] for known in some], device=self.device)
            slots = torch.tensor([[row, number] for number, known in enumerate(some) for row in wanted[known]], device=self.device)
            self._pass.fill = slots[:, 0], slots[:, 1]
            self._blocks(tokens, self._columns[:width])

    def _next(self) -> Tensor:
        """Logits [B, V] of what follows the newest token of every sample."""
        ends = [(s.tokens[-1] if s.tokens else s.request.ids[-1], len(s.request.ids) + len(s.tokens) - 1) for s in self._live]
        newest, at = torch.tensor(ends, device=self.device).unsqueeze(-1).unbind(1)
        width = max(position for _, position in ends) + 1
        self._pass.fill, self._pass.at = None, at
        self._pass.seen = (self._columns[:width] <= at)[:, None, None]
        x_BTD = self._blocks(newest, at)
        assert self.model.norm is not None and self.model.lm_head is not None
        logits: Tensor = self.model.lm_head(self.model.norm(x_BTD))
        return logits[:, 0]

    def _blocks(self, tokens_BT: Tensor, positions: Tensor) -> Tensor:
        """Through all layers, with positions [T] or [B, T]."""
        model = self.model
        assert model.embed_tokens is not None
        x_BTD: Tensor = model.embed_tokens(tokens_BT)
        if model.embed_positions is not None:
            x_BTD = x_BTD + model.embed_positions(positions)
        angles = None
        if self._turns is not None:
            cos, sin = (turn[positions].to(x_BTD.dtype) for turn in self._turns)
            angles = (cos, sin) if positions.dim() == 1 else (cos.unsqueeze(1), sin.unsqueeze(1))  # [B, 1, T, E]: for every head
        for block in model.layers.values():
            x_BTD = block(x_BTD, angles, None)
        return x_BTD

    def _leave(self, rows: Sequence[int]) -> list[Sample]:
        """Take finished samples out; the last rows move into their places."""
        done = [self._live[row] for row in rows]
        for row in reversed(rows):
            last = self._live.pop()
            if row < len(self._live):
                assert self._room is not None
                known = slice(0, len(last.request.ids) + len(last.tokens))
                self._room[:, :, row, :, known] = self._room[:, :, len(self._live), :, known]
                self._live[row] = last
        return done


@dataclass
class _Pass:
    """What the layers do in the pass that runs."""

    fill: tuple[Tensor, Tensor] | None = None  # slots to fill, and the row of the pass that each gets; none when tokens are drawn
    at: Tensor | None = None  # positions of the newest tokens [B, 1]
    seen: Tensor | None = None  # which columns of the cache each sees [B, 1, 1, columns]


class Cached(Attend):
    """Attention of one layer to the keys and values that it keeps, [slots, G, longest, E] each."""

    def __init__(self, keys: Tensor, values: Tensor, now: _Pass) -> None:
        super().__init__()
        self.keys, self.values, self.now = keys, values, now

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        if self.now.fill is not None:
            slots, source = self.now.fill
            self.keys[slots, :, : k.shape[2]], self.values[slots, :, : k.shape[2]] = k[source], v[source]
            return super().forward(q, k, v)
        at, seen = self.now.at, self.now.seen
        assert at is not None and seen is not None
        rows, columns = len(q), seen.shape[-1]
        spot = at[:, :, None, None].expand_as(k)
        keys, values = self.keys[:rows], self.values[:rows]
        keys.scatter_(2, spot, k)
        values.scatter_(2, spot, v)
        # The heads that share keys stand as queries of one head.
        shared = q.reshape(rows, k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(shared, keys[:, :, :columns], values[:, :, :columns], attn_mask=seen).reshape(q.shape)


def _put(attentions: Sequence[Any], attends: Sequence[Attend]) -> None:
    for attention, attend in zip(attentions, attends, strict=True):
        attention.attend = attend


def _portions(known: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
    """Prompts, shortest first, in portions of at most FILL tokens with their padding, or of one."""
    first = 0
    for stop in range(1, len(known) + 1):
        if stop == len(known) or (stop + 1 - first) * len(known[stop]) > FILL:
            yield known[first:stop]
            first = stop


def uniform(seed: int, number: int) -> float:
    """A number of [0, 1), the `number`th of a seed's; no state, so that it does not matter who draws it, or after what.

    >>> uniform(7, 0) == uniform(7, 0) != uniform(7, 1)
    True
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=6).digest(), "big") / 2**48


def draw(logits_BV: Tensor, luck_B: Tensor) -> Tensor:
    """A token of each row and its log-probability, [2, B]: the first whose cumulative probability exceeds the row's luck.

    Sums are of double precision, so that other rounding of the logits in another batch moves an edge by 1e-7 and hardly a token.

    >>> tokens, logp = draw(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0.25, 0.75]))
    >>> tokens.tolist(), [round(value, 4) for value in logp.tolist()]
    ([0.0, 1.0], [-0.6931, -0.6931])
    """
    logp = logits_BV.log_softmax(-1)
    edges = logp.exp().cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(edges, (luck_B * edges[:, -1]).unsqueeze(-1), right=True).clamp(max=logits_BV.shape[-1] - 1)
    return torch.stack((found.double(), logp.gather(-1, found).double())).squeeze(-1)
