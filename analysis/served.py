"""The size that costs least when the model is also used: training 6 N D and inference 2 N D_i FLOP, at a loss that is asked for.

Of all (N, D) with that loss the sum is least where  alpha A / N^alpha = beta B / D^beta (1 + D_i / 3 D)  (Sardana et al. 2024, 2401.00448,
minimise the same sum): a smaller model trained for longer, the more so the more it is used.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from analysis.chinchilla import Array
from conf.errors import Refused

TRAIN, SERVE = 6.0, 2.0  # FLOP a parameter and token (Kaplan et al. 2020, section 2.1)
MARGIN = 1e-9  # of ln N above the smallest size that can reach the loss at all
SPAN = 30.0  # of ln N that is searched


class Served(NamedTuple):
    """Size, training tokens, FLOP of training and of inference."""

    params: float
    tokens: float
    training: float
    inference: float


def served(law: Array, loss: float, inference_tokens: float) -> Served:
    """The cheapest size of a law (E, A, B, alpha, beta) for a loss and so many tokens of inference.

    Raises Refused for a loss that the law never reaches.
    """
    E, A, B, alpha, beta = (float(value) for value in law)
    if loss <= E:
        raise Refused(f"a loss of {loss:.4g} is at or below the law's irreducible loss {E:.4g}: no size reaches it; ask for more")
    least = float(np.log(A / (loss - E)) / alpha)

    def tokens(log: float) -> float:
        return float((B / (loss - E - A * np.exp(-alpha * log))) ** (1 / beta))

    def slope(log: float) -> float:
        d = tokens(log)
        return float(np.log(alpha * A / (beta * B)) - alpha * log + beta * np.log(d) - np.log1p(inference_tokens / (3 * d)))

    log = float(brentq(slope, least + MARGIN, least + SPAN, xtol=1e-14, rtol=1e-15, maxiter=500))
    params, d = float(np.exp(log)), tokens(log)
    return Served(params, d, TRAIN * params * d, SERVE * params * inference_tokens)
