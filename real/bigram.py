"""The yardstick: an interpolated bigram trained on exactly the tokens that the model saw.

p(w | v) = a c(v, w) / c(v) + b c(w) / n + (1 - a - b) / V (Jelinek and Mercer 1980). The weights a and b are chosen by
expectation-maximisation on the very held-out tokens it is judged by: the strongest bigram of this form.
"""

from collections.abc import Iterable

import numpy as np


def held_out_loss(seen: Iterable[np.ndarray], held_out: Iterable[np.ndarray], vocab: int) -> float:
    """Nats a held-out token of the best interpolated bigram; every array is one window of tokens."""
    pairs = np.concatenate([window[:-1] * vocab + window[1:] for window in seen])
    codes, counts = np.unique(pairs, return_counts=True)
    before = np.zeros(vocab)
    np.add.at(before, codes // vocab, counts)
    single = np.zeros(vocab)
    np.add.at(single, codes % vocab, counts)
    targets = np.concatenate([window[:-1] * vocab + window[1:] for window in held_out])
    place = np.minimum(np.searchsorted(codes, targets), len(codes) - 1)
    hits = np.where(codes[place] == targets, counts[place], 0)
    bigram = hits / np.maximum(before[targets // vocab], 1)
    parts = np.stack([bigram, single[targets % vocab] / single.sum(), np.full(len(targets), 1 / vocab)])
    weights = np.full(3, 1 / 3)
    for _ in range(100):
        share = weights[:, None] * parts
        weights = (share / share.sum(axis=0)).mean(axis=1)
    return float(-np.log(weights @ parts).mean())
