"""OpenRLHF's published times of 1,024 prompts of PPO as plans.

A row names model, GPUs and who ran it; the rest is in the paper's tables 3 and 4 (Hu et al. 2024, arXiv 2405.11143) and in the project's
benchmark folder: 1,024 tokens of prompt and 1,024 of answer, batches of 128 in bf16 under ZeRO-3, everything recomputed; its code sends
weights parameter by parameter. Actor and critic train beside each other on ranks of their own, here in turn on the ranks of both;
reference and reward model have ranks too, here they are asked on those of the trainers, which are idle then. An engine has no more
requests than actors send it at a time: a micro-batch each. What no plan says is that Adam works on the hosts.
"""

import re
from typing import NamedTuple

from analysis.rows import Unplayable
from conf.plan import Plan
from conf.program import load


class Setup(NamedTuple):
    """GPUs of each role in table 3, and sequences of a micro-batch: of actors that ask (table 3), and in training (benchmark folder)."""

    gpus: int
    actor: int
    critic: int
    scorers: int
    engines: int
    tp: int
    asked: int
    trained: int


SETUPS = {
    "7B": ("llama2_7b", Setup(16, 4, 4, 4, 4, 1, 16, 8)), "13B": ("llama2_13b", Setup(32, 8, 8, 8, 8, 1, 8, 4)),
    "34B": ("llama2_34b", Setup(32, 8, 8, 8, 4, 2, 8, 2)), "70B": ("llama2_70b", Setup(32, 4, 4, 8, 4, 4, 4, 4)),
}  # fmt: skip
PROMPTS, BATCH, LENGTH = 1024, 128, 1024
RECIPE = (
    "gpu=a100_80", "gpu.link_bandwidth='1600 Gbit/s'", "cluster=dgx_a100", "cluster.nodes=8", "data=prepared", "tokenizer=llama3",
    "train=large", "train.recompute=full", "mesh.zero=3", "align=ppo", "align.group=1", "align.reference=model", "align.reward=model",
    "align.beta=0.01", "align.correction=truncated", "align.placement=disaggregated", "align.steps=100", "align.sigma=0",
    "align.sync=per_tensor",
)  # fmt: skip


def plan_of(model: str, gpus: str, placement: str) -> Plan:
    """The plan of a row.

    Raises Unplayable for one that no table describes, or whose software no constants are known of.
    """
    if "DSChat" in placement:
        raise Unplayable("DSChat generates with the trainer's own modules: how long they take on GPUs is not known here")
    if model not in SETUPS or re.match(rf"{SETUPS[model][1].gpus}\b.*A800", gpus) is None:
        raise Unplayable(f"model={model} on {gpus} is in no table of OpenRLHF's paper")
    name, setup = SETUPS[model]
    trainers, generators = setup.actor + setup.critic, setup.engines * setup.tp
    base = load([*RECIPE, f"model={name}"], rules=lambda _: [])
    sizes = {"prompts": PROMPTS, "updates": PROMPTS // BATCH, "micro_batch": setup.trained, "prompt_tokens": LENGTH, "new_tokens": LENGTH,
             "mean_tokens": float(LENGTH), "slots": setup.asked * setup.actor // setup.engines, "engine_tp": setup.tp,
             "rollout_share": generators / (trainers + generators)}  # fmt: skip
    return base.but(align=base.align.but(**sizes), cluster=base.cluster.part(trainers + generators))
