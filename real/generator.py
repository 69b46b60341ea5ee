"""The generator of one rank with its prompts and rewards: where the trainers are, or on a rank of its own."""

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from conf.errors import Refused
from conf.plan import Plan
from real import adapters, digits, huggingface, prompts
from real.alignment import Rank
from real.chats import Coder, Template
from real.cluster import device
from real.data import Order
from real.model import Decoder
from real.pretrain import Start
from real.prompts import Prompts
from real.rewards import Judge
from real.roles import Follow, bridge
from real.rollout import Engine, Request, Sample
from real.samples import Judged
from real.server import Remote
from real.sync import Sync

WAIT = 0.2  # seconds between two beats of a rank that waits
PAUSE = 0.05  # seconds for which completions are kept, so that a judge is asked of several at a time
Wanted = tuple[int, int]  # number of a prompt among all that are drawn (−1, −2, … of those held out), and of its completion


def dtype_of(plan: Plan) -> torch.dtype:
    return torch.bfloat16 if plan.train.half else torch.float32


def model_of(plan: Plan, base: Path | None) -> Decoder:
    """A whole model for a generator, as it is before the first weights come: what does not travel, as the base of adapters, stays so."""
    with torch.device("meta"):
        model = Decoder(plan.model)
    alone = plan.aligned.but(**{f"mesh.{axis}": 1 for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")})
    if plan.align.adapters:
        adapters.adapt(model, alone)
    model.to_empty(device="cpu")
    model.tie()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    assert base is not None
    adapters.load_base(base, alone, [model], 0)
    return model.to(device(plan), dtype_of(plan)).requires_grad_(False).eval()


class Maker:
    """Completions with their rewards."""

    def __init__(self, me: Rank, start: Start) -> None:
        self.me, self.plan, align = me, me.plan, me.plan.align
        tokenizer = start.folder / "tokens" / "tokenizer.json"
        self.coder = Coder(str(tokenizer))
        if self.coder.vocab > me.plan.model.vocab:
            raise Refused(f"{tokenizer} has {self.coder.vocab} tokens, model.vocab={me.plan.model.vocab}; use the model's own")
        self.prompts = prompts.read(digits.align_of(me.plan, start.folder / "tokens"), tokenizer)
        self.order = Order(len(self.prompts.train), me.plan.seed)
        self.model = model_of(me.plan, start.base)
        self.engine = self._engine(self.coder.turn_end(Template(align.template, "align")))
        self.made, self.asked = list[Sample](), time.monotonic()
        self.shelf = start.folder / "served"  # where a server elsewhere finds new weights
        self.judge = None if align.reward == "model" else Judge(align.reward, align.reward_timeout)

    @property
    def held_out(self) -> int:
        """Prompts that are never trained on."""
        return len(self.prompts.held_out)

    @property
    def busy(self) -> bool:
        return self.engine.live + self.engine.waiting > 0

    def _engine(self, end: int) -> Engine | Remote:
        align = self.me.align
        said: dict[str, Any] = {"slots": align.slots, "longest": align.longest, "new_tokens": align.new_tokens, "end": end,
                                "temperature": align.temperature}  # fmt: skip
        if align.generator:
            return Remote(align.generator, **said)
        return Engine(self.model, **said, device=device(self.plan))

    def took(self, version: int) -> None:
        """The model has new weights: the engine, or the server that stands for it, draws from them from now on."""
        if isinstance(self.engine, Engine):
            self.engine.refresh(version)
            return
        shutil.rmtree(self.shelf, ignore_errors=True)
        named = adapters.merged(self.model)
        huggingface.write_model(lambda names: [named[name] for name in names], list(named), self.plan.model, self.me.align.longest,
                                self.shelf, None)  # fmt: skip
        self.engine.load(self.shelf, version)

    def _where(self, prompt: int) -> tuple[Prompts, int]:
        return (self.prompts.train, self.order[prompt]) if prompt >= 0 else (self.prompts.held_out, -1 - prompt)

    def submit(self, wanted: Iterable[Wanted]) -> None:
        for prompt, number in wanted:
            of, place = self._where(prompt)
            digest = hashlib.blake2b(f"{self.plan.seed}/{prompt}/{number}".encode(), digest_size=7).digest()
            self.engine.submit([Request(prompt, number, of.ids[place], int.from_bytes(digest, "big"))])

    def step(self) -> list[Judged]:
        """A token of every completion under way; returns those that have ended of late, with their rewards."""
        self.me.enter("generate")
        self.made += self.engine.step()
        if not self.made or (self.engine.live and time.monotonic() - self.asked < PAUSE):
            return []
        made, self.made, self.asked = self.made, [], time.monotonic()
        return self._judged(made)

    def drain(self) -> Iterator[list[Judged]]:
        """What is under way, to its end; what waits stays waiting."""
        self.engine.paused = True
        while self.engine.live:
            yield self.step()
        self.engine.paused = False

    def run(self) -> list[Judged]:
        """All that is wanted."""
        made = list[Sample]()
        while self.busy:
            self.me.enter("generate")
            made += self.engine.step()
        return self._judged(made)

    def _judged(self, made: Sequence[Sample]) -> list[Judged]:
        if not made or self.judge is None:
            return [Judged(sample, 0.0) for sample in made]
        self.me.enter("score")
        items = []
        for sample in made:
            of, place = self._where(sample.request.prompt)
            said = self.coder.tokenizer.decode(sample.tokens[: -1 if sample.ended else None], skip_special_tokens=False)
            items.append((of.texts[place], said, of.answers[place]))
        told = self.judge.score(items, lambda: self.me.enter("score"))
        return [Judged(sample, *score) for sample, score in zip(made, told, strict=True)]

    def close(self) -> None:
        if self.judge is not None:
            self.judge.close()


def serve(plan: Plan, start: Start) -> bool:
    """A rank that generates for the trainers until they have ended."""
    me = Rank(plan, start)
    maker, line = Maker(me, start), Follow()
    sync = Sync(plan.align, dtype_of(plan), bridge(plan))
    while True:
        if not maker.busy:
            me.enter("queue")
        message = line.hear(0.0 if maker.busy else WAIT)
        if message is None:
            if maker.busy and (made := maker.step()):
                line.tell("made", made)
        elif message[0] == "make":
            maker.submit(message[1])
        elif message[0] == "weights":
            _, version, names, ends = message
            if not plan.align.partial:
                for made in maker.drain():
                    line.tell("made", made)
            me.enter("sync")
            moved = sync.receive(maker.model, names, ends)
            maker.took(version)
            line.tell("loaded", version, moved.checksum)
            me.book()
        else:
            maker.close()
            me.finish()
            return True
