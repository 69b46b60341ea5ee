"""Fine-tuning, executed: conversations → tokens, the training loop on a base that exists, adapters and how to use them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from real import adapters, chats, checkpoint, digits, huggingface, packing, stage
from real.engine import engine

if TYPE_CHECKING:
    from real.life import Life

FOLDER = "finetune"  # of the record, in that of the run
ADAPTER, BASE = "adapter", "base"  # the adapters' folder, and the file that says what they are for


def run(life: Life, home: Path, source: Path | None) -> None:
    """All of it, in the folder of `life`, on the model that lies in `home`, or at `source`.

    Raises Refused where there is no base or no tokenizer.
    """
    plan, tune = life.plan, life.plan.finetune
    base = base_of(home, source)
    if tune.adapters and huggingface.family(plan.model) == "gpt2":
        raise Refused(f"finetune.method={tune.method}: GPT-2 keeps queries, keys and values in one matrix; set finetune.method=full")
    said = life.folder / BASE
    if said.is_file() and said.read_text() != str(base) and checkpoint.complete(life.folder / "checkpoints"):
        raise Refused(f"{life.folder} was begun on {said.read_text()}, this is {base}; name that one with start=")
    write(said, str(base))
    tokenizer = tokenizer_of(base)
    write(life.folder / "tokens" / "tokenizer.json", tokenizer.read_bytes())  # for what begins with the tuned model
    _tokens(life, tokenizer)
    life.train({}, base=base)
    path = checkpoint.complete(life.folder / "checkpoints")[-1]
    if tune.adapters:
        count = adapters.save(path, plan, base, life.folder / ADAPTER)
        life.say(f"adapters: {count:,} parameters in {life.folder / ADAPTER}, as PEFT has them")


def export(home: Path, plan: Plan, target: Path) -> tuple[Path, int]:
    """The tuned model as Hugging Face's folder; returns the checkpoint it is of, and the bytes.

    Raises Refused where there is none, or its base has gone.
    """
    path, _ = checkpoint.find(home)
    base = Path((home / BASE).read_text())
    if not base.is_dir():
        raise Refused(f"{base}, which {path} was trained on, is not there any more; put it back")
    tokenizer = tokenizer_of(base)
    if plan.finetune.adapters:
        return path, adapters.merge(path, plan, base, target, tokenizer)
    return path, huggingface.export(path, plan.model, plan.finetune.seq_len, target, tokenizer)


def base_of(home: Path, source: Path | None) -> Path:
    """The run's own newest checkpoint, else what the user names."""
    if own := checkpoint.complete(home / "checkpoints"):
        return own[-1]
    if source is None:
        raise Refused(f"{home} holds no pre-trained model to fine-tune; run without only=finetune, or name one with start=FOLDER")
    return source if (source / "config.json").is_file() else checkpoint.find(source)[0]


def tokenizer_of(base: Path) -> Path:
    places = [base / "tokenizer.json", *(parent / "tokens" / "tokenizer.json" for parent in base.parents[:3])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise Refused(f"{base} has no tokenizer.json beside it; put the one that the model was trained with into that folder")
    return found


def _tokens(life: Life, tokenizer: Path) -> None:
    """Shards of conversations and the sequences that they are packed into."""
    began, plan, folder = life.record.now(), life.plan, life.folder / "tokens"
    work, shown = list(chats.tasks(digits.tune_of(plan, folder), tokenizer)), life.progress("finetune, tokens")
    with engine(plan) as pool:
        done = stage.run(folder, work, chats.config(plan.finetune), pool, {}, shown)
        packs = packing.tasks(done, ("train", "held_out"), plan.train.seq_len)
        stage.run(folder / "packs", packs, packing.config(plan), pool, {}, shown)
    life.spend("data", "tokens", began)
    c = done.counters
    cut = f", {c['cut']:,.0f} cut at {plan.train.seq_len} tokens" if c["cut"] else ""
    life.say(f"finetune: {c['conversations']:,.0f} conversations, {c['tokens']:,.0f} tokens, {c['learned']:,.0f} of them learned{cut}")
