"""Statistics of a float result's errors against those of an ideal chip, which rounds the reference once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np

from porthal.conformance.cases.inputs import Array
from porthal.conformance.level import Level
from porthal.hal.dtypes import BLOCK, UNIT_ROUNDOFF

BIAS = 6.0  # |z| of the rounding direction and of a column's error, rows as samples
USUAL = 3.0  # of these, what permitted rounding alone may reach
LEAN = 0.25  # mean rounding direction in 16 bits, below which it counts as none
STEADY = 0.1  # mean error of a column in unit roundoffs, below which it counts as none: a rounded parameter has 0.2
ZEROS, BLANKS = 0.1, 0.5  # shares of results that may be zero where the reference is not
SAMPLES = 16  # rows that are enough to see a direction of rounding, and
ELEMENTS = 256  # elements, of different values, where there are fewer rows
WIDTH = 64  # elements of a row that has a mean
# The statistics that take so many samples, in words.
FEW = {
    "whole": "the error of the whole",
    "row": "the error of a row",
    "direction": "the direction of rounding",
    "column": "the error of a column",
}


@dataclass(frozen=True)
class Measure:
    """Statistics of any result against one reference.

    whole, row   root mean square error over that of the ideal chip, of the whole and of the worst row
    direction    z of the mean rounding direction: rows as samples, in 16 bits elements where there are few rows
    column       root mean square over columns of z of each column's mean error, rows as samples; of few rows, z of how
                 their errors agree, columns as samples
    zeros        the share of zeros among values above the permitted deviation
    blanks       and among values not far below it, as sums that cancel are

    One of which there are too few samples is left out.
    """

    g: Array
    ideal: Array
    sigma: Array
    kind: str

    def __call__(self, y: Array) -> dict[str, float]:
        whole, row = self._ratios(y)
        signs = {"direction": self._direction(y), "column": self._column(y)}
        found = {"whole": whole, "row": row, **signs, "zeros": self._zeros(y, 2.0), "blanks": self._zeros(y, 2.0**-10)}
        return {test: figure for test, figure in found.items() if figure is not None}

    @staticmethod
    def limits(limit: Level, others: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """What each may be. Where permitted rounding alone gives more than usual, because the sample has few numbers or
        they share roundings, the limit rises with it; that of a column, of which chance decides then, has no end."""
        usual = {"whole": (limit.whole, 1.0), "row": (limit.row, 1.0), "direction": (BIAS, USUAL), "column": (BIAS, USUAL)}
        usual |= {"zeros": (ZEROS, ZEROS), "blanks": (BLANKS, BLANKS)}
        shown = {test: max((abs(o.get(test, 0.0)) for o in others), default=0.0) for test in usual}
        found = {test: most * max(1.0, shown[test] / share) for test, (most, share) in usual.items()}
        return found | ({"column": inf} if shown["column"] > BIAS else {})

    def _ratios(self, y: Array) -> tuple[float | None, float | None]:
        """The granted error is the ideal chip's, at least that of uniform rounding, plus the permitted deviation."""
        u, least = UNIT_ROUNDOFF[self.kind], tiny(self.kind) ** 2
        square, granted = np.empty(y.shape), np.empty(y.shape)
        for x, g, ideal, sigma, off, most in _blocks(y, self.g, self.ideal, self.sigma, square, granted):
            np.square(x - g, out=off)
            np.square(ideal - g, out=most)
            np.maximum(most, (u * g / 3) ** 2, out=most)
            most += sigma**2
            most += least
        whole = float(np.sqrt(np.mean(square) / np.mean(granted))) if square.size >= ELEMENTS else None
        if square.ndim < 2 or square.shape[-1] < WIDTH:
            return whole, None
        return whole, float(np.sqrt(np.max(np.mean(square, axis=-1) / np.mean(granted, axis=-1))))

    def _direction(self, y: Array) -> float | None:
        """Beyond the ideal chip's own. In float32 it is 0 unless output rounding dominates: errors of a sum or a
        function may lean to one side. In 16 bits these are too small to matter, and permitted inner roundings lean to a
        side only where an input has few values: a mean below LEAN counts as none (truncation has 1)."""
        wide = self.kind == "float32"
        if wide and np.mean((self.ideal - self.g) ** 2) < 9 * np.mean(self.sigma**2):
            return 0.0
        rows = len(y) if len(y) >= SAMPLES else prod(y.shape[:-1])  # heads as rows, where there are few rows
        g, ideal, sigma, y = (a.reshape(rows, -1) for a in (self.g, self.ideal, self.sigma, y))
        if rows < SAMPLES or y.shape[1] < WIDTH:
            return None if wide else self._direction_of_few(g, ideal, sigma, y)
        leaning, step = np.empty(rows), max(1, BLOCK // y.shape[1])
        for part in (slice(at, at + step) for at in range(0, rows, step)):
            leaning[part] = _signs(g[part], ideal[part], sigma[part], y[part], self.kind).mean(-1)
        return 0.0 if not wide and abs(leaning.mean()) < LEAN else _z(leaning, y.shape[1])

    def _direction_of_few(self, g: Array, ideal: Array, sigma: Array, y: Array) -> float | None:
        """With elements as samples: those that are rounded at all, each value once."""
        inexact = ideal != g
        if np.count_nonzero(inexact) < ELEMENTS:
            return None
        signs = _signs(g[inexact], ideal[inexact], sigma[inexact], y[inexact], self.kind)
        inner = 4 * np.mean(sigma[inexact] ** 2) > np.mean((ideal - g)[inexact] ** 2)  # which elements of a row may share
        if abs(signs.mean()) < (2 * LEAN if inner else LEAN):
            return 0.0
        _, once = np.unique(g[inexact].astype(np.float32), return_index=True)
        return _z(signs[once], len(once)) if len(once) >= ELEMENTS else None

    def _column(self, y: Array) -> float | None:
        """Beyond the ideal chip's own, in 16 bits: a parameter that was rounded is wrong in the same way in every row;
        roundings of a row's own values are not."""
        if self.kind == "float32":
            return 0.0
        few = len(y) < 4 * SAMPLES
        if y.ndim < 2 or y[0].size < (ELEMENTS if few else WIDTH) or len(y) < 2:
            return None
        error: Array = np.empty(y.shape)
        u, least = UNIT_ROUNDOFF[self.kind], tiny(self.kind)
        for x, g, ideal, off in _blocks(y, self.g, self.ideal, error):
            np.divide(np.abs(x) - np.abs(ideal), u * np.maximum(np.abs(g), least), out=off)
        error = error.reshape(len(y), -1)
        if few:
            return _alike(error, y.shape[1] if y.ndim > 2 and y.shape[1] >= SAMPLES else error.shape[1])
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


def _signs(g: Array, ideal: Array, sigma: Array, y: Array, kind: str) -> Array:
    """-2 to 2: in which direction these elements were rounded, less that of the ideal chip."""
    size = np.abs(g)
    signs: Array = np.sign(np.abs(y) - size) - np.sign(np.abs(ideal) - size)
    signs[size < tiny(kind)] = 0  # may be flushed to zero
    if kind != "float32":
        signs[size < 16 * sigma] = 0  # so near to zero any error leads away from it
    return signs


def _z(samples: Array, each: int) -> float:
    """How far their mean is from 0, in standard deviations; these are at least what so many signs `each` give."""
    return float(samples.mean() / max(float(samples.std()), each**-0.5) * np.sqrt(len(samples)))


def _alike(error: Array, samples: int) -> float:
    """z of how the errors of two rows agree, columns as samples, or heads, whose columns share roundings: the mean over all
    pairs of rows of their product. What a whole row leans is taken off, and no error counts as more than an ulp."""
    error = np.clip(error, -2, 2)
    error -= error.mean(1, keepdims=True)
    rows = len(error)
    product = (error.sum(0) ** 2 - np.square(error).sum(0)) / (rows * (rows - 1))
    if product.mean() < STEADY**2:
        return 0.0
    each = product.reshape(samples, -1).mean(1)
    return float(each.mean() / max(float(each.std()), STEADY**2 * (samples / product.size) ** 0.5) * np.sqrt(samples))
