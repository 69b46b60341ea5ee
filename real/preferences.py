"""Learning from preferences: DPO, and reward models. A pair is two rows, the chosen one first; a loss looks at both."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conf.files import commit
from conf.plan import Plan
from real import parallel
from real.alignment import STAGE, Alignment, Told
from real.cluster import rank
from real.data import Order
from real.learner import Network, Rows, rows_of
from real.objectives import Sum, bradley_terry, dpo, sequence
from real.pairs import Pairs
from real.pretrain import Start
from real.scoring import Scorers, last_of
from real.stage import Manifest

MOST = 1024  # held-out pairs that an evaluation looks at


class Preferences(Alignment):
    """A trainer that learns which of two answers is the better one."""

    def __init__(self, plan: Plan, start: Start) -> None:
        super().__init__(plan, start)
        align, folder = self.align, start.folder / "tokens"
        self.pairs, self.held_out = Pairs(folder, "train"), Pairs(folder, "held_out")
        self.order = Order(len(self.pairs), plan.seed)
        self.judges = align.method == "reward"
        self.model = Network(self.learning, self.axes, self.timeline, start.base, adapters=align.adapters, judge=self.judges,
                             rate=align.learning_rate)  # fmt: skip
        self.networks = {"": self.model}
        self.scorers = None if self.judges else Scorers(self, self.model)
        self.told = dict[str, Tensor]()  # what the precomputed reference says of every pair of each split, [pairs, 2]
        self.margins = list[Tensor]()  # of this step's pairs on this rank

    def begin(self) -> None:
        if self.align.reference == "precomputed":
            self.told = {split: self._precomputed(pairs, split) for split, pairs in self._splits.items() if len(pairs)}
        if self.done == 0:
            self._evaluate()

    def end(self) -> None:
        self._evaluate()

    def close(self) -> None:
        if self.scorers:
            self.scorers.close()

    @property
    def _splits(self) -> dict[str, Pairs]:
        return {"train": self.pairs, "held_out": self.held_out}

    # -- a step

    def step(self, step: int) -> Told:
        self.timeline.enter("data")
        count = self.align.prompts
        rows = self._rows(self.pairs, [self.order[i] for i in range(step * count, (step + 1) * count)], "train")
        self.margins = []
        whole = self.model.judged() if self.judges else 1.0
        loss, norm = self.model.learn(self.model.mine(rows), self._loss, count, step, whole)
        margins = torch.cat(self.margins)
        right, margin = (self.model.total(value.double().sum()) / count for value in (_right(margins), margins))
        tokens = float(rows.mask.sum())
        return Told({"loss": loss, "gradient_norm": norm, "accuracy": right, "margin": margin, "tokens": tokens},
                    f"loss {loss:.4f}  accuracy {right:.0%}  margin {margin:.3f}")  # fmt: skip

    def _loss(self, rows: Rows) -> Sum:
        if self.judges:
            scores = last_of(self.model.values(rows), rows.mask)
            self.margins.append((scores[0::2] - scores[1::2]).detach())
            return bradley_terry(scores[0::2], scores[1::2])
        logp = sequence(self.model.logp(rows), rows.mask, mean=self.align.loss == "ipo")
        ref = rows["reference"]
        self.margins.append((logp[0::2] - logp[1::2] - ref[0::2] + ref[1::2]).detach())
        return dpo(logp[0::2], logp[1::2], ref[0::2], ref[1::2], self.align.beta, self.align.loss)

    def _rows(self, pairs: Pairs, which: Sequence[int], split: str) -> Rows:
        """Pairs as rows, with what the reference says of them."""
        rows = self._rows_alone(pairs, which)
        if self.judges:
            return rows
        if split in self.told:
            return rows.beside_them(reference=self.told[split][list(which)].flatten())
        assert self.scorers is not None
        return rows.beside_them(reference=self._summed(self.scorers.reference(rows), rows))

    def _summed(self, logp: Tensor, rows: Rows) -> Tensor:
        return sequence(logp, rows.mask.to(logp.device), mean=self.align.loss == "ipo")

    def _precomputed(self, pairs: Pairs, split: str) -> Tensor:
        """What the start says of every pair, asked once and kept in a file."""
        path = self.start.folder / f"reference-{split}-{self._origin()}.npy"
        if not path.is_file():
            found = torch.zeros(len(pairs), 2, dtype=torch.float64)
            reference = Network(self.learning, self.axes, self.timeline, self.start.base)
            for some in self._dealt(pairs.by_length(len(pairs))):
                mine = reference.mine(self._rows_alone(pairs, some))
                told = reference.asked(reference.logp, mine, "score")
                self._put(found, some, self._summed(told, mine).view(-1, 2))
            found = self._gathered(found)
            if rank() == 0:
                commit(path, lambda temporary: _save(temporary, found))
            return found.float()
        return torch.from_numpy(np.load(path)).float()

    def _origin(self) -> str:
        """Digest of what the reference was asked of, and which one."""
        shards = [output["sha256"] for output in Manifest.read(self.start.folder / "tokens").outputs]
        return hashlib.blake2b(f"{shards} {self.start.base} {self.align.loss}".encode(), digest_size=5).hexdigest()

    def _rows_alone(self, pairs: Pairs, which: Sequence[int]) -> Rows:
        places = [place for pair in which for place in (2 * pair, 2 * pair + 1)]
        return rows_of([pairs.tokens[p] for p in places], [pairs.learned[p] for p in places], self.model.even)

    # -- over many pairs

    def _dealt(self, pairs: Sequence[int]) -> list[list[int]]:
        """Pairs in batches that divide among the data-parallel ranks; the last is filled up with the first again."""
        each = self.learning.dp * (self.align.micro_batch // 2)
        return [[pairs[(start + i) % len(pairs)] for i in range(each)] for start in range(0, len(pairs), each)]

    def _put(self, found: Tensor, some: Sequence[int], mine: Tensor) -> None:
        """This rank's answers, at the places of their pairs."""
        share = len(some) // self.learning.dp
        first = (self.axes.dp_rank if self.axes else 0) * share
        found[list(some[first : first + share])] = mine.to(found)

    def _gathered(self, found: Tensor) -> Tensor:
        """Every rank's answers; pairs that two ranks were asked of stand once."""
        known = (found != 0).double()
        both = parallel.total(torch.stack((found, known)).to(self.model.device)).cpu()
        return both[0] / both[1].clamp(min=1)

    def _evaluate(self) -> None:
        """Accuracy on pairs whose questions were never trained on, with its error clustered by question."""
        if not len(self.held_out):
            return
        count = min(MOST, len(self.held_out))
        found = torch.zeros(count, dtype=torch.float64)
        with self.timeline.during("evaluate"):
            for some in self._dealt(self.held_out.by_length(count)):
                rows = self.model.mine(self._rows(self.held_out, some, "held_out"))
                what = self.model.values if self.judges else self.model.logp
                told = self.model.asked(what, rows, "evaluate")
                scores = last_of(told, rows.mask) if self.judges else self._summed(told, rows) - rows["reference"]
                self._put(found, some, scores[0::2] - scores[1::2])
            margins = self._gathered(found)
        asked = self.held_out.asked[:count]
        share, error = clustered(_right(margins).numpy(), asked["question"])
        longer = float(asked["longer"].mean())
        if rank() == 0:
            for name, value in (("held_out_accuracy", share), ("held_out_error", error), ("longer_wins", longer)):
                self.record.observe(STAGE, name, value, self.done)
        self.say(f"held-out accuracy {share:.1%} ± {error:.1%} on {count} pairs of {len(set(asked['question']))} questions after "
                 f"step {self.done}; the longer answer is the chosen one in {longer:.1%}")  # fmt: skip


def _save(path: Path, found: Tensor) -> None:
    with path.open("wb") as file:
        np.save(file, found.numpy())


def _right(margins: Tensor) -> Tensor:
    """1 where the chosen answer is preferred, a half where neither is."""
    return (margins.sign().double() + 1) / 2


def clustered(right: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Share that is right, and its standard error where answers to one question go together (Liang and Zeger 1986; Miller 2024,
    "Adding error bars to evals", equation 4).

    >>> clustered(np.array([1, 1, 0, 0]), np.array([5, 5, 6, 6]))
    (0.5, 0.35355339059327373)
    """
    share, rest = float(right.mean()), right - right.mean()
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], weights=rest)
    return share, math.sqrt(float((sums**2).sum())) / len(right)
