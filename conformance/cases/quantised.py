"""Values for what is quantised: at the ends of the codes, in the middle between two, and blocks of every size."""

from __future__ import annotations

import numpy as np

from porthal.conformance.cases.values import Array, Draw, recipe
from porthal.hal import scheme_of
from porthal.hal.scheme import TOP

RUN = 16  # numbers of one size: as many as the smallest blocks have


@recipe
def pegged(draw: Draw) -> Array:
    """Both ends of what the codes hold, every second number; the largest magnitude of a block has both signs. A quarter of
    the usual size, as products of numbers that are nearly all large leave float16."""
    x = draw.bell()
    ends = draw.integers(0, 4, "ends")
    size = np.abs(x).max(initial=0)
    return np.where(ends < 2, x, np.where(ends == 2, size, -size)) / 4


@recipe
def uneven(draw: Draw) -> Array:
    """Every run of numbers has a size of its own, and some are zero: a scale of another block is far off."""
    runs = Draw(f"{draw.key}/runs", (*draw.shape[:-1], -(-draw.shape[-1] // RUN)))
    size = np.where(runs.integers(0, 8, "zero") == 0, 0.0, 2.0 ** runs.integers(-12, 3, "size"))
    return draw.bell() * np.repeat(size, RUN, -1)[..., : draw.shape[-1]]


@recipe
def vast(draw: Draw) -> Array:
    """Scales near the end of float32."""
    return draw.bell() * 2.0**100


@recipe
def slight(draw: Draw) -> Array:
    """Scales that are denormal in float32, of numbers that are not."""
    return draw.bell() * 2.0**-122


@recipe
def dim(draw: Draw) -> Array:
    """Rows so small that a least scale, as some quantisers have one, is larger than theirs."""
    rows = Draw(f"{draw.key}/rows", (*draw.shape[:-1], 1))
    return draw.bell() * 2.0 ** (rows.integers(0, 8) - 24)


@recipe
def halfway(draw: Draw) -> Array:
    """On codes and in the middle between two, where the scale is a power of two; a row's largest magnitude stands in every
    run, of either sign."""
    scheme = scheme_of(draw.sizes["scheme"])
    codes = np.unique(scheme.decoded(np.arange(128, dtype=np.uint8)))
    grid = codes[(codes >= 0) & (codes <= TOP[scheme.codes])]  # NaN is neither
    places = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    x = places[draw.integers(0, len(places), "at")]
    x[..., ::RUN] = grid[-1]
    rows = Draw(f"{draw.key}/rows", (*draw.shape[:-1], 1))
    return x * np.where(draw.integers(0, 2, "sign") == 0, 1.0, -1.0) * 2.0 ** rows.integers(-10, -3)
