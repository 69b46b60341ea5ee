"""Published steps of reinforcement learning predicted from rows that say in words what was run: model, GPUs, placement, lengths and batch,
and in their notes precision and the meshes of generation and training.

What a row of NeMo-RL does not say follows from its performance recipes (OpenRLHF's rows are in openrlhf.py): GRPO with log-probabilities
of policy and reference, 32 completions a prompt or 16 of large models, prompts within the longest length, sequences packed into rows of
that length, everything recomputed, optimizer states sharded over the replicas and moved to the host while others work; apart, half of the
GPUs generate, and new weights interrupt what is written. So rows are predicted whose naive plan would not fit.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from analysis import openrlhf
from analysis.rows import Unplayable, part_of, word
from analysis.words import BLACKWELL, narrowest
from conf.arithmetic import flops_per_token
from conf.plan import Plan
from conf.program import load
from sim.align import Lived, live

MODELS = (
    (r"llama-?3\.1[-_]?8b", "llama3_8b"), (r"llama-?3\.[13][-_]?70b", "llama3_70b"), (r"deepseek[- ]?v3", "deepseek_v3"),
    (r"qwen3-235b", "qwen3_235b_a22b"), (r"qwen3-30b-?a?3", "qwen3_30b_a3b"), (r"qwen3-32b", "qwen3_32b"), (r"qwen3-8b", "qwen3_8b"),
    (r"qwen3-14b", "qwen3_14b"),
)  # fmt: skip
RECIPE = (
    "data=prepared", "tokenizer=llama3", "train=large", "train.compile=true", "train.recompute=full", "mesh.zero=1", "align=grpo",
    "align.micro_batch=1", "align.reference=model", "align.beta=0.01", "align.correction=truncated", "align.offload=true",
    "align.rollout_share=0.5", "align.staleness=1", "align.steps=100", "align.slots=1024",  # vLLM's max_num_seqs where memory is large
)  # fmt: skip
PROMPT = 117  # tokens of a prompt of OpenMathInstruct-2: what tokens a second × GPUs × step time leave over the average length
SIGMA = 0.6  # spread of the logarithm of lengths, one for all rows; fitted to NeMo-RL v0.5's steps with the constants of sim
PACKED = 0.95  # of a row's length that packing fills
LARGE = 2048  # completions of a step from which there are 32 a prompt


class Rolled(NamedTuple):
    """A row's plan with the window that was lived."""

    plan: Plan
    lived: Lived

    @property
    def tokens(self) -> float:
        """Trained on in a step."""
        return self.lived.tokens / self.lived.steps

    @property
    def ideal(self) -> float:
        """Seconds in which the devices' peak would do the training's arithmetic."""
        plan = self.plan
        return self.tokens * float(flops_per_token(plan.model, plan.align.longest)) / (plan.ranks * (plan.gpu.peak("bf16") or float("nan")))


METRICS: dict[str, Callable[[Rolled], tuple[float, float]]] = {  # predicted, and by the peak alone
    "step_time_s": lambda r: (r.lived.step_time, r.ideal),
    "seconds_per_1024_prompts": lambda r: (r.lived.step_time, r.ideal),
    "gen_s": lambda r: (r.lived.waited / r.lived.steps, r.ideal),
    "tokens/s/GPU": lambda r: (r.tokens / r.lived.step_time / r.plan.ranks, r.tokens / r.ideal / r.plan.ranks),
}


def rolled(row: Mapping[str, Any]) -> tuple[Rolled, float, float]:
    """A row's plan, lived; what it is to be, and what the peak alone would say.

    Raises Unplayable with what the row does not say.
    """
    if word(row, "metric").startswith("weight_sync"):
        raise Unplayable("between which devices weights were sent is not said")
    metric = METRICS.get(word(row, "metric"))
    if metric is None:
        raise Unplayable(f"metric={row['metric']} of a reinforcement learning is not predicted yet")
    if "OpenRLHF" in word(row, "source"):
        one = _played(*(word(row, name) for name in ("model sizes", "gpus", "placement")))
        return one, *metric(one)
    one = _rolled(*(word(row, name) for name in ("model sizes", "gpus", "placement", "algo", "seq lens", "batch", "note")))
    return one, *metric(one)


@cache
def _played(model: str, gpus: str, placement: str) -> Rolled:
    plan = openrlhf.plan_of(model, gpus, placement)
    return Rolled(plan, live(plan))


@cache
def _rolled(model: str, gpus: str, placement: str, algo: str, lengths: str, batch: str, note: str) -> Rolled:
    if "dapo" in algo.lower():
        raise Unplayable("DAPO draws prompts again until enough of them tell something: how often is not said")
    if "grpo" not in algo.lower():
        raise Unplayable(f"algo={algo}: what its software does is not known here")
    plan = _plan(model, gpus, placement, lengths, batch, note)
    return Rolled(plan, live(plan, packed(plan)))


def _plan(model: str, gpus: str, placement: str, lengths: str, batch: str, note: str) -> Plan:
    name = next((option for pattern, option in MODELS if re.search(pattern, model, re.IGNORECASE)), None)
    if name is None:
        raise Unplayable(f"model={model} is not in conf/model")
    gpu, cluster = part_of({"gpu": f"{gpus} {note}".strip()})
    count, drawn = _number(r"(\d+)", gpus, "gpus"), _number(r"G-GBS ([\d,]+)", batch, "its batch")
    longest, mean = _number(r"max ([\d,]+)", lengths, "its longest length"), _number(r"avg ([\d,]+)", lengths, "its average length")
    trained, group = _number(r"T-GBS ([\d,]+)", batch, "its training batch"), 32 if drawn >= LARGE else 16
    base, (tp, *_) = _recipe(name, gpu, cluster, narrowest(note.partition(";")[0])), _mesh("gen", note)
    apart = "async" if "async" in placement else "disaggregated" if "disaggregated" in placement else "colocated"
    late = re.search(r"(\d+)-step", placement)
    sizes = {"prompts": max(1, drawn // group), "group": group, "updates": max(1, drawn // trained), "prompt_tokens": PROMPT,
             "new_tokens": longest - PROMPT, "mean_tokens": float(min(mean, longest - PROMPT)), "engine_tp": tp, "placement": apart,
             "staleness": int(late[1]) if late else 1}  # fmt: skip
    degrees = dict(zip(("tp", "cp", "ep", "pp"), _mesh("train", note), strict=True))
    plan = base.but(align=base.align.but(**sizes), mesh=base.mesh.but(**degrees), cluster=base.cluster.part(count))
    if plan.ranks != count or len(plan.roles.generators) % tp or plan.aligned.ranks != len(plan.roles.trainers):
        raise Unplayable(f"its meshes do not divide gpus={gpus}")
    return plan


@cache
def _recipe(model: str, gpu: str, cluster: str, precision: str) -> Plan:
    """What all rows have; on as many servers as the largest needs, of which each takes its part."""
    words = (f"model={model}", f"gpu={gpu}", f"cluster={cluster}", "cluster.nodes=256", f"train.precision={precision}",
             f"align.sigma={SIGMA}")  # fmt: skip
    plan = load([*RECIPE, *words], rules=lambda _: [])
    return plan.but(gpu=plan.gpu.but(early=gpu in BLACKWELL))  # measured in its first year


def packed(plan: Plan) -> Plan:
    """The plan that is trained: completions with their prompts in rows of the longest length, as many as divide over the replicas."""
    twin, align = plan.aligned, plan.align
    rows = align.sequences / align.updates * (align.expected + align.prompt_tokens) / (PACKED * align.longest)
    return twin.but(train=twin.train.but(global_batch=max(1, round(rows / twin.dp)) * twin.dp))


def _number(pattern: str, said: str, what: str) -> int:
    found = re.search(pattern, said)
    if found is None:
        raise Unplayable(f"{what} is not said")
    return int(found[1].replace(",", ""))


def _mesh(kind: str, note: str) -> list[int]:
    """Degrees of generation (tp, pp) or training (tp, cp, ep, pp): those of training come in lists of five, or of seven whose fourth and
    fifth are ones that no heading names; the last but one is the pipeline's, the last its virtual stages, of which no row has any.

    >>> _mesh("train", "H100 BF16; gen[TP,PP]=[1,1]; train[TP,CP,EP,PP,VPP]=[1,1,1,1,1,2,n/a]")
    [1, 1, 1, 2]
    """
    found = re.search(rf"{kind}\[[^\]]*\]=\[([^\]]*)\]", note)
    if found is None:
        raise Unplayable(f"the mesh of {kind} is not said")
    said = [int(part) if part.strip().isdigit() else 1 for part in found[1].split(",")]
    return said if kind == "gen" else [*said[:3], said[-2]]
