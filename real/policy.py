"""Learning from rewards: PPO and GRPO on completions that the policy itself has written, here or on ranks of their own.

One loop for every placement: take a batch of completions, ask what others say of it, learn, publish the weights. Where completions come
from, and how weights get there, is a source's business.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import Refused
from conf.plan import Plan
from real import digits, objectives, prompts
from real.alignment import STAGE, Alignment, Told
from real.cluster import rank
from real.generator import Maker, Wanted, dtype_of
from real.learner import Network, Rows, rows_of
from real.objectives import Sum
from real.pretrain import Start
from real.roles import Lead, bridge
from real.rollout import Engine
from real.samples import Journal, Judged, Pool
from real.scoring import Scorers
from real.stage import sha256
from real.sync import Moved, Sync, travelling


class Source(Protocol):
    """Where completions come from."""

    held_out: int  # prompts that are never trained on

    @property
    def discarded(self) -> float:
        """Share of completions that were thrown away."""

    def take(self, step: int) -> list[Judged]:
        """The batch of a step, in the order of prompts, on every trainer."""

    def ask(self, wanted: Sequence[Wanted]) -> list[Judged]:
        """These completions, now."""

    def publish(self, version: int) -> Moved:
        """The policy's weights, after so many steps, to where completions are made."""

    def close(self) -> None: ...


class Policy(Alignment):
    """A trainer of the policy, and of its critic."""

    def __init__(self, plan: Plan, start: Start) -> None:
        super().__init__(plan, start)
        align, here = self.align, (self.learning, self.axes, self.timeline, start.base)
        self.policy = Network(*here, adapters=align.adapters, rate=align.learning_rate)
        self.critic = Network(*here, judge=True, rate=align.value_rate) if align.method == "ppo" else None
        self.networks = {"": self.policy} | ({"critic.": self.critic} if self.critic else {})
        self.lead = Lead(plan) if rank() == 0 and plan.roles.trainers != range(plan.ranks) else None
        self.scorers = Scorers(self, self.policy, self.lead)
        self.source: Source = Apart(self) if align.apart else Here(self)
        self.coefficient = torch.tensor(align.beta)  # of the penalty, which may be steered
        self.notes = torch.zeros(3, dtype=torch.float64, device=self.policy.device)  # tokens: clipped, all; divergence

    def beside(self) -> dict[str, Tensor]:
        return {"align.coefficient": self.coefficient}

    def begin(self) -> None:
        self.source.publish(self.done)
        if self.done == 0:
            self._evaluate()

    def end(self) -> None:
        self._evaluate()

    def close(self) -> None:
        self.source.close()
        if self.lead is not None:
            self.lead.close()

    # -- a step

    def step(self, step: int) -> Told:
        found = self.source.take(step)
        self.timeline.enter("data")
        rows = self._advantages(self._scored(_rows(found, self.policy.even)), found)
        self.notes.zero_()
        losses = list[tuple[float, float]]()
        values = list[float]()
        share = len(rows) // self.align.updates
        for update in range(self.align.updates):
            part = rows.take(slice(update * share, (update + 1) * share))
            number, mine = step * self.align.updates + update, self.policy.mine(part)
            losses.append(self.policy.learn(mine, self._loss, self._count(part), number))
            if self.critic:
                tokens = max(1.0, float(part.mask.sum()))
                values.append(self.critic.learn(mine, self._value_loss, tokens, number, self.critic.judged())[0])
        moved = self.source.publish(step + 1)
        return self._told(step, found, rows, losses, values, moved)

    def _scored(self, rows: Rows) -> Rows:
        """With what the reference, the reward model, the critic and the policy as it is now say of them."""
        align, temperature = self.align, self.align.temperature
        if self.align.anchored:
            rows = rows.beside_them(reference=self.scorers.reference(rows))
        if align.reward == "model":
            rows = rows.beside_them(reward=self.scorers.rewards(rows))
        if self.critic:
            mine = self.critic.mine(rows)
            rows = rows.beside_them(value=self.critic.everyone(self.critic.asked(self.critic.values, mine, "score"), rows))
        if align.correction == "none":
            return rows.beside_them(old=rows["behaviour"])
        logp = self.policy.asked(lambda micro: self.policy.logp(micro, temperature), self.policy.mine(rows), "logprob")
        old, most = self.policy.everyone(logp, rows), align.truncate if align.correction == "truncated" else math.inf
        return rows.beside_them(old=old, weight=objectives.truncated(old, rows["behaviour"], most))

    def _advantages(self, rows: Rows, found: Sequence[Judged]) -> Rows:
        """What the loss needs of the rewards; completions without one count for nothing."""
        align, reward = self.align, rows["reward"] if "reward" in rows else torch.tensor([judged.reward for judged in found])
        sound = reward.isfinite()
        rows = Rows(rows.tokens, rows.mask * sound.unsqueeze(1), rows.beside | {"reward": reward})
        if align.method == "grpo":
            return rows.beside_them(advantage=objectives.group_advantages(reward, align.group, scaled=align.loss != "dr_grpo"))
        reference = rows["reference"] if self.align.anchored else rows["old"]
        rewards = objectives.shaped(reward.nan_to_num(), rows["old"], reference, rows.mask, float(self.coefficient))
        advantage, returns = objectives.gae(rewards, rows["value"], rows.mask, align.gamma, align.lam)
        advantage = objectives.whitened(advantage, objectives.moments(advantage, rows.mask)).float()
        return rows.beside_them(advantage=advantage, returns=returns)

    def _count(self, rows: Rows) -> float:
        """What the policy's loss is divided by, over all ranks."""
        if self.align.loss in ("dapo", "ppo"):
            return max(1.0, float(rows.mask.sum()))
        sound = max(1, int((rows.mask.sum(1) > 0).sum()))
        return float(sound * (self.align.new_tokens if self.align.loss == "dr_grpo" else 1))

    def _loss(self, rows: Rows) -> Sum:
        align, logp = self.align, self.policy.logp(rows, self.align.temperature)
        old, weight = rows["old"], rows.beside.get("weight", 1.0)
        self._note(rows, logp.detach())
        if align.method == "ppo":
            return objectives.ppo(logp, old, rows["advantage"], rows.mask, align.clip, weight)
        reference = rows["reference"] if self.align.anchored else None
        return objectives.grpo(logp, old, rows["advantage"], rows.mask, align.clip, align.clip_high, align.loss, align.new_tokens,
                               reference, float(self.coefficient), weight)  # fmt: skip

    def _value_loss(self, rows: Rows) -> Sum:
        assert self.critic is not None
        return objectives.value(self.critic.values(rows), rows["value"], rows["returns"], rows.mask, self.align.value_clip)

    # -- what it tells

    def _note(self, rows: Rows, logp: Tensor) -> None:
        advantage = rows["advantage"] if rows["advantage"].dim() == 2 else rows["advantage"].unsqueeze(1)
        clipped = objectives.clipped(logp, rows["old"], advantage, rows.mask, self.align.clip, self.align.clip_high)
        drift = (objectives.kl(logp, rows["reference"], "k1") * rows.mask).sum() if self.align.anchored else torch.zeros_like(clipped.total)
        self.notes += torch.stack((clipped.total, clipped.count, drift))

    def _told(self, step: int, found: Sequence[Judged], rows: Rows, losses: Sequence[tuple[float, float]], values: Sequence[float],
              moved: Moved) -> Told:  # fmt: skip
        clipped, tokens, drift = (self.policy.total(note) for note in self.notes)
        reward, lengths = rows["reward"], rows.mask.sum(1)
        sound = reward[reward.isfinite()]
        kl = drift / max(1.0, tokens)
        self._steer(kl * float(lengths.mean()), len(found))
        told = {"loss": float(np.mean([loss for loss, _ in losses])), "gradient_norm": max(norm for _, norm in losses),
                "reward": float(sound.mean()) if len(sound) else math.nan, "completion_tokens": float(lengths.mean()),
                "clipped": clipped / max(1.0, tokens), "failed": float(len(reward) - len(sound)),
                "staleness": float(max(step - judged.born for judged in found)),
                "staleness_mean": float(np.mean([step - judged.born for judged in found])),
                "discarded": self.source.discarded, "tokens": float(sum(map(_length, found))),
                "sync_bytes": float(moved.bytes), "sync_seconds": moved.seconds}  # fmt: skip
        told |= {"kl": kl} if self.align.anchored else {}
        told |= {"value_loss": float(np.mean(values))} if values else {}
        why = next((judged.why for judged in found if judged.why), "")
        if why:
            self.say(f"step {step + 1}: {told['failed']:.0f} completions have no reward: {why}")
        drifted = f"  KL {kl:.4f}" if self.align.anchored else ""
        return Told(told, f"reward {told['reward']:.3f}  {told['completion_tokens']:.1f} tokens{drifted}")

    def _steer(self, kl: float, samples: int) -> None:
        if self.align.kl_target is not None and self.align.anchored:
            horizon = 100 * samples
            self.coefficient.fill_(objectives.steered(float(self.coefficient), kl, self.align.kl_target, samples, horizon))

    def _evaluate(self) -> None:
        """Mean reward of completions of prompts that are never trained on."""
        count = min(self.plan.train.evaluate_sequences, self.source.held_out)
        if not count:
            return
        found = self.source.ask([(-1 - i, 0) for i in range(count)])
        rewards = [judged.reward for judged in found]
        if self.align.reward == "model":
            filled = [found[i % count] for i in range(count + -count % self.learning.dp)]  # every trainer has as many
            rewards = self.scorers.rewards(_rows(filled, self.policy.even)).tolist()[:count]
        sound = [reward for reward in rewards if math.isfinite(reward)]
        value = float(np.mean(sound)) if sound else math.nan
        if rank() == 0:
            self.record.observe(STAGE, "held_out_reward", value, self.done)
        self.say(f"held-out reward {value:.3f} on {count} prompts after step {self.done}")


def _rows(found: Sequence[Judged], even: int) -> Rows:
    """Completions behind their prompts, with the log-probabilities that their tokens had when they were drawn."""
    tokens = [[*judged.sample.request.ids, *judged.sample.tokens] for judged in found]
    asked = [len(judged.sample.request.ids) for judged in found]
    rows = rows_of(tokens, [np.arange(len(ids)) >= first for ids, first in zip(tokens, asked, strict=True)], even)
    behaviour = torch.zeros_like(rows.mask)
    for row, (judged, first) in enumerate(zip(found, asked, strict=True)):
        behaviour[row, first - 1 : first - 1 + len(judged.sample.logp)] = torch.tensor(judged.sample.logp)
    return rows.beside_them(behaviour=behaviour)


class Here:
    """Every trainer generates its share of a batch before all train on it."""

    def __init__(self, trainer: Policy) -> None:
        self.trainer, align = trainer, trainer.align
        self.maker = Maker(trainer, trainer.start)
        self.held_out = self.maker.held_out
        self.sync = Sync(align, dtype_of(trainer.plan))
        self.wanted = [(number // align.group, number % align.group) for number in range(align.sequences)]
        self.index, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @property
    def discarded(self) -> float:
        return 0.0

    def take(self, step: int) -> list[Judged]:
        first = step * self.trainer.align.prompts
        return self.ask([(first + prompt, number) for prompt, number in self.wanted])

    def ask(self, wanted: Sequence[Wanted]) -> list[Judged]:
        engine, offload = self.maker.engine, self.trainer.align.offload
        assert isinstance(engine, Engine)
        if offload:
            engine.wake()
        self.maker.submit(one for one in wanted if one[0] % self.size == self.index)
        made = self.maker.run()
        if offload:
            engine.sleep()
        parts: list[list[Judged]] = [made] * self.size
        if dist.is_initialized():
            self.trainer.timeline.enter("idle")  # until the last of them has finished
            dist.all_gather_object(parts, made)
        return in_order([judged for part in parts for judged in part], wanted)

    def publish(self, version: int) -> Moved:
        with self.trainer.timeline.during("sync"):
            moved = self.sync.send(self.trainer.policy.model, self.maker.model)
            self.maker.took(version)
        return moved

    def close(self) -> None:
        self.maker.close()


class Apart:
    """Ranks of their own generate; the first trainer keeps what they have made, in memory and in a journal, and gives it out."""

    def __init__(self, trainer: Policy) -> None:
        self.trainer, plan, align = trainer, trainer.plan, trainer.align
        self.lead, self.generators = trainer.lead, plan.roles.generators
        self.sync = Sync(align, dtype_of(plan), bridge(plan) if self.lead else None, lead=self.lead is not None)
        self.pool = Pool(align.prompts, align.group, align.lag, align.steps, align.stale == "discard" and align.placement == "async")
        self.journal = Journal(trainer.start.folder / f"samples-{self._origin()}.jsonl") if self.lead else None
        self.asked = dict[Wanted, Judged]()  # what was made for an evaluation
        folder = trainer.start.folder / "tokens"
        self.held_out = len(prompts.read(digits.align_of(plan, folder), folder / "tokenizer.json").held_out)
        self.recalled = False

    def _origin(self) -> str:
        """Digest of what completions are made of: another file of prompts, tokenizer or base has a journal of its own."""
        start, plan = self.trainer.start, self.trainer.plan
        folder = start.folder / "tokens"
        file = digits.align_of(plan, folder).data
        told = f"{sha256(Path(file or ''))} {sha256(folder / 'tokenizer.json')} {plan.align.template} {start.base}"
        return hashlib.blake2b(told.encode(), digest_size=5).hexdigest()

    @property
    def discarded(self) -> float:
        return self.pool.discarded / max(1, self.pool.group * len(self.pool.used))

    def take(self, step: int) -> list[Judged]:
        return self._given(lambda: self._batch(step))

    def _batch(self, step: int) -> list[Judged]:
        """A batch as soon as it is whole; what may be begun then is given out."""
        assert self.lead is not None and self.journal is not None
        if not self.recalled:
            self._recall(step)
        self._give(self.pool.missing(self.pool.admit(step)))
        used = set(self.pool.used)
        while True:
            discarded = self.pool.discarded
            if (found := self.pool.take(step)) is not None:
                self.journal.took(step, self.pool.used - used, self.pool.discarded)
                self.pool.forget()
                return found
            if self.pool.discarded != discarded:
                self._give(self.pool.missing(self.pool.admit(step)))
            self._hear()

    def _recall(self, step: int) -> None:
        """What an earlier life accepted is not made again; what it had only begun is."""
        assert self.journal is not None
        found = self.journal.recall(self.pool, step)
        self.recalled = True
        if found:
            self.trainer.say(f"{found} completions of {self.journal.path} are used again")
        self._give(self.pool.missing(range(self.pool.begun)))

    def _give(self, wanted: Iterable[Wanted]) -> None:
        """To the generators, prompt by prompt in turn, so that who makes what is the same in every run."""
        assert self.lead is not None
        shares = defaultdict[int, list[Wanted]](list)
        for prompt, number in wanted:
            shares[self.generators[prompt % len(self.generators)]].append((prompt, number))
        for generator, share in shares.items():
            self.lead.tell(generator, "make", share)

    def _hear(self) -> list[tuple[int, int]]:
        """Keep what was made; returns which generators have loaded weights of which checksum."""
        assert self.lead is not None and self.journal is not None
        loaded = list[tuple[int, int]]()
        for generator, message in self.lead.hear():
            if message[0] == "loaded":
                loaded.append((generator, message[2]))
                continue
            judged = message[1]
            self.asked |= {(one.sample.request.prompt, one.sample.request.number): one for one in judged if one.sample.request.prompt < 0}
            self.journal.write([one for one in judged if one.sample.request.prompt >= 0 and self.pool.accept(one)])
        if self.trainer.timeline.state != "sync":
            self.trainer.enter("queue")
        return loaded

    def ask(self, wanted: Sequence[Wanted]) -> list[Judged]:
        def made() -> list[Judged]:
            self.asked = {}
            self._give(wanted)
            while len(self.asked) < len(wanted):
                self._hear()
            return [self.asked[one] for one in wanted]

        return self._given(made)

    def publish(self, version: int) -> Moved:
        model = self.trainer.policy.model
        with self.trainer.timeline.during("sync"):
            if self.lead is not None:
                self.lead.tell_all("weights", version, *travelling(model, self.trainer.align))
            moved = self.sync.send(model)
            if self.lead is not None:
                left = set(self.generators)
                while left:
                    for generator, told in self._hear():
                        if told != moved.checksum:
                            raise Refused(f"rank {generator} holds other weights than the trainers after version {version}: checksum "
                                          f"{told:x}, not {moved.checksum:x}; set align.sync=per_tensor to find where")  # fmt: skip
                        left.discard(generator)
                    self.trainer.enter("sync")
        return moved

    def _given(self, work: Callable[[], list[Judged]]) -> list[Judged]:
        """What the first trainer finds, on every trainer."""
        self.trainer.timeline.enter("queue")
        told: list[list[Judged]] = [work() if self.lead is not None else []]
        if dist.is_initialized():
            dist.broadcast_object_list(told, 0)
        return told[0]

    def close(self) -> None:
        """Its generators end with the trainer's other ranks."""


def in_order(found: Iterable[Judged], wanted: Sequence[Wanted]) -> list[Judged]:
    held = {(judged.sample.request.prompt, judged.sample.request.number): judged for judged in found}
    return [held[one] for one in wanted]


def _length(judged: Judged) -> int:
    """Tokens of prompt and completion."""
    return len(judged.sample.request.ids) + len(judged.sample.tokens)
