"""Alignment in the plan: what is learned from preferences or rewards, and which ranks hold which role."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional

from conf.node import NOT_NEGATIVE, POSITIVE, SHARE, Node, say
from conf.units import Bytes, Seconds

PREFERENCES = ("reward", "dpo")  # methods that learn from pairs
ROLLOUTS = ("ppo", "grpo")  # and those that learn from what the model itself writes
LOSSES = {"dpo": ("sigmoid", "ipo", "hinge"), "grpo": ("grpo", "dapo", "dr_grpo"), "ppo": ("ppo",), "reward": ("bradley_terry",)}


@dataclass(kw_only=True)
class Align(Node):
    """Alignment of the model that fine-tuning, pre-training or `start` leaves; with method none the stage is off."""

    method: str = say(
        "none = no alignment; reward = a reward model of pairs; dpo = preferences without one; ppo, grpo = rewards of what it writes",
        must=("none", *PREFERENCES, *ROLLOUTS),
    )
    loss: str = say("the method's variant: sigmoid, ipo or hinge of dpo; grpo, dapo or dr_grpo of grpo",
                    must=tuple(name for names in LOSSES.values() for name in names))  # fmt: skip
    data: Optional[str] = say(
        "JSON Lines file: prompt, chosen and rejected for reward and dpo; question and answer for ppo and grpo; digits = our own task"
    )
    template: str = say("how messages become text: plain, chatml, llama3, bare, or a file of a Jinja chat template")
    held_out: float = say("share of prompts kept for evaluation", must=SHARE)
    steps: int = say("optimizer steps of preferences; of rollouts the batches of prompts, each trained on `updates` times", must=POSITIVE)
    prompts: int = say("pairs, or prompts, of a step", must=POSITIVE)
    group: int = say("completions that are drawn of each prompt (ppo, grpo)", must=POSITIVE)
    updates: int = say("optimizer steps that a batch of completions is cut into (ppo, grpo)", must=POSITIVE)
    micro_batch: int = say("sequences a rank trains on at once; even for pairs", must=POSITIVE)
    prompt_tokens: int = say("most tokens of a prompt; longer ones are left out", must=POSITIVE)
    new_tokens: int = say("most tokens of a completion", must=POSITIVE)
    learning_rate: float = say("highest learning rate", must=POSITIVE)
    warmup: int = say("steps until it is reached", must=NOT_NEGATIVE)
    tune: str = say("full = every parameter is trained; lora = adapters on a frozen base", must=("full", "lora"))
    rank: int = say("rank r of the adapters", must=POSITIVE)
    alpha: float = say("adapters are scaled by alpha / rank", must=POSITIVE)
    targets: list[str] = say("matrices of every block that get adapters, by their names, as in [q_proj,v_proj]")
    reference: str = say(
        "what the policy is held to: none; model = a copy of the start; adapter_off = the base of its adapters; precomputed = asked once",
        must=("none", "model", "adapter_off", "precomputed"),
    )
    beta: float = say("weight of the reference: β of dpo, coefficient of the KL penalty of ppo and grpo", must=NOT_NEGATIVE)
    kl_target: Optional[float] = say("KL a completion that the penalty's weight is steered to; null = it stays", must=POSITIVE)
    clip: float = say("ratios of policies are clipped below 1 − clip", must=POSITIVE)
    clip_high: float = say("and above 1 + clip_high", must=POSITIVE)
    gamma: float = say("discount of rewards (ppo)", must=SHARE)
    lam: float = say("λ of generalised advantages (ppo)", must=SHARE)
    value_clip: float = say("values are clipped to so far from the old ones (ppo)", must=POSITIVE)
    value_rate: float = say("learning rate of the critic (ppo)", must=POSITIVE)
    correction: str = say(
        "for samples of an older policy: none = behaviour log-probabilities in the ratio; truncated, decoupled = weights beside it",
        must=("none", "truncated", "decoupled"),
    )
    truncate: float = say("largest such weight", must=POSITIVE)
    reward: str = say("gsm8k, digits, model (a reward model of align.reward_model), or FILE.py:FUNCTION of (prompt, completion, answer)")
    reward_model: Optional[str] = say("folder of a run whose alignment trained a reward model")
    reward_timeout: Seconds = say("time after which a reward function is given up, and its sample with it", must=POSITIVE)
    placement: str = say(
        "colocated = every rank does all in turn; split_ref = reference and reward on ranks of their own; disaggregated = generation on "
        "ranks of its own, in step; async = the same with a queue between them",
        must=("colocated", "split_ref", "disaggregated", "async"),
    )
    rollout_share: float = say("share of the ranks that generate (disaggregated, async)", must=SHARE)
    score_share: float = say("share of the ranks that hold reference and reward (split_ref)", must=SHARE)
    staleness: int = say("most updates of the weights between the start of a sample and its training (async)", must=NOT_NEGATIVE)
    stale: str = say("pace = no sample is begun that could grow too old; discard = those too old are thrown away", must=("pace", "discard"))
    partial: bool = say("whether new weights interrupt what is being generated, which then goes on with them (async)")
    slots: int = say("completions that a generator works on at once", must=POSITIVE)
    temperature: float = say("temperature of sampling", must=POSITIVE)
    engine_tp: int = say("ranks of one generator", must=POSITIVE)
    generator: Optional[str] = say("address of a server with vLLM's OpenAI-compatible API that generates instead; null = our own")
    offload: bool = say("whether what a role does not need leaves the device while another works (colocated)")
    sync: str = say(
        "how new weights reach generators: full = in buckets; per_tensor; sharded = unit by unit; adapters alone; delta = what changed",
        must=("full", "per_tensor", "sharded", "adapters", "delta"),
    )
    bucket: Bytes = say("bytes of a bucket", must=POSITIVE)
    mean_tokens: Optional[float] = say(
        "mean length of completions that sim expects, of a lognormal cut at new_tokens; null = half of new_tokens", must=POSITIVE
    )
    sigma: float = say("standard deviation of the logarithm of the length", must=NOT_NEGATIVE)
    growth: float = say("share by which completions grow in a hundred steps", must=NOT_NEGATIVE)
    source: str = say("where the numbers come from")

    @property
    def adapters(self) -> bool:
        return self.tune == "lora"

    @property
    def rollouts(self) -> bool:
        """Whether it trains on what it generates."""
        return self.method in ROLLOUTS

    @property
    def anchored(self) -> bool:
        """Whether a step asks the reference: preferences always do, rollouts where the answer weighs anything."""
        return self.reference != "none" and (self.method == "dpo" or (self.rollouts and self.beta > 0))

    @property
    def apart(self) -> bool:
        """Whether generation has ranks of its own."""
        return self.rollouts and self.placement in ("disaggregated", "async")

    @property
    def lag(self) -> int:
        """Most updates between the start of a sample and its training: 0 where generation waits for the trainer."""
        return self.staleness if self.placement == "async" else 0

    @property
    def sequences(self) -> int:
        """Sequences of a step: two of each pair, or every completion."""
        return self.prompts * (2 if self.method in PREFERENCES else self.group)

    @property
    def expected(self) -> float:
        """Mean tokens of a completion that sim expects."""
        return self.new_tokens / 2 if self.mean_tokens is None else self.mean_tokens

    @property
    def longest(self) -> int:
        return self.prompt_tokens + self.new_tokens


class Roles(NamedTuple):
    """Which ranks hold which role; actor and critic are trained on the same."""

    trainers: range
    generators: range
    scorers: range  # of reference and reward


def roles(align: Align, ranks: int) -> Roles:
    """Trainers first, then whoever has ranks of its own.

    >>> from conf.program import load
    >>> align = load(["align=grpo"]).align
    >>> roles(align.but(placement="async", rollout_share=0.25), 8)
    Roles(trainers=range(0, 6), generators=range(6, 8), scorers=range(0, 6))
    """
    everyone = range(ranks)
    if align.apart:
        first = ranks - round(align.rollout_share * ranks)
        return Roles(range(first), range(first, ranks), range(first))
    if align.placement == "split_ref" and align.method != "reward":
        first = ranks - round(align.score_share * ranks)
        return Roles(range(first), range(first), range(first, ranks))
    return Roles(everyone, everyone, everyone)


def problems(align: Align, ranks: int, one: int) -> list[str]:
    """What an alignment breaks by itself, on so many ranks of which `one` hold a model: key and value, rule, cure."""
    return [*_roles(align, ranks, one), *_method(align), *_rollouts(align)]


def _roles(align: Align, ranks: int, one: int) -> Iterator[str]:
    """Ranks enough for every role."""
    share = "rollout_share" if align.apart else "score_share"
    trainers, generators, scorers = (len(role) for role in roles(align, ranks))
    if not trainers or not generators or not scorers:
        have = f"align.placement={align.placement} with align.{share}={getattr(align, share)} leaves a role none of {ranks} ranks"
        yield f"{have}; set cluster.gpus_per_node={max(2, ranks)} and a share that leaves some on either side, or align.placement=colocated"
    elif trainers % one:
        have = f"align.placement={align.placement} leaves {trainers} ranks to train, no multiple of mesh.tp × mesh.cp × mesh.pp = {one}"
        yield f"{have}; set another align.{share}, or lower mesh.tp"
    elif generators % align.engine_tp:
        yield f"align.engine_tp={align.engine_tp} must divide the {generators} ranks that generate; set align.engine_tp=1"
    elif align.generator and align.apart and generators > 1:
        yield f"align.generator={align.generator}: one rank speaks with a server, here {generators} would; lower align.rollout_share"
    if align.method in PREFERENCES and align.placement not in ("colocated", "split_ref"):
        yield f"align.placement={align.placement}: {align.method} generates nothing; set align.placement=colocated or split_ref"


def _method(align: Align) -> Iterator[str]:
    """A method's own rules."""
    method, losses = align.method, LOSSES[align.method]
    if align.loss not in losses:
        yield f"align.loss={align.loss} is none of {method}; set align.loss={' or '.join(losses)}"
    if align.adapters and method == "reward":
        yield "align.tune=lora: a reward model is trained whole, its score and all; set align.tune=full"
    if align.adapters and not align.targets:
        yield "align.targets=[] leaves nothing to train; name matrices, as in align.targets=[q_proj,v_proj]"
    if align.reference == "adapter_off" and not align.adapters:
        yield "align.reference=adapter_off is the base without its adapters, but align.tune=full has none; set align.tune=lora"
    if align.reference == "precomputed" and method != "dpo":
        yield f"align.reference=precomputed is for pairs that are known beforehand, not for {method}; set align.reference=model"
    if method == "dpo" and align.reference == "none":
        yield "align.reference=none: dpo measures preferences against a reference; set align.reference=model"
    if align.sync == "adapters" and not align.adapters:
        yield "align.sync=adapters sends adapters, but align.tune=full has none; set align.tune=lora, or align.sync=full"
    if method in PREFERENCES and align.micro_batch % 2:
        yield f"align.micro_batch={align.micro_batch} cuts a pair in two; set an even one"
    if method == "grpo" and align.group < 2:
        yield f"align.group={align.group}: a completion is measured against the others of its prompt; set align.group=8"


def _rollouts(align: Align) -> Iterator[str]:
    """Rules of completions and their rewards."""
    if align.kl_target is not None and (align.beta == 0 or align.reference == "none"):
        yield f"align.kl_target={align.kl_target} steers a penalty that there is none of; set align.beta=0.02 align.reference=model"
    if align.rollouts and align.sequences % align.updates:
        yield f"align.updates={align.updates} must divide the {align.sequences} completions of a step (align.prompts × align.group)"
    if align.rollouts and align.expected > align.new_tokens:
        yield f"align.mean_tokens={align.mean_tokens} is above align.new_tokens={align.new_tokens}, which no completion passes; lower it"
    if align.generator and not align.apart:
        yield "align.generator names a server, which generates apart from the trainers; set align.placement=disaggregated or async"
    if align.reward == "model" and align.reward_model is None and align.rollouts:
        yield "align.reward=model needs align.reward_model=FOLDER, a run whose alignment trained one (align=reward)"
