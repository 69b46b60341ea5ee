"""Published steps of reinforcement learning predicted from rows that say in words what was run: model, GPUs, placement, lengths, batch and,
in their notes, precision and the meshes of generation and training.

What a row does not say is NeMo-RL's way of it (its performance recipes, examples/configs/recipes/llm/performance): GRPO with log-probabilities
of policy and reference, prompts in the longest length, sequences packed into rows of that length, everything recomputed, optimizer
states sharded; apart, half of the GPUs generate, and new weights interrupt what they write.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from analysis.rows import Unplayable, part_of, word
from analysis.words import narrowest
from conf.arithmetic import flops_per_token
from conf.plan import Plan
from conf.program import load
from sim.align import Lived, live

MODELS = (
    (r"llama-?3\.1[-_]?8b", "llama3_8b"), (r"deepseek[- ]?v3", "deepseek_v3"), (r"qwen3-235b", "qwen3_235b_a22b"),
    (r"qwen3-30b-?a?3", "qwen3_30b_a3b"), (r"qwen3-32b", "qwen3_32b"),
)  # fmt: skip
PROMPT = 117  # tokens of a prompt of OpenMathInstruct-2: what tokens a second, GPUs and step time leave over the average length
SIGMA = 0.7
SLOTS = 1024  # vLLM's max_num_seqs on devices of 70 GB and more


class Rolled(NamedTuple):
    """A row's plan with the window that was lived."""

    plan: Plan
    lived: Lived

    @property
    def step_time(self) -> float:
        return self.lived.step_time

    @property
    def rate(self) -> float:
        """Tokens trained on a second and GPU."""
        return self.lived.tokens / self.lived.steps / self.lived.step_time / self.plan.ranks

    @property
    def ideal(self) -> float:
        """Seconds in which the peak would do the training's arithmetic."""
        plan = self.plan
        flops = self.lived.tokens / self.lived.steps * float(flops_per_token(plan.model, plan.align.longest))
        return flops / (plan.ranks * (plan.gpu.peak("bf16") or float("nan")))


def rolled(row: Mapping[str, Any]) -> Rolled:
    """A row's plan, lived.

    Raises Unplayable with what it does not say.
    """
    said = tuple(word(row, name) for name in ("model sizes", "gpus", "placement", "algo", "seq lens", "batch", "note"))
    return _rolled(said)


@cache
def _rolled(said: tuple[str, ...]) -> Rolled:
    model, gpus, placement, _, lengths, batch, note = said
    plan = _plan(model, gpus, placement, lengths, batch, note)
    return Rolled(plan, live(plan, _packed(plan, lengths)))


def _plan(model: str, gpus: str, placement: str, lengths: str, batch: str, note: str) -> Plan:
    name = next((words for pattern, words in MODELS if re.search(pattern, model, re.IGNORECASE)), None)
    if name is None:
        raise Unplayable(f"model={model} is not in conf/model")
    gpu, cluster = part_of({"gpu": note})
    count, longest, mean = _number(r"\d+", gpus, "gpus"), _number(r"max ([\d,]+)", lengths, "its longest"), _number(r"avg ([\d,]+)", lengths, "its average length")
    drawn, trained = _number(r"G-GBS ([\d,]+)", batch, "its batch"), _number(r"T-GBS ([\d,]+)", batch, "its training batch")
    group = 32 if drawn >= 2048 else 16
    tp, _ = _list(note, "gen")
    mesh = _list(note, "train")
    apart = "async" in placement or "disaggregated" in placement
    server = base(gpu, cluster).cluster.gpus_per_node
    words = (f"model={name}", f"cluster.nodes={count // server}", f"mesh.tp={mesh[0]}", f"mesh.cp={mesh[1]}", f"mesh.ep={mesh[2]}", f"mesh.pp={mesh[-1]}",
             "align=grpo", f"align.prompts={drawn // group}", f"align.group={group}", f"align.updates={max(1, drawn // trained)}",
             f"align.prompt_tokens={PROMPT}", f"align.new_tokens={longest - PROMPT}", f"align.mean_tokens={min(mean, longest - PROMPT)}",
             f"align.sigma={SIGMA}", f"align.slots={SLOTS}", "align.micro_batch=1", "align.reference=model", "align.beta=0.01",
             "align.correction=truncated", f"align.engine_tp={tp}", "align.sync=full",
             f"align.placement={('async' if 'async' in placement else 'disaggregated') if apart else 'colocated'}", "align.rollout_share=0.5",
             "align.staleness=1", "align.steps=100", "align.offload=true")
    plan = load([f"gpu={gpu}", f"cluster={cluster}", "data=prepared", "tokenizer=llama3", "train=large", "train.compile=true", "mesh.zero=1", "train.recompute=full",
                 f"train.precision={narrowest(note.split(';')[0].split()[1])}", *words], rules=lambda _: [])
    return plan


@cache
def base(gpu: str, cluster: str) -> Plan:
    return load([f"gpu={gpu}", f"cluster={cluster}", "data=prepared", "tokenizer=llama3", "train=large", "train.compile=true", "mesh.zero=1", "train.recompute=full"], rules=lambda _: [])


def _packed(plan: Plan, lengths: str) -> Plan:
    twin, align = plan.aligned, plan.align
    tokens = align.sequences / align.updates * (align.mean_tokens + PROMPT)
    rows = -(-int(tokens / align.longest / 0.95) // twin.dp) * twin.dp
    return twin.but(train=twin.train.but(seq_len=align.longest, global_batch=rows, micro_batch=1))


def _number(pattern: str, said: str, what: str) -> int:
    found = re.search(pattern, said)
    if found is None:
        raise Unplayable(f"{what} is not said")
    return int(found[found.lastindex or 0].replace(",", ""))


def _list(note: str, kind: str) -> list[int]:
    found = re.search(rf"{kind}\[[^\]]*\]=\[([^\]]*)\]", note)
    if found is None:
        raise Unplayable(f"the mesh of {kind} is not said")
    return [int(part) for part in found[1].split(",") if part.strip().isdigit()]
