"""Training on the same tokens again, and on a law that knows what that is worth.

L = E + A / N'^alpha + B / D'^beta with N' and D' what parameters and tokens come to when only U tokens are unique (Muennighoff et al. 2023,
arXiv 2305.16264, equations 5 and 6): tokens that come again are worth less and less, R_D* times is where they are worth nearly nothing, and
so are parameters beyond those that are best for U tokens.
"""

from typing import NamedTuple

import numpy as np

from analysis.chinchilla import Array

CHINCHILLA_TIED = (np.exp(6.255414), np.exp(7.3049974), np.exp(0.6254804), 0.3526596)  # A, B, E, alpha = beta (their notebook)
DECAYS = (15.387756, 5.309743)  # R_D*, R_N*, on 182 runs; a ridge of others fits as well: (95, 1.7) and (2.9, ∞) a little better


class Repeated(NamedTuple):
    """A, B, E, the common exponent, R_D* and R_N*."""

    A: float = CHINCHILLA_TIED[0]
    B: float = CHINCHILLA_TIED[1]
    E: float = CHINCHILLA_TIED[2]
    alpha: float = CHINCHILLA_TIED[3]
    tokens_decay: float = DECAYS[0]
    params_decay: float = DECAYS[1]

    def best_params(self, unique: Array) -> Array:
        """Those that are best for so many tokens seen once: where alpha A / N^alpha = alpha B / D^alpha."""
        return np.asarray(unique * (self.A / self.B) ** (1 / self.alpha))

    def loss(self, params: Array, tokens: Array, unique: Array) -> Array:
        """L of N parameters trained on D tokens of which U are unique; arrays broadcast.

        >>> float(Repeated().loss(6.34e9, 242e9, 25e9)), float(Repeated().loss(8.67e9, 178e9, 25e9))  # their README
        (2.2256440889984477, 2.2269634075087867)
        """
        unique = np.minimum(tokens, unique)
        base = np.minimum(self.best_params(unique), params)
        effective = worth(base, params / base - 1, self.params_decay), worth(unique, tokens / unique - 1, self.tokens_decay)
        return np.asarray(self.E + self.A / effective[0] ** self.alpha + self.B / effective[1] ** self.alpha)


def worth(once: Array, again: Array, decay: float) -> Array:
    """What comes to when something is there once and `again` times more."""
    return np.asarray(once + once * decay * (1 - np.exp(-np.maximum(0, again) / decay)))
