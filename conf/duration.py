"""Durations that vary from one time to the next.

"2 min" is always two minutes, "2 min exponential" has that mean, "2 min lognormal 1.5" has that median and 1.5 as the
standard deviation of its logarithm: a heavy tail, as recoveries have in which a person takes part.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, TypeAlias

from conf.units import read, show, spell

LAWS = ("fixed", "exponential", "lognormal")
_BELL = NormalDist()


@dataclass(frozen=True)
class Duration:
    """A span of time as a distribution, which is asked for its quantiles."""

    scale: float  # the value, the mean or the median [s]
    law: str = "fixed"
    sigma: float = 0.0  # of the logarithm

    @staticmethod
    def read(text: str) -> "Duration":
        """What a plan says.

        Raises ValueError with a line that a user can act on.

        >>> Duration.read("2 min lognormal 1.5"), Duration.read("2 d exponential").mean
        (Duration(scale=120.0, law='lognormal', sigma=1.5), 172800.0)
        >>> Duration.read("2 min normal")
        Traceback (most recent call last):
        ValueError: '2 min normal' is no duration; write '2 min', '2 min exponential' or '2 min lognormal 1.5'
        """
        words = text.split()
        laws = [i for i, word in enumerate(words) if word in LAWS[1:]]
        if not laws:
            if len(words) > 2:
                raise ValueError(_no_duration(text))
            return Duration(read(text, "s"))
        span, law, rest = read(" ".join(words[: laws[0]]), "s"), words[laws[0]], words[laws[0] + 1 :]
        if len(rest) != (law == "lognormal"):
            raise ValueError(_no_duration(text))
        try:
            sigma = float(rest[0]) if rest else 0.0
        except ValueError as error:
            raise ValueError(_no_duration(text)) from error
        if not 0 <= sigma < math.inf:
            raise ValueError(f"{text!r}: the sigma of a duration must not be negative")
        return Duration(span, law, sigma)

    def __str__(self) -> str:
        """For a person; `spelt` is exact."""
        return show(self.scale, "s") + self._tail()

    def spelt(self) -> str:
        """Text that `read` turns back into the same duration."""
        return spell(self.scale, "s") + self._tail()

    def _tail(self) -> str:
        return {"exponential": " exponential", "lognormal": f" lognormal {self.sigma!r}"}.get(self.law, "")

    def at(self, quantile: float) -> float:
        """The span [s] that is longer than this share (0 to 1, both left out) of all.

        >>> Duration(60.0, "exponential").at(1 - math.exp(-2)), Duration(60.0, "lognormal", 1.0).at(0.5)
        (120.0, 60.0)
        """
        if self.law == "exponential":
            return -self.scale * math.log1p(-quantile)
        if self.law == "lognormal":
            return self.scale * math.exp(self.sigma * _BELL.inv_cdf(quantile))
        return self.scale

    @property
    def mean(self) -> float:
        """Expected span [s]; of a lognormal, median × exp(sigma² / 2)."""
        return self.scale * math.exp(self.sigma**2 / 2)

    def of_mean(self, mean: float) -> "Duration":
        """The same law with another mean [s]."""
        return replace(self, scale=mean / math.exp(self.sigma**2 / 2))


def _no_duration(text: str) -> str:
    return f"{text!r} is no duration; write '2 min', '2 min exponential' or '2 min lognormal 1.5'"


if TYPE_CHECKING:
    Lasting: TypeAlias = Duration
else:  # Hydra sees the text that a user writes
    Lasting = Annotated[str, "s", Duration]
