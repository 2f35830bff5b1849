"""Statistics of a float result's errors against those of an ideal chip, which rounds the reference once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from porthal.conformance.cases.inputs import Array
from porthal.conformance.level import Level
from porthal.hal.dtypes import BLOCK, UNIT_ROUNDOFF

BIAS = 6.0  # |z| of the rounding direction and of a column's error, rows as samples
USUAL = 3.0  # of these, what permitted rounding alone may reach
LEAN = 0.25  # mean rounding direction in 16 bits, below which it counts as none
STEADY = 0.1  # mean error of a column in unit roundoffs, below which it counts as none: a rounded parameter has 0.2
ZEROS, BLANKS = 0.1, 0.5  # shares of results that may be zero where the reference is not
SAMPLES = 16  # rows that are enough to see a direction of rounding


@dataclass(frozen=True)
class Measure:
    """Statistics of any result against one reference.

    whole, row   root mean square error over that of the ideal chip, of the whole and of the worst row
    direction    z of the mean rounding direction, rows as samples
    column       root mean square over columns of z of each column's mean error, rows as samples
    zeros        the share of zeros among values above the permitted deviation
    blanks       and among values not far below it, as sums that cancel are
    """

    g: Array
    ideal: Array
    sigma: Array
    kind: str

    def __call__(self, y: Array) -> dict[str, float]:
        whole, row = self._ratios(y)
        signs = {"direction": self._direction(y), "column": self._column(y)}
        return {"whole": whole, "row": row, **signs, "zeros": self._zeros(y, 2.0), "blanks": self._zeros(y, 2.0**-10)}

    @staticmethod
    def limits(limit: Level, others: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """What each may be. Where permitted rounding alone gives more than usual, because the sample has few numbers or
        they share roundings, the limit rises with it."""
        usual = {"whole": (limit.whole, 1.0), "row": (limit.row, 1.0), "direction": (BIAS, USUAL), "column": (BIAS, USUAL)}
        usual |= {"zeros": (ZEROS, ZEROS), "blanks": (BLANKS, BLANKS)}
        shown = {test: max((abs(o[test]) for o in others), default=0.0) for test in usual}
        return {test: most * max(1.0, shown[test] / share) for test, (most, share) in usual.items()}

    def _ratios(self, y: Array) -> tuple[float, float]:
        """The granted error is the ideal chip's, at least that of uniform rounding, plus the permitted deviation."""
        u, least = UNIT_ROUNDOFF[self.kind], tiny(self.kind) ** 2
        square, granted = np.empty(y.shape), np.empty(y.shape)
        for x, g, ideal, sigma, off, most in _blocks(y, self.g, self.ideal, self.sigma, square, granted):
            np.square(x - g, out=off)
            np.square(ideal - g, out=most)
            np.maximum(most, (u * g / 3) ** 2, out=most)
            most += sigma**2
            most += least
        whole = float(np.sqrt(np.mean(square) / np.mean(granted))) if square.size >= 256 else 0.0
        if square.ndim < 2 or square.shape[-1] < 64:
            return whole, 0.0
        return whole, float(np.sqrt(np.max(np.mean(square, axis=-1) / np.mean(granted, axis=-1))))

    def _direction(self, y: Array) -> float:
        """Beyond the ideal chip's own. In float32 it is 0 unless output rounding dominates: errors of a sum or a
        function may lean to one side. In 16 bits these are too small to matter, and permitted inner roundings lean to a
        side only where an input has few values: a mean below LEAN counts as none (truncation has 1)."""
        g, wide = self.g, self.kind == "float32"
        if not _telling(y, SAMPLES) or (wide and np.mean((self.ideal - g) ** 2) < 9 * np.mean(self.sigma**2)):
            return 0.0
        rows = np.empty(len(y))
        step = max(1, BLOCK // y[0].size)
        for part in (slice(at, at + step) for at in range(0, len(y), step)):
            size = np.abs(g[part])
            direction = np.sign(np.abs(y[part]) - size) - np.sign(np.abs(self.ideal[part]) - size)
            direction[size < tiny(self.kind)] = 0  # may be flushed to zero
            if not wide:
                direction[size < 16 * self.sigma[part]] = 0  # so near to zero any error leads away from it
            rows[part] = direction.reshape(len(direction), -1).mean(-1)
        if not wide and abs(rows.mean()) < LEAN:
            return 0.0
        return float(rows.mean() / max(float(rows.std()), y[0].size ** -0.5) * np.sqrt(len(rows)))

    def _column(self, y: Array) -> float:
        """Beyond the ideal chip's own, in 16 bits: a parameter that was rounded is wrong in the same way in every row;
        roundings of a row's own values are not."""
        if self.kind == "float32" or not _telling(y, 4 * SAMPLES):
            return 0.0
        error: Array = np.empty(y.shape)
        u, least = UNIT_ROUNDOFF[self.kind], tiny(self.kind)
        for x, g, ideal, off in _blocks(y, self.g, self.ideal, error):
            np.divide(np.abs(x) - np.abs(ideal), u * np.maximum(np.abs(g), least), out=off)
        error = error.reshape(len(y), -1)
        mean = error.mean(0)
        if np.mean(mean**2) < STEADY**2:
            return 0.0
        return float(np.sqrt(np.mean((mean / np.maximum(error.std(0), len(y) ** -0.5)) ** 2) * len(y)))

    def _zeros(self, y: Array, least: float) -> float:
        if np.count_nonzero(y) == y.size:
            return 0.0
        there = np.abs(self.ideal) > np.maximum(tiny(self.kind), self.sigma * least)
        return np.count_nonzero(there & (y == 0)) / max(int(np.count_nonzero(there)), SAMPLES)


def _blocks(*arrays: Array) -> Iterator[Sequence[Array]]:
    """Arrays of one shape in pieces that a core's cache holds."""
    if not all(a.flags.c_contiguous for a in arrays):
        yield arrays
        return
    flat = [a.reshape(-1) for a in arrays]
    for at in range(0, flat[0].size, BLOCK):
        yield [f[at : at + BLOCK] for f in flat]


def tiny(kind: str) -> float:
    """Half the smallest step of float16; elsewhere the smallest normal number, below which chips may flush to zero."""
    return 2.0**-25 if kind == "float16" else 2.0**-126


def _telling(y: Array, rows: int) -> bool:
    """Whether there are that many rows, wide enough to have a mean."""
    return y.ndim > 1 and len(y) >= rows and y[0].size >= 64
