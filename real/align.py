"""Alignment, executed: preferences or prompts → tokens, the ranks in their roles, and what comes of it: adapters, or a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import Refused
from conf.files import write
from conf.plan import Plan
from real import adapters, checkpoint, digits, finetune, huggingface, pairs, prompts, stage
from real.engine import engine
from real.roles import enter
from real.scoring import judge_of

if TYPE_CHECKING:
    from real.life import Life
    from real.pretrain import Start

MODEL = "model"  # folder of the fine-tuned model, its adapters merged, that an alignment begins with


def run(life: Life, home: Path, source: Path | None) -> None:
    """All of it, in the folder of `life`, on the fine-tuned model of `home`, or its pre-trained one, or that at `source`.

    Raises Refused where there is no base or no tokenizer.
    """
    from real.pretrain import Start

    plan, align = life.plan, life.plan.align
    base = base_of(home, source, plan)
    if align.adapters and huggingface.family(plan.model) == "gpt2":
        raise Refused("align.tune=lora: GPT-2 keeps queries, keys and values in one matrix; set align.tune=full")
    judge_of(plan)
    said = life.folder / finetune.BASE
    if said.is_file() and said.read_text() != str(base) and checkpoint.complete(life.folder / "checkpoints"):
        raise Refused(f"{life.folder} was begun on {said.read_text()}, this is {base}; delete that folder to begin anew")
    write(said, str(base))
    tokenizer = finetune.tokenizer_of(base)
    _tokens(life, tokenizer)
    life.record.event("pretrain", "start")
    launched = life.record.now()
    start = Start(life.folder, life.epoch, launched, launched, life.furthest, {}, base=base)
    life.supervise(work, start)
    if align.adapters:
        path = checkpoint.complete(life.folder / "checkpoints")[-1]
        count = adapters.save(path, plan.aligned, base, life.folder / finetune.ADAPTER)
        life.say(f"adapters: {count:,} parameters in {life.folder / finetune.ADAPTER}, as PEFT has them")


def work(plan: Plan, start: Start) -> bool:
    """One rank, in its role; returns whether the stage is done."""
    role = enter(plan)
    if role == "trainer":
        if plan.align.rollouts:
            from real.policy import Policy

            return Policy(plan, start).run()
        from real.preferences import Preferences

        return Preferences(plan, start).run()
    if role == "scorer":
        from real.scoring import serve
    else:
        from real.generator import serve
    return serve(plan, start)


def base_of(home: Path, source: Path | None, plan: Plan) -> Path:
    """What an alignment begins with: what this run has fine-tuned, else what it has trained before, else what the user names."""
    tuned = home / finetune.FOLDER
    if plan.finetune.method != "none" and checkpoint.complete(tuned / "checkpoints"):
        if not plan.finetune.adapters:
            return checkpoint.complete(tuned / "checkpoints")[-1]
        if not (tuned / MODEL).is_dir():
            finetune.export(tuned, plan, tuned / MODEL)
        return tuned / MODEL
    return finetune.base_of(home, source)


def export(home: Path, plan: Plan, target: Path) -> tuple[Path, int]:
    """The aligned model as Hugging Face's folder; returns the checkpoint it is of, and the bytes.

    Raises Refused where there is none, its base has gone, or it is a reward model, for which no family of ours has a layout.
    """
    if plan.align.method == "reward":
        raise Refused("export= writes models that write text; a reward model is used by align.reward_model=FOLDER of its run")
    path, _ = checkpoint.find(home)
    base = Path((home / finetune.BASE).read_text())
    if not base.is_dir():
        raise Refused(f"{base}, which {path} was trained on, is not there any more; put it back")
    tokenizer = finetune.tokenizer_of(base)
    if plan.align.adapters:
        return path, adapters.merge(path, plan.aligned, base, target, tokenizer)
    return path, huggingface.export(path, plan.model, plan.align.longest, target, tokenizer)


def _tokens(life: Life, tokenizer: Path) -> None:
    """Shards of pairs, or the prompts."""
    began, plan, folder = life.record.now(), life.plan, life.folder / "tokens"
    if plan.align.rollouts:
        found = prompts.read(digits.align_of(plan, folder), tokenizer)
        left = f", {found.left_out:,} left out as longer than align.prompt_tokens={plan.align.prompt_tokens}" if found.left_out else ""
        life.say(f"align: {len(found.train):,} prompts to train on, {len(found.held_out):,} held out{left}")
        write(folder / "tokenizer.json", tokenizer.read_bytes())
    else:
        work, shown = list(pairs.tasks(digits.align_of(plan, folder), tokenizer)), life.progress("align, tokens")
        with engine(plan) as pool:
            c = stage.run(folder, work, pairs.config(plan.align), pool, {}, shown).counters
        cut = "".join(f", {c[name]:,.0f} {name}" for name in ("cut", "left out") if c[name])
        life.say(f"align: {c['pairs']:,.0f} pairs, {c['tokens']:,.0f} tokens{cut}")
        if c["pairs"] < plan.align.prompts:
            raise Refused(f"align.data={plan.align.data} gives {c['pairs']:,.0f} pairs, a step takes align.prompts={plan.align.prompts}")
    life.spend("data", "tokens", began)
