"""Completions between those who generate and those who train: what may be begun, what is ready, and a journal of what was accepted.

Staleness is bounded before the work is done, by admission: prompts of training batch t are begun once the weights have had t − lag updates
(AReaL, Fu et al. 2025, equation 3), so nothing that was generated is thrown away, and slow prompts are trained on like quick ones. The
other way, to generate freely and throw away what has grown too old, is there to be compared with.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from real.rollout import Request, Sample


@dataclass
class Judged:
    """A completion with its reward; no number where the reward function failed, and why."""

    sample: Sample
    reward: float
    why: str = ""

    @property
    def born(self) -> int:
        """Version of the weights that drew the first token."""
        return self.sample.versions[0]


@dataclass
class Pool:
    """Numbers of prompts are those of all that a run draws: batch t trains on t × prompts and those after it."""

    prompts: int
    group: int
    lag: int
    steps: int  # batches of the run
    discards: bool = False
    begun: int = 0  # prompts that were given out
    discarded: int = 0  # completions that were thrown away
    ready: dict[int, dict[int, Judged]] = field(default_factory=lambda: defaultdict(dict))  # by prompt, by number in its group
    used: set[int] = field(default_factory=set)  # prompts that were trained on, or thrown away

    def admit(self, version: int) -> range:
        """The prompts that may be begun now that the weights have had so many updates; they count as begun."""
        if self.discards:
            most = len(self.used) + (self.lag + 1) * self.prompts
        else:
            most = min(version + self.lag + 1, self.steps) * self.prompts
        first, self.begun = self.begun, max(self.begun, most)
        return range(first, self.begun)

    def missing(self, prompts: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Of these prompts, those not used: each completion that is not there, by prompt and number."""
        for prompt in prompts:
            if prompt not in self.used:
                yield from ((prompt, number) for number in range(self.group) if number not in self.ready[prompt])

    def accept(self, judged: Judged) -> bool:
        """Whether it is new; one that was done twice counts once."""
        request = judged.sample.request
        if request.prompt in self.used or request.number in self.ready[request.prompt]:
            return False
        self.ready[request.prompt][request.number] = judged
        return True

    def take(self, step: int) -> list[Judged] | None:
        """The batch of step 0, 1, …, in the order of prompts; None while it is not whole."""
        whole = [prompt for prompt, group in self.ready.items() if len(group) == self.group]
        if self.discards:
            old = [p for p in whole if step - min(judged.born for judged in self.ready[p].values()) > self.lag]
            for prompt in old:
                self.discarded += len(self.ready.pop(prompt))
                self.used.add(prompt)
            chosen = [prompt for prompt in whole if prompt not in self.used][: self.prompts]
        else:
            chosen = [p for p in range(step * self.prompts, (step + 1) * self.prompts) if len(self.ready.get(p, ())) == self.group]
        if len(chosen) < self.prompts:
            return None
        self.used |= set(chosen)
        return [self.ready[prompt][number] for prompt in sorted(chosen) for number in range(self.group)]

    def forget(self) -> None:
        """Drop what was trained on."""
        for prompt in [prompt for prompt in self.ready if prompt in self.used]:
            del self.ready[prompt]


class Journal:
    """Accepted completions on disk, a line each, so that whoever dies takes none of them along."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self.file = path.open("a")
        self.file.write("\n" if torn else "")  # what follows a crash's half line starts on one of its own

    def write(self, found: Iterable[Judged]) -> None:
        self.file.writelines(json.dumps(_plain(judged)) + "\n" for judged in found)
        self.file.flush()

    def took(self, step: int, prompts: Iterable[int], discarded: int) -> None:
        """Note which prompts a step trains on."""
        self.file.write(json.dumps({"step": step, "prompts": sorted(prompts), "discarded": discarded}) + "\n")
        self.file.flush()

    def recall(self, pool: Pool, step: int) -> int:
        """Fill a pool with what was accepted and not trained on before `step`; returns how many completions. A torn last line is left."""
        rows = [row for line in self.path.read_text().splitlines() if (row := _read(line)) is not None]
        last = {row["step"]: row for row in rows if "step" in row and row["step"] < step}  # a step done again counts as done last
        for row in last.values():
            pool.used |= set(row["prompts"])
            pool.discarded = max(pool.discarded, row["discarded"])
        if not pool.discards:
            pool.used = set(range(step * pool.prompts))
        found = sum(pool.accept(_judged(row)) for row in rows if "step" not in row)
        pool.begun = max([step * pool.prompts * (not pool.discards), *(prompt + 1 for prompt in (*pool.used, *pool.ready))])
        return found


def _read(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _plain(judged: Judged) -> dict[str, Any]:
    sample, request = judged.sample, judged.sample.request
    return request._asdict() | {"tokens": sample.tokens, "logp": sample.logp, "versions": sample.versions, "ended": sample.ended,
                                "reward": judged.reward, "why": judged.why}  # fmt: skip


def _judged(row: dict[str, Any]) -> Judged:
    request = Request(row["prompt"], row["number"], tuple(row["ids"]), row["seed"])
    return Judged(Sample(request, row["tokens"], row["logp"], row["versions"], row["ended"]), row["reward"], row["why"])
