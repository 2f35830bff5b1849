"""The functions by which references state where a chip may round.

In golden mode every helper is exact float64 arithmetic. In noise mode (`with noise(...)`) it perturbs its result by what
an honest chip may do at that point, so that running a reference a few times yields the error budget of any formula.
The sign is a hash of the value: a chip rounds equal numbers alike, so in a sum over them the errors add up.

dot, total       a reduction of K terms accumulated in float32: +-sqrt(K) * 2^-24 * (the same sum of magnitudes)
may_round        a value that may be stored in a narrow dtype: +-u * |v| where the contract's dtype permits
single           a value held in float32: +-2^-24 * |v|
elementary       exp, sigmoid, ...: +-ulps * 2^-24 * |v|
nearest          a code: either of two, where the value lies in the middle between them

may_round, single and elementary may also flush what float32 holds only as a denormal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import combinations
from math import prod, sqrt
from typing import Any

import numpy as np

from porthal.hal.dtypes import BLOCK, UNIT_ROUNDOFF, narrow, widen

Array = np.ndarray[Any, Any]
U_ACC = UNIT_ROUNDOFF["float32"]
# Values of `only` for runs that round wherever that is permitted, as a chip does; the second flushes denormals to zero.
ROUNDED, ROUNDED_TO_ZERO = -1, -2
EXACT = -3  # for a run that perturbs nothing, and counts where it could
# Arrays, with which NumPy computes faster than with its scalars.
SIZE, SIGN, FIRST_FACTOR, SECOND_FACTOR, HALF = (
    np.array(n, np.uint32) for n in (0x7FFFFFFF, 0x80000000, 0x9E3779B1, 0x85EBCA77, 15)
)
LAST_BITS = np.array(5, np.uint32)  # of a float32, which noise changes
TURNS = 8  # runs of which a share of one half are as many numbers as:
BALANCED = np.array([sum(1 << n for n in half) for half in combinations(range(TURNS), TURNS // 2)])
HIGH = int(sys.byteorder == "little")  # which half of a float64 has its sign
SUMMED = 32 * U_ACC  # how far off sums in float32 usually are at most, of the largest of a row
ROOT_3 = float(np.sqrt(3))
FLUSHED = 2.0**-126  # the smallest normal float32: a chip may flush what is smaller to zero


class Known:
    """Products that are the same in every noisy run, because no perturbation comes before them, and magnitudes that
    several runs share. An operand is recognised by its place among the products of a run, and by its bits.

    given  arrays that no reference writes to: for these and their views, the same address means the same bits
    """

    def __init__(self, given: Iterable[Any], room: int = 2**27) -> None:
        self._given = {id(_owner(array)): array for array in given if isinstance(array, np.ndarray)}
        self._room = room  # bytes that may be kept
        self._operands: dict[int, Array | None] = {}  # None: perturbed
        self._products: dict[int, tuple[Array, Array]] = {}
        self._magnitudes: dict[int, Array] = {}

    def product(self, n: int, subscripts: str, a: Array, b: Array) -> tuple[Array, Array]:
        """The n-th product of a run, and that of the magnitudes."""
        same = [self._recognised(2 * n + i, x) for i, x in enumerate((a, b))]
        if all(same) and n in self._products:
            return self._products[n]
        if not all(same) and n in self._products:
            self._room += sum(x.nbytes for x in self._products.pop(n))
        value = _contract(subscripts, a, b)
        magnitude = _contract(subscripts, *(self._magnitude(2 * n + i, x, same) for i, x in enumerate((a, b))))
        if all(same) and self._fits(value, magnitude):
            self._products[n] = value, magnitude
        return value, magnitude

    def _magnitude(self, n: int, x: Array, same: Sequence[bool]) -> Array:
        """|x|, kept where only the other operand varies."""
        if same[n % 2] and n in self._magnitudes:
            return self._magnitudes[n]
        found = np.abs(x)
        if same[n % 2] and not same[1 - n % 2] and self._fits(found):
            self._magnitudes[n] = found
        return found

    def _recognised(self, n: int, x: Array) -> bool:
        """Whether this operand is the same in all runs so far."""
        if n not in self._operands:
            self._operands[n] = x if self._is_given(x) or self._fits(x) else None
            return self._operands[n] is not None
        before = self._operands[n]
        if before is None or before is x:
            return before is not None
        if (before.shape, before.strides, before.dtype) == (x.shape, x.strides, x.dtype):
            if self._is_given(x) and before.__array_interface__["data"] == x.__array_interface__["data"]:
                return True
            if not self._is_given(x) and _same_bits(before, x):
                return True
        if not self._is_given(before):
            self._room += before.nbytes
        self._operands[n] = None
        return False

    def _is_given(self, x: Array) -> bool:
        return id(_owner(x)) in self._given

    def _fits(self, *arrays: Array) -> bool:
        size = sum(x.nbytes for x in arrays)
        self._room -= size if (fits := size <= self._room) else 0
        return fits


def _owner(x: Array) -> Array:
    """The array whose memory a view shows."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def _same_bits(a: Array, b: Array) -> bool:
    """For arrays of one shape and dtype; most that differ do so in their first row."""
    first, bits = (0,) * (a.ndim - 1), f"u{a.itemsize}"
    return not a.size or (
        bool((a[first].view(bits) == b[first].view(bits)).all()) and bool((a.view(bits) == b.view(bits)).all())
    )


class Noise:
    """The perturbations of one noisy run: its random signs, the dtypes of the call's operands, the points passed."""

    def __init__(
        self,
        rng: np.random.Generator,
        dtypes: Mapping[str, str],
        only: int | str | None = None,
        known: Known | None = None,
        turn: int = 0,
    ) -> None:
        self.dtypes = dtypes
        self.turn = turn  # the number of the run
        self.only = only
        self.known = known or Known((), 0)
        self.products = 0  # so far
        self.points: list[str] = []
        self.count = 0  # perturbations so far; `only` makes just the one of that number or name, or none if it is ROUNDED
        self.reduced = False  # the formula has a reduction: errors of one row are shared among its elements
        self._rng = rng
        self._salts: Array = np.empty(0, np.uint32)

    def shifted(self, value: Array, u: float, step: Callable[[Array], Array], beside: Array | None = None) -> Array:
        """The value plus or minus a step: alike for values that a rounding by u moves alike, the other way for their
        negatives. `step` gives its size from the value or, element by element, from the array `beside`."""
        n, self.count = self.count, self.count + 1
        if self.only is not None and self.only != n:
            return np.asarray(value + np.abs(value) * 0.0)
        if n >= len(self._salts):
            self._salts = np.append(self._salts, self._rng.integers(2**32, size=n + 16 - len(self._salts), dtype=np.uint32))
        salt, alike, out = self._salts[n, ...], _alike(u), np.empty_like(value, np.float64)
        for v, near, moved in blocks(value, value if beside is None else beside, out):
            one = v.astype(np.float32).view(np.uint32)
            word = one & SIZE
            word >>= alike
            word ^= salt
            word *= FIRST_FACTOR
            word ^= word >> HALF
            word *= SECOND_FACTOR
            word ^= one
            word &= SIGN
            size = np.ascontiguousarray(step(near))
            size.view(np.uint32)[..., HIGH::2] ^= word
            np.add(v, size.reshape(v.shape), out=moved)
        return out


    def either(self, value: Array, slack: float, beside: float) -> Array:
        """The value a share `slack` and `beside` further out or in, in half of the runs each. Of operands equal values of a row
        alike, and others seldom in the same runs, so that what they lead to does not cancel in all; intermediates, which
        lie `beside` what they are and differ from run to run, all at once."""
        n, self.count = self.count, self.count + 1
        if self.only is not None and self.only != n:
            return value
        outward: Any = 2.0 * (self.turn % 2) - 1
        if not beside:
            word = (np.abs(value).astype(np.float32).view(np.uint32) + HALF) >> LAST_BITS  # as it is without noise
            word ^= np.arange(n, n + value[..., :1].size, dtype=np.uint32).reshape(value[..., :1].shape) * SECOND_FACTOR
            word *= FIRST_FACTOR
            word ^= word >> HALF
            outward = 2.0 * (BALANCED[word % len(BALANCED)] >> self.turn % TURNS & 1) - 1
        return value * (1 + outward * slack) + outward * np.copysign(beside, value)


@cache
def _alike(u: float) -> Array:
    """How many low bits of a float32 are worth an eighth of u and less."""
    return np.array(max(0, 20 + round(np.log2(u))), np.uint32)


def blocks(*arrays: Array) -> Iterator[Sequence[Array]]:
    """Arrays of one shape in pieces that a core's cache holds; whole where their memory layouts differ."""
    if arrays[0].size <= BLOCK or any(a.strides != arrays[0].strides for a in arrays):
        yield arrays
        return
    flat = [a.ravel(order="K") for a in arrays]
    if not all(np.may_share_memory(a, f) for a, f in zip(arrays, flat)):
        yield arrays
        return
    for at in range(0, arrays[0].size, BLOCK):
        yield [f[at : at + BLOCK] for f in flat]


_noise: ContextVar[Noise | None] = ContextVar("porthal_noise", default=None)


@contextmanager
def noise(
    rng: np.random.Generator,
    dtypes: Mapping[str, str],
    only: int | str | None = None,
    known: Known | None = None,
    turn: int = 0,
) -> Iterator[Noise]:
    """Make the helpers of this module perturb, all of them or `only` the n-th one called, or round where `may_round` has that
    name; `dtypes` names the operands' and results' dtypes of the call, `known` holds what its runs have in common, and `turn`
    counts them."""
    mode = Noise(rng, dtypes, only, known, turn)
    token = _noise.set(mode)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield mode
    finally:
        _noise.reset(token)


def _perturbing(reduced: bool = False) -> Noise | None:
    """The noise mode if it perturbs here, else None."""
    mode = _noise.get()
    if mode is None:
        return None
    mode.reduced |= reduced
    if mode.only == EXACT:
        mode.count += 1
        return None
    return mode


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """Contraction of two arrays in einsum notation ("tk,nk->tn"), accumulated in float32 on a chip."""
    mode = _perturbing(reduced=True)
    if mode is None:
        return _contract(subscripts, a, b)
    if mode.only is not None and mode.only != mode.count:
        return mode.shifted(_contract(subscripts, a, b), U_ACC, np.abs)
    value, magnitude = mode.known.product(mode.products, subscripts, a, b)
    mode.products += 1
    to_a, _, _, batch, free, _ = _axes(subscripts)
    scale = sqrt(prod(a.shape[axis] for axis in to_a[batch + free :]) if value.size else 1) * U_ACC
    return mode.shifted(value, U_ACC, lambda m: scale * m, magnitude)


def total(x: Array, axis: int = -1, keepdims: bool = False) -> Array:
    """Sum along one axis, accumulated in float32 on a chip."""
    value = np.asarray(np.sum(x, axis=axis, keepdims=keepdims))
    mode = _perturbing(reduced=True)
    if mode is None:
        return value
    if mode.only is not None and mode.only != mode.count:
        return mode.shifted(value, U_ACC, np.abs)
    scale, magnitude = np.sqrt(max(x.shape[axis], 1)) * U_ACC, np.asarray(np.sum(np.abs(x), axis=axis, keepdims=keepdims))
    return mode.shifted(value, U_ACC, lambda m: scale * m, magnitude)


def may_round(name: str, value: Array, to: str) -> Array:
    """A point at which a kernel may round to the dtype `to` (an operand's or result's name, or a dtype)."""
    mode = _perturbing()
    if mode is None:
        return value
    mode.points.append(name)
    dtype = mode.dtypes.get(to, to)
    if mode.only == name:
        return widen(narrow(np.asarray(value), dtype))
    return _perturb(mode, value, UNIT_ROUNDOFF[dtype], 2.0**-25 if dtype == "float16" else FLUSHED, dtype)


def single(value: Array) -> Array:
    """An intermediate result held in float32."""
    mode = _perturbing()
    return value if mode is None else _perturb(mode, value, U_ACC)


def elementary(f: Callable[[Array], Array], x: Array, ulps: float = 4) -> Array:
    """An elementary function, correct to a few units in the last place of float32."""
    mode = _perturbing()
    return f(x) if mode is None else _perturb(mode, f(x), ulps * U_ACC)


def nearest(value: Array, code: Callable[[Array], Array], slack: float, beside: float = 0.0) -> Array:
    """The value at its nearest code: where it lies within a share `slack` and `beside` of the middle between two, a chip may
    take either, the same for equal values."""
    mode = _perturbing()
    return code(value) if mode is None else code(mode.either(value, slack, beside))


def unsettled(x: Array) -> float:
    """By how much an intermediate may be off that a kernel may have rounded to the dtype of its operands, so that codes made of
    it are others where it lies so near the middle between two; 0 where x is of that dtype already, as operands are."""
    mode = _noise.get()
    dtype = mode.dtypes.get("x", "float32") if mode else ""
    if not dtype or np.array_equal(widen(narrow(x, dtype)), x, equal_nan=True):
        return 0.0
    return 2 * UNIT_ROUNDOFF[dtype]  # as it is normed, and rounded before and after that


def _perturb(mode: Noise, value: Array, u: float, least: float = FLUSHED, dtype: str = "float32") -> Array:
    if mode.only in (ROUNDED, ROUNDED_TO_ZERO):
        rounded = widen(narrow(np.asarray(value), dtype))
        return np.where(np.abs(rounded) < FLUSHED, 0.0, rounded) if mode.only == ROUNDED_TO_ZERO else rounded

    def step(v: Array) -> Array:
        size = np.abs(v)
        size *= u
        size += least
        size /= ROOT_3
        return size

    return mode.shifted(np.asarray(value), u, step)


def softmax(x: Array) -> tuple[Array, Array]:
    """exp(x - max) and its sum over the last axis; a row without a finite score gives zeros."""
    top = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
    e = elementary(np.exp, np.where(np.isneginf(x), -np.inf, single(x - np.where(np.isneginf(top), 0.0, top))))
    return e, total(e, keepdims=True)


def softmax_slack(logits: Array, temperature: Array, **_: Any) -> Array:
    """How far off the probabilities of a float32 softmax may be in total, for each row or request: four ulps of exp, its
    argument's rounding, which is of the highest logits, as lower ones are seldom drawn, and a running sum over all logits."""
    top, V = np.where(np.isnan(logits), -np.inf, logits).max(axis=-1, initial=-np.inf), logits.shape[-1]
    highest = np.where(np.isfinite(top), np.abs(top), 0).max(axis=tuple(range(1, top.ndim)), initial=0)
    return np.asarray(U_ACC * (8 + 2 * highest / np.where(temperature > 0, temperature, 1) + np.log(V) + 6 * np.sqrt(V)))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, e) / (1.0 + e))


def choose(scores: Array, k: int) -> Array:
    """int32 [rows, k]: positions of the k highest scores, highest first, ties to the lowest position.

    NaN counts as -inf. Positions that are excluded, with score -inf, are left to the caller.
    """
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=-1, kind="stable")[..., :k]
    return order.astype(np.int32)


def _contract(subscripts: str, a: Array, b: Array) -> Array:
    """einsum of two operands through matmul, which uses BLAS with batch axes too."""
    to_a, to_b, back, batch, free, summed = _axes(subscripts)
    a, b = a.transpose(to_a), b.transpose(to_b)
    shared, rows, inner = a.shape[:batch], a.shape[batch : batch + free], prod(a.shape[batch + free :])
    columns = b.shape[batch + summed :]
    with np.errstate(invalid="ignore", over="ignore"):
        value = a.reshape(*shared, prod(rows), inner) @ b.reshape(*shared, inner, prod(columns))
    return value.reshape(shared + rows + columns).transpose(back)


@cache
def _axes(subscripts: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int, int]:
    """How the axes of two operands are ordered for matmul, and those of its result; how many are shared, free in the first
    operand, and summed."""
    (sa, sb), out = (s.strip() for s in subscripts.split("->")[0].split(",")), subscripts.split("->")[1].strip()
    batch = [s for s in sa if s in sb and s in out]
    summed = [s for s in sa if s in sb and s not in out]
    free_a, free_b = ([s for s in x if s not in batch and s not in summed] for x in (sa, sb))
    axes = batch + free_a + free_b
    to_a, to_b = (sa.index(s) for s in batch + free_a + summed), (sb.index(s) for s in batch + summed + free_b)
    return tuple(to_a), tuple(to_b), tuple(axes.index(s) for s in out), len(batch), len(free_a), len(summed)
