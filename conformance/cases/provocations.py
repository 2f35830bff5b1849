"""Value generators that are named by what they provoke in a kernel; each is legal, and what an honest kernel computes right."""

from __future__ import annotations

from itertools import cycle, islice

import numpy as np

from porthal.conformance.cases.values import Array, Draw, recipe, spelled

BLOCKS = (64, 128, 1024)  # adjacent numbers that a kernel looks at together
LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127, "float32": (2 - 2.0**-23) * 2.0**127}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


def _rows(x: Array) -> Array:
    """As [rows, width], a view."""
    return x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, 1)


def _blocks(draw: Draw) -> Array:
    """int64 [rows, width]: which block of 64, 128 or 1024 numbers each stands in, row by row in turn."""
    rows, width = _rows(np.empty(draw.shape)).shape
    size = np.array(BLOCKS)[np.arange(rows) % len(BLOCKS), None]
    return np.arange(width) // np.minimum(size, max(width // 2, 1))


# -- scores ----------------------------------------------------------------------------------------------------------


@spelled("blocked")
def blocks_masked_whole(draw: Draw) -> Array:
    """The first block of a row is -inf, and every second one: a running maximum starts with nothing."""
    x = draw.bell()
    block = _blocks(draw)
    _rows(x)[(block % 2 == 0) & (block != block.max(initial=0, axis=-1, keepdims=True))] = -np.inf
    return x


@spelled("shelves")
def ties_wider_than_k(draw: Draw) -> Array:
    """Every block is one number, of three: whichever is the k-th stands in a long plateau."""
    levels = Draw(draw.key, (3, *_rows(np.empty(draw.shape)).shape)).integers(-1, 2)
    return np.asarray(np.take_along_axis(levels[0], _blocks(draw), axis=-1).reshape(draw.shape) * 0.5)


@spelled("rising")
def highest_last(draw: Draw) -> Array:
    """Ever higher along every even row, ever lower along the odd ones, in steps that the dtype may not tell apart."""
    x = np.zeros(draw.shape)
    rows, width = _rows(x).shape
    step = 2.0 ** -max(0, width.bit_length() - 9)
    _rows(x)[:] = (np.arange(width) - width // 2) * step * np.where(np.arange(rows) % 2, -1, 1)[:, None]
    return x


@spelled("summit")
def highest_at_an_end(draw: Draw) -> Array:
    """The one high number stands last in every even row, and first in the odd ones."""
    x = draw.bell()
    rows = _rows(x)
    rows[np.arange(len(rows)), np.where(np.arange(len(rows)) % 2, 0, -1)] += 8
    return x


@spelled("crest")
def plateau_with_high_ends(draw: Draw) -> Array:
    """All equal, but a few high numbers last in every even row, and first in the odd ones: a choice is cut among equals that
    stand before what is above them."""
    x = np.zeros(draw.shape)
    rows = _rows(x)
    rows[::2, -3:] = rows[1::2, :3] = 1
    return x


@spelled("halved")
def half_masked(draw: Draw) -> Array:
    """The first half of every even row is -inf, of odd ones the second: whole tiles, or what a rank has of a vocabulary."""
    x = draw.bell()
    rows, half = _rows(x), draw.shape[-1] // 2
    rows[::2, :half] = rows[1::2, half:] = -np.inf
    rows[1::2, :1] = 0  # of one number nothing is left out
    return x


# -- sums ------------------------------------------------------------------------------------------------------------


@spelled("cancel")
def terms_that_cancel(draw: Draw) -> Array:
    """Pairs of opposite numbers, neighbours in even rows and a half apart in odd ones: what is left are four numbers."""
    x = draw.bell()
    rows, half = _rows(x), draw.shape[-1] // 2
    rows[::2, 1 : 2 * half : 2] = -rows[::2, : 2 * half : 2]
    rows[1::2, half : 2 * half] = -rows[1::2, :half]
    rows[:, half : half + 4] *= 0.5
    return x


@spelled("surge")
def partial_sums_overflow(draw: Draw) -> Array:
    """Two thirds positive, then one third negative: on the way lies a sum beyond float16's range, where the total is not."""
    width = max(draw.shape[-1], 1)
    x = (draw.bell() * 0.125 + 1) * (150000 / width)
    x[..., -(width // 3) :] *= -1
    return x


@recipe
def level(draw: Draw) -> Array:
    """Each row one number, from 1/2 to 1: what is multiplied by it cancels as it does alone."""
    x = np.ones(draw.shape)
    _rows(x)[:] = 1 - (np.arange(len(_rows(x))) % 8)[:, None] * 0.0625
    return x


@spelled("sinking")
def scores_far_below_zero(draw: Draw) -> Array:
    """All negative: with keys far above zero every score is some -10^4, and a maximum that starts higher is never left."""
    return -8 - np.abs(draw.bell())


# What other operands, of a kind or by their default generator, hold so that a provocation in one comes through.
COMPANIONS = {
    "cancel": ("Weight", "level"),
    "surge": ("Weight", "level"),
    "sinking": ("Pages", "offset"),
    "cold": ("normal", "small"),
}


@spelled("lean")
def beside_a_number_of_fewer_digits(draw: Draw) -> Array:
    """All positive, and three eighths of a step above a number of bfloat16, and of float16: what narrows them is always low."""
    steps = draw.integers(0, 2**7, "digits") + 0.375 * (1 + 2.0**-3)
    return (1 + steps * 2.0**-7) * 2.0 ** draw.integers(-1, 2, "size")


@recipe
def verge(draw: Draw) -> Array:
    """Around the largest and the least number of narrower dtypes, and the middle to what would be the next."""
    at = []
    for kind, step in (("float16", 2.0**5), ("bfloat16", 2.0**120)):
        largest, least = LARGEST[kind], SMALLEST[kind]
        at += [largest + part * step for part in (0, 0.25, 0.4375, 0.5, 0.5625)]
        at += [least * part for part in (0.4375, 0.5, 0.5625, 1.5)]
    return np.array([*at, *(-x for x in at)])[draw.integers(0, 2 * len(at), "at")]


# -- magnitudes ------------------------------------------------------------------------------------------------------


@spelled("seesaw")
def tiny_and_huge_rows(draw: Draw) -> Array:
    """Rows of small and of large numbers in turn: what belongs to one row must not be used in the next."""
    x, high = draw.bell(), 2.0 ** (3 if draw.dtype == "float16" else 7)
    _rows(x)[:] *= np.where(np.arange(len(_rows(x))) % 2, high, 2.0**-7)[:, None]
    return x


@spelled("pillar")
def one_heavy_row_and_column(draw: Draw) -> Array:
    """A weight with one row and one column of outliers."""
    x = draw.bell() * 2.0 ** -((max(draw.shape[-1], 1).bit_length()) // 2)
    if x.size:
        x[..., draw.shape[-1] // 3] *= 32
        x[..., (draw.shape[-2] if x.ndim > 1 else 1) // 3 * (x.ndim > 1), :] *= 32
    return x


@spelled("hollow")
def blocks_of_zeros(draw: Draw) -> Array:
    """Rows in blocks of 16, every second block zero: equal scores, far more than are chosen."""
    x = draw.bell()
    x[np.arange(len(x)) // 16 % 2 == 0] = 0
    return x


@spelled("rim")
def special_at_the_end(draw: Draw) -> Array:
    """The last number of the rows in turn: finite, NaN, +inf, -inf."""
    x = draw.bell()
    if x.size:
        last = _rows(x)[:, -1]
        for r, number in ((1, np.nan), (2, np.inf), (3, -np.inf)):
            last[r::4] = number
    return x


@spelled("rear")
def heavy_at_the_end(draw: Draw) -> Array:
    """The last number of each row is 256 times the others."""
    x = draw.bell()
    x[..., -1:] *= 256
    return x


@recipe
def faint(draw: Draw) -> Array:
    """Denormal in float16, and normal in the others."""
    return draw.bell() * 2.0**-18


@spelled("extreme")
def ends_of_the_dtype(draw: Draw) -> Array:
    """The largest and smallest finite numbers of the dtype, of both signs, and both zeros."""
    most, least = LARGEST[draw.dtype], SMALLEST[draw.dtype]
    return np.array([most, -most, least, -least, 0.0, -0.0])[draw.integers(0, 6)]


# -- how tokens are drawn --------------------------------------------------------------------------------------------


@spelled("greedy")
def greedy_row_first(draw: Draw) -> Array:
    """Temperatures of all kinds behind a row that is not drawn: it must not decide how the others are served."""
    heat = np.array([0.0, 0.5, 1.0, 1.5])[draw.integers(0, 4)]
    heat[:1] = 0
    return heat


@spelled("hot")
def high_temperature(draw: Draw) -> Array:
    """Up to the highest that is legal: all logits are nearly alike."""
    return np.array([1e4, 100.0, 16.0, 0.0])[draw.integers(0, 4)]


@spelled("brink")
def ends_of_top_p(draw: Draw) -> Array:
    """Nothing, almost nothing, almost all, all; and a sum that equal probabilities reach exactly."""
    return np.array([0.0, 2.0**-24, 1 - 2.0**-24, 1.0, 0.5])[draw.integers(0, 5)]


@spelled("brim")
def ends_of_top_k(draw: Draw) -> Array:
    V = draw.sizes["V"]
    return np.clip(np.array([0, 1, V - 1, V])[draw.integers(0, 4)], 0, V)


@spelled("refused")
def first_draft_rejected(draw: Draw) -> Array:
    """The first number of a row as high as can be, the others 0."""
    x = np.zeros(draw.shape)
    x[..., :1] = 1 - 2.0**-24
    return x


@spelled("stopped")
def last_draft_rejected(draw: Draw) -> Array:
    """All 0 but the last two of a row: the draft before the token, and the token."""
    x = np.zeros(draw.shape)
    x[..., -2:] = 1 - 2.0**-24
    return x


# -- routing ---------------------------------------------------------------------------------------------------------


@spelled("tiers")
def bias_that_dominates(draw: Draw) -> Array:
    """Far above any probability, in sixteen tiers, within which the probabilities decide."""
    return draw.integers(1, 17) * 8.0


def _one(draw: Draw, expert: int) -> Array:
    ids = np.full(draw.shape, -1, np.int64)
    ids[np.arange(len(ids)), np.arange(len(ids)) % ids.shape[1]] = expert + draw.sizes.get("first_expert", 0)
    return ids


@spelled("eldest")
def first_expert_only(draw: Draw) -> Array:
    return _one(draw, 0)


@spelled("central")
def middle_expert_only(draw: Draw) -> Array:
    return _one(draw, draw.sizes["E"] // 2)


@spelled("even")
def one_row_each(draw: Draw) -> Array:
    """Expert after expert, as many rows each as all others, or one more."""
    n = np.arange(draw.shape[0] * draw.shape[1]).reshape(draw.shape)
    return n % draw.sizes["E"] + draw.sizes.get("first_expert", 0)


@spelled("ragged")
def loads_that_grow(draw: Draw) -> Array:
    """Expert e has about e times as many rows as expert 1; a row may have one twice."""
    E = draw.sizes["E"]
    at = draw.integers(0, E * (E + 1) // 2)
    ends = np.cumsum(np.arange(1, E + 1))
    return np.searchsorted(ends, at, side="right") + draw.sizes.get("first_expert", 0)


def _counts(draw: Draw, loads: Array) -> Array:
    """As many of these loads as there are rows for."""
    M = draw.sizes["M"]
    return np.diff(np.minimum(np.cumsum(loads), M), prepend=0)


@spelled("heap")
def all_on_the_first(draw: Draw) -> Array:
    return _counts(draw, np.where(np.arange(draw.shape[0]) == 0, draw.sizes["M"], 0))


@spelled("waist")
def all_on_the_middle(draw: Draw) -> Array:
    return _counts(draw, np.where(np.arange(draw.shape[0]) == draw.shape[0] // 2, draw.sizes["M"], 0))


@spelled("single")
def one_row_of_each(draw: Draw) -> Array:
    return _counts(draw, np.ones(draw.shape[0], np.int64))


@spelled("tiled")
def loads_beside_tiles(draw: Draw) -> Array:
    """Loads at which tiles of rows end: 16, 17, 15, 1, 0, and so on."""
    return _counts(draw, np.array(list(islice(cycle((16, 17, 15, 1, 0, 32, 33)), draw.shape[0]))))
