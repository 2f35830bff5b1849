"""Logarithmic axes for the pages: where a value stands, and which ticks can be labelled without running together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import count

NARROWEST, CHARACTER, APART = 144, 7, 5  # pixels: of a plot, a character of its labels, and between two of them
RATIOS = (  # ticks, from the narrowest axis of ratios to the widest
    (0.9, 0.95, 1.0, 1.05, 1.1),
    (0.8, 0.9, 1.0, 1.1, 1.25),
    (0.5, 0.7, 1.0, 1.4, 2.0),
    (0.2, 0.5, 1.0, 2.0, 5.0),
    (0.1, 0.3, 1.0, 3.0, 10.0),
)


class Axis:
    """From `low` to `high`, which are logarithms to base 10, in percent of its length; what is beyond is put at its end.

    text  how a tick is written
    wide  pixels of its length on a phone
    """

    def __init__(
        self,
        low: float,
        high: float,
        ticks: Sequence[float],
        text: Callable[[float], str] = "{:g}".format,
        wide: int = NARROWEST,
    ) -> None:
        self.low, self.high, self.ticks, self.text, self.wide = low, high, ticks, text, wide

    @classmethod
    def decades(cls, least: float, most: float, text: Callable[[float], str] = "{:g}".format) -> Axis:
        """From the power of ten below `least` to the one above `most`."""
        low = math.floor(math.log10(least))
        high = max(math.ceil(math.log10(most)), low + 1)
        return cls(low, high, [10.0**n for n in range(low, high + 1)], text)

    @classmethod
    def ratios(cls, least: float, most: float, text: Callable[[float], str] = "{:g}".format) -> Axis:
        """With 1 in the middle."""
        far = max(most, 1 / least, 1.0)
        for ticks in RATIOS:
            if far <= ticks[-1]:
                edge = math.log10(ticks[-1])
                return cls(-edge, edge, ticks, text)
        return cls.decades(1 / far, far, text)

    def __call__(self, value: float) -> float:
        at = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return round(100 * min(max(at, 0.0), 1.0), 2)

    def anchor(self, value: float) -> str:
        """Where a label stands at its tick, so that it does not leave the plot."""
        return {0.0: "start", 100.0: "end"}.get(self(value), "middle")

    @property
    def labels(self) -> list[float]:
        """The ticks that are labelled, at even distances, 1 among them: as many as stand apart on the narrowest plot."""
        origin = self.ticks.index(1.0) if 1.0 in self.ticks else 0
        spread = ([t for n, t in enumerate(self.ticks, -origin) if n % every == 0] for every in count(1))
        return next(found for found in spread if not self._meet(found))

    def _meet(self, labels: Sequence[float]) -> bool:
        ends = [end for t in labels for end in self._extent(t)]
        return any(right + APART > left for right, left in zip(ends[1::2], ends[2::2]))

    def _extent(self, label: float) -> tuple[float, float]:
        """From where to where a label goes on the narrowest plot, in pixels."""
        wide = CHARACTER * len(self.text(label))
        left = self.wide * self(label) / 100 - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor(label)]
        return left, left + wide
