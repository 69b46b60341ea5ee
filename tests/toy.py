"""A task that a laptop learns in seconds, the larger of two digits four times over, and a model that has half learned it from bad notes."""

import json
import random
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from conf.plan import Plan
from conf.program import load
from real import huggingface
from real.bpe import END
from real.initial import initialise
from real.model import Decoder

SHAPE = [
    "model.layers=2",
    "model.hidden=64",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn=128",
    "model.vocab=264",
    "tokenizer.vocab=264",
]
TASK = [*SHAPE, "align.template=bare", "align.reward=digits", "align.prompt_tokens=4", "align.new_tokens=6",
        "align.held_out=0.1", "align.prompts=16", "align.group=8", "align.micro_batch=64", "align.warmup=0", "align.slots=128",
        "train.schedule=constant", "train.weight_decay=0", "train.evaluate_sequences=8", "cluster.cores_per_node=1",
        "checkpoint.every=0"]  # fmt: skip
TRUE = 0.3  # share of the notes' digits that are right


def plan_of(*words: str) -> Plan:
    return load([*TASK, *words])


def tokenizer() -> Tokenizer:
    """A token a byte."""
    vocabulary = {character: number for number, character in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    found = Tokenizer(models.BPE(vocabulary, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found.add_special_tokens([END])
    return found


def questions(path: Path) -> Path:
    rows = [{"question": f"{a}{b}=", "answer": str(max(a, b)) * 4} for a in range(10) for b in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def base(folder: Path, seed: int = 0) -> Path:
    """A model in Hugging Face's layout that was taught with mostly wrong answers."""
    plan, coder = plan_of(), tokenizer()
    named = {name: tensor.clone() for name, tensor in _taught(seed).items()}
    huggingface.write_model(lambda names: [named[name] for name in names], list(named), plan.model, 64, folder, None)
    coder.save(str(folder / "tokenizer.json"))
    return folder


def untaught(folder: Path, *words: str) -> Path:
    """A model of another shape that knows nothing."""
    plan = plan_of(*words)
    model = Decoder(plan.model)
    initialise(model, 0)
    named = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    huggingface.write_model(lambda names: [named[name] for name in names], list(named), plan.model, 64, folder, None)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@cache
def _taught(seed: int) -> dict[str, torch.Tensor]:
    plan, coder, dice = plan_of(), tokenizer(), random.Random(seed)
    torch.set_num_threads(1)
    model = Decoder(plan.model)
    initialise(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(150):
        lines = [_note(dice) for _ in range(64)]
        ids = torch.tensor([[*coder.encode(line).ids, 0] for line in lines])
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits[:, 2:].flatten(0, 1), ids[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _note(dice: random.Random) -> str:
    a, b = dice.randrange(10), dice.randrange(10)
    return f"{a}{b}=" + "".join(str(max(a, b)) if dice.random() < TRUE else str(dice.randrange(10)) for _ in range(4))
