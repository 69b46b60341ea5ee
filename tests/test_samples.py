"""The queue between generators and trainers: how old a sample may be, what is counted, and what a journal brings back."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from real.rollout import Request, Sample
from real.samples import Journal, Judged, Pool


def made(prompt: int, number: int, version: int, reward: float = 1.0) -> Judged:
    return Judged(Sample(Request(prompt, number, (1, 2), 7), [3], [-0.5], [version], True), reward)


class World:
    """Generators that work on what was given to them in any order, and a trainer."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.version, self.running = pool, 0, list[tuple[int, int, int | None]]()
        self.ages, self.trained = list[int](), list[tuple[int, int]]()
        self._give()

    def _give(self) -> None:
        self.running += [(prompt, number, None) for prompt, number in self.pool.missing(self.pool.admit(self.version))]

    def turn(self, which: int, begin: bool) -> None:
        """A sample gets its first token, or its last; then the trainer takes what is whole."""
        if not self.running:
            return
        place = which % len(self.running)
        prompt, number, born = self.running[place]
        if begin and born is None:
            self.running[place] = prompt, number, self.version
            return
        del self.running[place]
        assert self.pool.accept(made(prompt, number, self.version if born is None else born))
        discarded = self.pool.discarded
        while self.version < self.pool.steps and (batch := self.pool.take(self.version)) is not None:
            self.ages += [self.version - judged.born for judged in batch]
            self.trained += [(judged.sample.request.prompt, judged.sample.request.number) for judged in batch]
            self.pool.forget()
            self.version += 1
            self._give()
        if self.pool.discarded != discarded:
            self._give()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.booleans(), st.integers(0, 2**30))
def test_no_sample_is_older_than_the_bound_and_none_is_lost(prompts, group, lag, discards, seed):
    import random

    dice, world = random.Random(seed), World(Pool(prompts, group, lag, steps=6, discards=discards))
    for _ in range(4000):
        if world.version == 6:
            break
        world.turn(dice.randrange(1000), dice.random() < 0.6)
    assert world.version == 6, "the trainer starves"
    assert max(world.ages) <= lag and len(world.trained) == len(set(world.trained)) == 6 * prompts * group
    assert world.pool.discarded == 0 or discards
    if not discards:
        assert sorted(world.trained) == [(prompt, number) for prompt in range(6 * prompts) for number in range(group)]


def test_batches_keep_the_order_of_prompts():
    pool = Pool(2, 2, 1, 3)
    assert list(pool.admit(0)) == [0, 1, 2, 3] and list(pool.admit(0)) == []
    for prompt, number in [(3, 1), (1, 0), (0, 1), (1, 1)]:
        pool.accept(made(prompt, number, 0))
    assert pool.take(0) is None
    pool.accept(made(0, 0, 0))
    batch = pool.take(0)
    assert batch is not None
    assert [(one.sample.request.prompt, one.sample.request.number) for one in batch] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert not pool.accept(made(0, 0, 0)) and not pool.accept(made(3, 1, 0))  # once each


@pytest.mark.parametrize("discards", [False, True])
def test_a_journal_brings_back_what_was_not_trained_on(tmp_path: Path, discards):
    pool, journal = Pool(2, 1, 1, 5, discards), Journal(tmp_path / "samples.jsonl")
    pool.admit(0)
    found = [made(prompt, 0, 0, float("nan") if prompt == 3 else 0.25) for prompt in range(4)]
    journal.write([one for one in found if pool.accept(one)])
    used = set(pool.used)
    assert pool.take(0) is not None
    journal.took(0, pool.used - used, pool.discarded)
    journal.file.write('{"prompt": 9, "torn')
    journal.file.flush()

    after = Pool(2, 1, 1, 5, discards)
    assert Journal(tmp_path / "samples.jsonl").recall(after, 1) == 2 and after.used == {0, 1} and after.begun == 4
    assert [after.ready[prompt][0].sample for prompt in (2, 3)] == [one.sample for one in found[2:]]
    assert after.ready[2][0].reward == 0.25 and after.ready[3][0].reward != after.ready[3][0].reward
    again = Journal(tmp_path / "samples.jsonl")
    again.write([made(8, 0, 1)])  # behind the torn line, not in it
    before = Pool(2, 1, 1, 5, discards)
    assert again.recall(before, 0) == 5 and not before.used  # of a checkpoint before the step
    assert [json.loads(line)["prompt"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()[:4]] == [0, 1, 2, 3]


def test_a_step_that_was_done_again_counts_as_it_was_done_last(tmp_path: Path):
    journal = Journal(tmp_path / "samples.jsonl")
    journal.took(0, [0], 0)
    journal.took(1, [1], 0)  # of a life that was lost
    journal.took(1, [2], 3)
    pool = Pool(1, 1, 1, 5, discards=True)
    journal.recall(pool, 2)
    assert pool.used == {0, 2} and pool.discarded == 3
