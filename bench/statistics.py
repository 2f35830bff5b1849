"""What samples of a time say: their middle, how sure it is, and whether they may be compared at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NOISY = 0.3  # of the median; noisier samples are told, not compared
OVER = 1.05  # of its limit: what is faster says that the limit or the time is wrong
SURE = 0.04  # width of the 95 % interval, in medians, at which measuring may end
LEAST, MOST = 7, 200  # samples


@dataclass(frozen=True)
class Summary:
    """Seconds. `ci95` is the 95 % interval of the median, whatever the distribution; `noise` the distance between the
    quartiles, in medians."""

    median: float
    p10: float
    ci95: tuple[float, float]
    noise: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        ordered = sorted(samples)
        middle, low, high = (quantile(ordered, p) for p in (0.5, 0.25, 0.75))
        return cls(middle, quantile(ordered, 0.1), interval(ordered), (high - low) / middle if middle else 0.0, len(ordered))

    @property
    def noisy(self) -> bool:
        return self.noise > NOISY

    @property
    def settled(self) -> bool:
        """Whether more samples would tell little."""
        low, high = self.ci95
        return self.rounds >= MOST or (self.rounds >= LEAST and high - low <= SURE * self.median)


def quantile(ordered: Sequence[float], p: float) -> float:
    """Between the two samples that are nearest, in proportion."""
    at = p * (len(ordered) - 1)
    low, high = math.floor(at), math.ceil(at)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The two samples between which the median lies with at least 95 %: how many of n lie below it is binomial. With fewer
    than six samples no two of them are that far apart, and all are between those given."""
    n, below, k = len(ordered), 0.0, 0
    while k < n // 2 and (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    k = max(k - 1, 0)
    return ordered[k], ordered[n - 1 - k]
