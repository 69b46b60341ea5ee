"""A law with how well it is known: what a bootstrap of its runs, the choice of its form and their scatter leave open."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from analysis.chinchilla import Array
from analysis.contest import CUTS, backtest, band, rivals
from analysis.forms import FORMS, Fitted, fit_form
from analysis.ladder import Ladder
from analysis.law import fit, predicted

SAMPLES = 1000
ENDS = (0.025, 0.975)
TRIED = ("chinchilla", "kaplan", "coupled")  # forms that are quick to fit; Farseer's nine parameters take twenty times as long
RUNS = 2 * len(FORMS["chinchilla"].names)  # that the smallest part of a back-test holds


class Known(NamedTuple):
    """E, A, B, alpha, beta; their bootstrap (samples, 5); the runs and the forms fitted to them; compute of the largest run [FLOP]."""

    law: Array
    samples: Array = np.empty((0, 5))
    ladder: Ladder | None = None
    forms: Sequence[Fitted] = ()  # the law's own and its rivals
    errors: Mapping[str, float] = MappingProxyType({})  # mean error of each form on the larger runs, foretold from the smaller
    reach: float | None = None

    @classmethod
    def of(cls, ladder: Ladder) -> "Known":
        """Fitted to runs; with the spread of forms where there are enough to foretell the larger from the smaller."""
        found = fit(ladder, bootstrap=SAMPLES)
        least = int(len(ladder) * CUTS[0])
        errors = {name: backtest(ladder, name) for name in TRIED if least >= max(RUNS, 2 * len(FORMS[name].names))}
        own = fit_form(ladder, "chinchilla")
        forms = [own, *rivals(ladder, own, errors)] if errors else []
        return cls(found.parameters, found.samples, ladder, forms, errors, float(ladder.flop.max()))

    def loss(self, params: Array, tokens: Array) -> tuple[Array, Array] | None:
        """Low and high ends of 95% bands of the losses that runs of these sizes would end with; None where nothing is known of them.

        The wider of two: of the bootstrap with the runs' scatter, and of what forms fitted alike to the smaller runs miss on the larger.
        """
        if self.ladder is None:
            return None
        scatter = np.log(self.ladder.loss) - np.log(predicted(self.law, self.ladder.params, self.ladder.tokens))
        drawn = np.random.default_rng(0).choice(scatter, (len(self.samples), 1)) if len(self.samples) else np.zeros((0, 1))
        losses = predicted(self.samples[:, None], params, tokens) * np.exp(drawn)
        low, high = np.quantile(losses, ENDS, axis=0)
        if not self.forms:
            return low, high
        own, *others = self.forms
        ends = band(self.ladder, own, self.errors[own.form], others, params, tokens)
        return np.minimum(low, ends[0]), np.maximum(high, ends[1])

    def best(self, params: Array, tokens: Array) -> tuple[float, float] | None:
        """Of sizes with what each can be trained on, ends of a 95% band of the one with the least loss, over the bootstrap."""
        if not len(self.samples):
            return None
        sizes = params[predicted(self.samples[:, None], params, tokens).argmin(1)]
        low, high = np.quantile(sizes, ENDS, method="nearest")
        return float(low), float(high)
