"""What values an attribute, a page's size or a float operand may have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Reals:
    """The real numbers from `low` to `high`, both included, and those that stand `apart` from them."""

    low: float
    high: float
    apart: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high or value in self.apart

    def holds(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Element by element; NaN is none of them."""
        low, high = np.array([self.low, self.high], x.dtype)  # the ends as x can hold them
        return ((x >= low) & (x <= high)) | np.isin(x, self.apart)

    def __str__(self) -> str:
        return " or ".join([*(f"{v:g}" for v in self.apart), f"{self.low:g} to {self.high:g}"])


Span = range | Reals | Sequence[Any]  # whole numbers, real ones, or all values one by one
Legal = Span | Callable[[Any], Span]  # or those where the other dims and attributes are what the function is given
SHOWN = 16


def worded(span: Span) -> str:
    """The values in words: "1 to 1024", "one of 1, 2, 4"."""
    if isinstance(span, Reals):
        return str(span)
    if isinstance(span, range) and len(span) > 1:
        return f"{span[0]} to {span[-1]}" + f" in steps of {span.step}" * (span.step > 1)
    if len(span) < 2:
        return str(span[0]) if span else "nothing"
    return f"one of {', '.join(map(str, span[:SHOWN]))}" + ", ..." * (len(span) > SHOWN)

# Spans of more than one op.
EPSILON = Reals(1e-12, 1.0)  # what is added under a root: its squares may be gone in float32 before it is
THETA = Reals(10.0, 1e8)
SCALE = Reals(2.0**-12, 4.0)  # of scores
ROUTED = Reals(2.0**-6, 64.0)  # of the weights of a row's experts
SELECTED = range(1, 2**18 + 1)  # positions that a row selects: the longest contexts have fewer
EXPERTS = range(1, 2**12 + 1)  # of one rank
FIRST_EXPERT = range(2**12)
UNIT = Reals(0.0, 1 - 2.0**-24)  # random numbers
TEMPERATURE = Reals(1e-5, 1e4, apart=(0.0,))
SHARE = Reals(0.0, 1.0)
