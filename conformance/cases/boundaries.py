"""Where kernels break: the ends of a legal range, and both sides of the numbers at which tiles, counters and grids end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import sqrt
from typing import Any

from porthal.hal.spans import Reals, Span

TILES = (16, 32, 64, 128, 256)
GRIDS = (2**10, 2**11, 2**12, 2**15, 2**16)
UNEVEN = 48  # full tiles, but no power of two


def values(span: Span) -> list[Any]:
    """What a plan takes of all legal values: those of `ends`, and both sides of every boundary between."""
    if isinstance(span, Reals) or not isinstance(span[0], int):
        return ends(span)
    return list(dict.fromkeys([*ends(span), *(v for n in (*TILES, UNEVEN, *GRIDS) for v in beside(span, n))]))


def ends(span: Span) -> list[Any]:
    """The lowest, the highest, and an odd one in the middle; of words all."""
    if isinstance(span, Reals):
        return [span.low, span.high, float(f"{1.37 * sqrt(span.low * span.high):.3g}")]
    return list(dict.fromkeys([span[0], span[-1], middle(span)] if isinstance(span[0], int) else span))


def middle(span: Sequence[Any]) -> Any:
    """The first odd value from the middle on, or the middle one."""
    half = span[len(span) // 2 :]
    return next((v for v in half[:2] if v % 2), half[0])


def beside(span: Sequence[int], n: int) -> list[int]:
    """The last of rising values up to n and the first above, where there are both."""
    below = bisect_right(span, n)
    return [span[below - 1], span[below]] if 0 < below < len(span) else []
