"""Does cleaning pay? `python -m tests.bench_pays [seeds]`: two models on the same number of tokens, of a raw and of a cleaned corpus.

The raw corpus is what a crawl is like: chapters of a book, half of them again and again with small changes, what menus and lists of real
web pages say, and passages of another book planted 1, 4, 16 and 64 times in frames of other words. The cleaned one is the same through
`data.filter=gopher data.dedup=minhash`. Both are judged on chapters that neither has seen, in bits a byte, and on the planted passages:
how many words go on verbatim after a start of PROMPT words, and their loss beside that of passages of the same book which were not planted.
"""

import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from real.filters import judge
from real.maintext import main_text
from tests import corpora
from tests.bench import foretold
from tests.bench_data import SHARED, web, write_texts

COPIES, EACH = (1, 4, 16, 64), 12
LENGTH, PROMPT, VERBATIM = 120, 30, 20  # words of a passage, of the start that is given, and of what counts as verbatim
ARMS = {"raw": ["data.filter=none", "data.dedup=exact"], "cleaned": ["data.filter=gopher", "data.dedup=minhash"]}
PLAN = ["cluster.gpus_per_node=2", "tokenizer.vocab=1024", "model.vocab=1024", "model.hidden=192", "model.heads=6", "model.ffn=512",
        "train.steps=1200", "train.global_batch=8", "train.micro_batch=4", "train.learning_rate=0.002", "train.evaluate_every=0",
        "train.evaluate_sequences=0", "checkpoint.every=0", "train.warmup=100", "data.held_out=0.001"]  # fmt: skip


class Corpus(NamedTuple):
    raw: list[str]
    planted: dict[int, list[str]]  # by the number of copies
    never: list[str]
    held_out: str


def corpus(seed: int) -> Corpus:
    dice = random.Random(seed)
    peace, species = (sorted((SHARED / "text").glob(f"se_{name}*.tar.gz"))[0] for name in ("leo-tolstoy", "charles-darwin"))
    chapters = [text for _, text in corpora.chapters(peace)]
    kept, held_out = [text for i, text in enumerate(chapters) if i % 12], [text for i, text in enumerate(chapters) if not i % 12]
    words = " ".join(text for _, text in corpora.chapters(species)).split()
    cut = [" ".join(words[at : at + LENGTH]) for at in range(0, len(words) - LENGTH, LENGTH)]
    passages = [passage for passage in cut if judge(passage, "gopher")[1] is None]  # that no rule takes them out: duplication alone may
    dice.shuffle(passages)
    planted = {copies: [passages.pop() for _ in range(EACH)] for copies in COPIES}
    framed = [f"{_frame(dice)}\n{passage}\n{_frame(dice)}" for copies, group in planted.items() for passage in group for _ in range(copies)]
    again = [corpora.edited(text, dice) for text in dice.choices(kept[: len(kept) // 2], k=len(kept))]
    junk = [main_text("tags")(page) for page in web()]
    raw = [*kept, *again, *framed, *junk]
    dice.shuffle(raw)
    return Corpus(raw, planted, [passages.pop() for _ in range(EACH * 4)], "\n".join(held_out))


def _frame(dice: random.Random) -> str:
    return f"Note {dice.randrange(10**4)} of volume {dice.randrange(100)}"


# -- judging


class Judge:
    """A model that was exported, on processor and in evaluation."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @torch.no_grad()
    def bits(self, texts: Sequence[str], window: int = 256) -> float:
        """Bits a byte: every token but a window's first is predicted from those before it in the window."""
        nats, size = 0.0, 0
        for text in texts:
            ids = self.tokenizer.encode(text).ids
            for at in range(0, len(ids), window):
                part = torch.tensor([ids[at : at + window]])
                if part.shape[1] > 1:
                    nats += float(self.model(part, labels=part).loss) * (part.shape[1] - 1)
                    size += len(self.tokenizer.decode(part[0, 1:].tolist()).encode())
        return nats / math.log(2) / size

    @torch.no_grad()
    def verbatim(self, passage: str) -> int:
        """Words of a passage that come back, one after the other, when it is begun."""
        words = passage.split()
        start, rest = " ".join(words[:PROMPT]), words[PROMPT:]
        ids = torch.tensor([self.tokenizer.encode(start).ids])
        room = len(self.tokenizer.encode(" ".join(rest)).ids)
        made = self.model.generate(ids, max_new_tokens=min(room, 256 - ids.shape[1]), do_sample=False, pad_token_id=0)
        said = self.tokenizer.decode(made[0, ids.shape[1] :].tolist()).split()
        same = (one == other for one, other in zip(said, rest, strict=False))
        return next((number for number, alike in enumerate(same) if not alike), min(len(said), len(rest)))


def arm(folder: Path, texts: Path, overrides: Sequence[str], seed: int) -> tuple[Judge, dict[str, Any]]:
    words = [f"data.path={texts}", *PLAN, *overrides, f"seed={seed}"]
    folder.mkdir()
    told = json.loads(foretold("real", "json=true", *words, cwd=folder))["quantities"]
    foretold("real", "export=model", *words, cwd=folder)
    return Judge(folder / "model"), {name: row["value"] for name, row in told.items()}


def pays(seeds: int = 1) -> None:
    torch.set_num_threads(2)
    for seed in range(seeds):
        made = corpus(seed)
        with tempfile.TemporaryDirectory() as name:
            texts = write_texts(Path(name) / "texts", made.raw)
            for what, overrides in ARMS.items():
                model, told = arm(Path(name) / what, texts, overrides, seed)
                each = told["tokens.bytes"] / told["tokens.tokens"]
                print(f"\nseed {seed}, {what}: {told['dedup.documents']:,.0f} of {len(made.raw):,} documents")
                print(f"  {told['tokens.tokens']:,.0f} tokens of {each:.2f} bytes; steps of {told['pretrain.step_time']:.3f} s")
                print(f"  held out: {model.bits([made.held_out]):.3f} bits a byte; never planted: {model.bits(made.never):.3f}")
                for copies, group in made.planted.items():
                    runs = [model.verbatim(passage) for passage in group]
                    print(f"  planted {copies:2} times: {model.bits(group):.3f} bits a byte, {sum(runs) / len(runs):4.1f} words verbatim, "
                          f"{sum(run >= VERBATIM for run in runs)} of {len(runs)} for {VERBATIM} words and more", flush=True)  # fmt: skip


if __name__ == "__main__":
    pays(int((sys.argv[1:] or ["1"])[0]))
