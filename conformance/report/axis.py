"""Logarithmic axes for the pages: where a value stands, and which ticks can be labelled without running together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

NARROWEST, CHARACTER, APART = 144, 7, 5  # pixels: of a plot on a phone, a character of its labels, and between two of them


class Axis:
    """From the power of ten below `least` to the one above `most`, in percent of its length; what is beyond is put at its end.

    text  how a tick is written
    """

    def __init__(self, least: float, most: float, text: Callable[[float], str] = "{:g}".format) -> None:
        self.low = math.floor(math.log10(least))
        self.high = max(math.ceil(math.log10(most)), self.low + 1)
        self.text = text

    def __call__(self, value: float) -> float:
        at = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return round(100 * min(max(at, 0.0), 1.0), 2)

    def anchor(self, value: float) -> str:
        """Where a label stands at its tick, so that it does not leave the plot."""
        return {0.0: "start", 100.0: "end"}.get(self(value), "middle")

    @property
    def ticks(self) -> list[float]:
        return [10.0**n for n in range(self.low, self.high + 1)]

    @property
    def labels(self) -> list[float]:
        """The ticks that are labelled, at even distances: as many as stand apart on the narrowest plot."""
        every = 1
        while self._meet(found := [t for n, t in enumerate(self.ticks, self.low) if n % every == 0]):
            every += 1
        return found

    def _meet(self, labels: Sequence[float]) -> bool:
        ends = [end for t in labels for end in self._extent(t)]
        return any(right + APART > left for right, left in zip(ends[1::2], ends[2::2]))

    def _extent(self, label: float) -> tuple[float, float]:
        """From where to where a label goes on the narrowest plot, in pixels."""
        wide = CHARACTER * len(self.text(label))
        left = NARROWEST * self(label) / 100 - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor(label)]
        return left, left + wide
