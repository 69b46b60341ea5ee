"""What others say of the rows that a policy trains on: its reference, and a reward model; here, or on ranks of their own."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import Refused
from conf.plan import Plan
from real import checkpoint
from real.alignment import Alignment, Rank
from real.cluster import device, rank
from real.learner import Network, Rows
from real.model import Decoder
from real.pretrain import Start
from real.roles import Follow, Lead

WAIT = 0.2  # seconds between two beats of a rank that waits


def last_of(values: Tensor, mask: Tensor) -> Tensor:
    """The number at the last token of each row [N], which the one after its last target's place is."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return values.gather(1, (last + 1).clamp(max=mask.shape[1] - 1).unsqueeze(1)).squeeze(1)


def temperature_of(plan: Plan) -> float:
    """At which all log-probabilities are taken: that of sampling where there is any."""
    return plan.align.temperature if plan.align.rollouts else 1.0


def judge_of(plan: Plan) -> Path | None:
    """The checkpoint of the reward model that the plan names.

    Raises Refused where it holds none.
    """
    folder = plan.align.reward_model if plan.align.rollouts and plan.align.reward == "model" else None
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise Refused(f"align.reward_model={folder} is no folder; name that of a run with align=reward")
    path, _ = checkpoint.find(Path(folder))
    there = checkpoint.shapes(path)
    if "model.score.weight" not in there:
        raise Refused(f"align.reward_model={folder}: {path.name} is no reward model's; name the folder of a run with align=reward")
    with torch.device("meta"):
        model = Decoder(plan.model)
        model.judge()
    for name, parameter in model.named_parameters():
        if there.get(f"model.{name}") != tuple(parameter.shape):
            raise Refused(f"align.reward_model={folder} has {name} of {there.get(f'model.{name}', 'no')} elements, the policy "
                          f"{tuple(parameter.shape)}: another vocabulary or shape; train one on this model with align=reward")  # fmt: skip
    if extra := {name for name in there if name.startswith("model.layers.")} - {f"model.{name}" for name, _ in model.named_parameters()}:
        raise Refused(f"align.reward_model={folder} has {min(extra)}, the policy has no such layer; train one on this model")
    return path


class Scorers:
    """The reference and the reward model, as the trainers ask them."""

    def __init__(self, trainer: Alignment, policy: Network, lead: Lead | None = None) -> None:
        self.trainer, self.policy, plan = trainer, policy, trainer.plan
        self.kind, self.apart = plan.align.reference, plan.roles.scorers != plan.roles.trainers
        self.path, self.temperature = judge_of(plan), temperature_of(plan)
        here = (plan.aligned, trainer.axes, trainer.timeline)
        held = not self.apart and self.kind == "model" and plan.align.anchored
        self.model = Network(*here, trainer.start.base) if held else None
        self.judge = loaded(Network(*here, None, judge=True), self.path) if self.path and not self.apart else None
        self.lead = lead or (Lead(plan) if self.apart and rank() == 0 else None)

    def reference(self, rows: Rows) -> Tensor:
        """Log-probabilities of all rows under the reference, [N, T]; every trainer gets all of them."""
        if self.apart and self.kind == "model":
            return self._remote("reference", rows)
        if self.kind == "adapter_off":
            with self.policy.unadapted():
                return self._logp(self.policy, rows)
        assert self.model is not None
        return self._logp(self.model, rows)

    def _logp(self, network: Network, rows: Rows) -> Tensor:
        return network.everyone(network.asked(lambda micro: network.logp(micro, self.temperature), network.mine(rows), "score"), rows)

    def rewards(self, rows: Rows) -> Tensor:
        """The reward model's number of every row, [N]."""
        if self.apart:
            return self._remote("rewards", rows)
        assert self.judge is not None
        mine = self.judge.mine(rows)
        return self.judge.everyone(last_of(self.judge.asked(self.judge.values, mine, "score"), mine.mask), rows)

    def _remote(self, what: str, rows: Rows) -> Tensor:
        """The first trainer asks the scorers, each for a share of the rows, and tells the others."""
        found = torch.zeros(rows.mask.shape if what == "reference" else (len(rows),))
        if self.lead is not None:
            self.trainer.timeline.enter("idle")
            ranks = self.trainer.plan.roles.scorers
            each = -(-len(rows) // len(ranks))
            starts = range(0, len(rows), each)
            for one, begin in zip(ranks, starts, strict=False):
                part = rows.take(slice(begin, begin + each))
                self.lead.tell(one, what, begin, part.tokens.numpy(), part.mask.numpy())
            left = len(starts)
            while left:
                for _, (_, first, told) in self.lead.hear(WAIT):
                    found[first : first + len(told)] = torch.from_numpy(told)
                    left -= 1
                self.trainer.enter("idle")
        if dist.is_initialized():
            with self.trainer.timeline.during("idle"):
                dist.broadcast(found, 0)
        return found

    def close(self) -> None:
        if self.lead is not None and self.apart:
            self.lead.close()


def loaded(network: Network, path: Path) -> Network:
    """A reward model from its checkpoint."""
    named = {f"model.{name}": p.detach() for name, p in network.model.named_parameters()}
    checkpoint.read(named, path)
    return network


def serve(plan: Plan, start: Start) -> bool:
    """A rank that scores for the trainers until they have ended: it holds the reference and the reward model whole."""
    me, align = Rank(plan, start), plan.align
    alone = plan.aligned.but(**{f"mesh.{axis}": 1 for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")})
    with me.timeline.during("load"):
        path = judge_of(plan)
        reference = Network(alone, None, me.timeline, start.base) if align.anchored and align.reference == "model" else None
        judge = loaded(Network(alone, None, me.timeline, None, judge=True), path) if path else None
    line = Follow()
    me.enter("idle")
    while True:
        message: Any = line.hear(WAIT)
        if message is None:
            me.enter("idle")
            continue
        if message[0] == "end":
            me.finish()
            return True
        what, first, tokens, mask = message
        rows = Rows(torch.from_numpy(tokens), torch.from_numpy(mask)).to(device(plan))
        if what == "reference":
            assert reference is not None
            told = reference.asked(partial(reference.logp, temperature=temperature_of(plan)), rows, "score")
        else:
            assert judge is not None
            told = last_of(judge.asked(judge.values, rows, "score"), rows.mask)
        line.tell(what, first, told.cpu().numpy())
        me.book()
