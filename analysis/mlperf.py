"""MLPerf's fine-tuning, adapters of Llama 2 70B, by its rules: how long a run is, and what it is made of.

A run evaluates 173 sequences after every 384 that it trains on, but for the first batch / 8 + 2 times (the benchmark's README, evaluation
frequency), and the evaluation that reaches the target ends it.
"""

from collections.abc import Mapping

import numpy as np

SAMPLES = ((8, 3072), (64, 7500), (128, 11000))  # that the target takes at a batch: its result logs, rounds 4.0 and 4.1
EVERY, HELD_OUT = 384, 173  # sequences between evaluations, and in one
# Seconds that an evaluation takes beside its passes: time to train less samples / (samples/s), the median of five runs on 512 devices or
# more of rounds 4.0 and 4.1, those with power logs left out.
PAUSE = 2.5


def samples(batch: int) -> float:
    """Sequences until the target at this batch, between those that are known along a power law."""
    sizes, counts = np.log(np.array(SAMPLES)).T
    return float(np.exp(np.interp(np.log(batch), sizes, counts)))


def evaluations(batch: int) -> float:
    """
    >>> round(evaluations(8), 1), round(evaluations(64), 1)
    (5.0, 9.5)
    """
    return samples(batch) / EVERY - (batch // 8 + 2)


def spent(batch: int, step: Mapping[str, float], evaluate: float) -> dict[str, float]:
    """Seconds of a run in each state: of those of a step, and of the passes of an evaluation."""
    steps, often = samples(batch) / batch, evaluations(batch)
    return {state: steps * seconds for state, seconds in step.items()} | {"evaluate": often * evaluate, "data": often * PAUSE}
