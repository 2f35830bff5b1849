"""The words in which references state where a chip may round.

In golden mode every helper is exact float64 arithmetic. In noise mode (`with noise(...)`) it perturbs its result by what
an honest machine may do at that point, so that running a reference a few times yields the error budget of any formula.
The sign is a hash of the value: a machine rounds equal numbers alike, and a sum over them adds up what they are off by.

dot, total       a reduction of K terms accumulated in float32: +-sqrt(K) * 2^-24 * (the same sum of magnitudes)
may_round        a value that may be stored in a narrow dtype: +-u * |v| where the contract's dtype permits
single           a value held in float32: +-2^-24 * |v|
elementary       exp, sigmoid, ...: +-ulps * 2^-24 * |v|

The last three may also flush what float32 holds only as a denormal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from math import prod
from typing import Any

import numpy as np

from porthal.hal.dtypes import UNIT_ROUNDOFF, narrow, widen

Array = np.ndarray[Any, Any]
U_ACC = UNIT_ROUNDOFF["float32"]
# Values of `only` for runs that round wherever that is permitted, as a chip does; the second flushes denormals to zero.
ROUNDED, ROUNDED_TO_ZERO = -1, -2
FLUSHED = 2.0**-126  # the smallest normal float32: a chip may flush what is smaller to zero


class Noise:
    """The perturbations of one noisy run: its random signs, the dtypes of the call's operands, the points met."""

    def __init__(self, rng: np.random.Generator, dtypes: Mapping[str, str], only: int | None = None) -> None:
        self.rng = rng
        self.dtypes = dtypes
        self.only = only
        self.points: list[str] = []
        self.count = 0  # perturbations so far, of which `only` the given one is made; none where it is ROUNDED
        self.reduced = False  # the formula has a reduction: errors of one row are shared among its elements

    def signs(self, value: Array, u: float = U_ACC) -> Array:
        """1 or -1, the same for values that a rounding by u moves alike, the other for their negatives."""
        self.count += 1
        salt = self.rng.integers(2**32, dtype=np.uint32)
        if self.only is not None and self.only != self.count - 1:
            return np.zeros(value.shape)
        with np.errstate(over="ignore"):
            single = np.asarray(value, np.float32)
            alike = np.uint32(max(0, 20 + round(np.log2(u))))  # bits worth an eighth of u and less
            word = (np.abs(single).view(np.uint32) >> alike ^ salt) * np.uint32(0x9E3779B1)
            word ^= word >> np.uint32(15)
            word *= np.uint32(0x85EBCA77)
            word ^= single.view(np.uint32)
        return np.copysign(1.0, word.view(np.int32))


_noise: ContextVar[Noise | None] = ContextVar("porthal_noise", default=None)


@contextmanager
def noise(rng: np.random.Generator, dtypes: Mapping[str, str], only: int | None = None) -> Iterator[Noise]:
    """Make the helpers of this module perturb, all of them or `only` the n-th one called; `dtypes` names the operands'
    and results' dtypes of the call."""
    mode = Noise(rng, dtypes, only)
    token = _noise.set(mode)
    try:
        yield mode
    finally:
        _noise.reset(token)


def dot(subscripts: str, a: Array, b: Array) -> Array:
    """Contraction of two arrays in einsum notation ("tk,nk->tn"), accumulated in float32 on a chip."""
    value = _contract(subscripts, a, b)
    mode = _noise.get()
    if mode is None:
        return value
    mode.reduced = True
    left, right = subscripts.split("->")
    size = dict(zip(left.replace(",", ""), a.shape + b.shape))
    terms = np.prod([n for s, n in size.items() if s not in right]) if value.size else 1
    magnitude = _contract(subscripts, np.abs(a), np.abs(b))
    return np.asarray(value + mode.signs(value) * (np.sqrt(float(terms)) * U_ACC) * magnitude)


def total(x: Array, axis: int = -1, keepdims: bool = False) -> Array:
    """Sum along one axis, accumulated in float32 on a chip."""
    value = np.asarray(np.sum(x, axis=axis, keepdims=keepdims))
    mode = _noise.get()
    if mode is None:
        return value
    mode.reduced = True
    magnitude = np.sum(np.abs(x), axis=axis, keepdims=keepdims)
    return np.asarray(value + mode.signs(value) * np.sqrt(max(x.shape[axis], 1)) * U_ACC * magnitude)


def may_round(name: str, value: Array, to: str) -> Array:
    """A point at which a kernel may round to the dtype `to` (an operand's or result's name, or a dtype)."""
    mode = _noise.get()
    if mode is None:
        return value
    mode.points.append(name)
    dtype = mode.dtypes.get(to, to)
    return _perturb(mode, value, UNIT_ROUNDOFF[dtype], 2.0**-25 if dtype == "float16" else FLUSHED, dtype)


def single(value: Array) -> Array:
    """An intermediate result held in float32."""
    mode = _noise.get()
    return value if mode is None else _perturb(mode, value, U_ACC)


def elementary(f: Callable[[Array], Array], x: Array, ulps: float = 4) -> Array:
    """An elementary function, correct to a few units in the last place of float32."""
    mode = _noise.get()
    return f(x) if mode is None else _perturb(mode, f(x), ulps * U_ACC)


def _perturb(mode: Noise, value: Array, u: float, least: float = FLUSHED, dtype: str = "float32") -> Array:
    if mode.only in (ROUNDED, ROUNDED_TO_ZERO):
        rounded = widen(narrow(np.asarray(value), dtype))
        return np.where(np.abs(rounded) < FLUSHED, 0.0, rounded) if mode.only == ROUNDED_TO_ZERO else rounded
    with np.errstate(invalid="ignore"):
        return np.asarray(value + mode.signs(value, u) * (u * np.abs(value) + least) / np.sqrt(3))


def softmax(x: Array) -> tuple[Array, Array]:
    """exp(x - max) and its sum over the last axis; a row without a finite score gives zeros."""
    top = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
    e = elementary(np.exp, np.where(np.isneginf(x), -np.inf, single(x - np.where(np.isneginf(top), 0.0, top))))
    return e, total(e, keepdims=True)


def softmax_slack(logits: Array, temperature: Array, **_: Any) -> float:
    """By how much probabilities that softmax gives in float32 may be off, summed up: four ulps of exp, its argument's
    rounding, and a running sum over all logits."""
    hottest = np.abs(logits[np.isfinite(logits)]).max(initial=0) / np.where(temperature > 0, temperature, 1).min(initial=1)
    return float(U_ACC * (8 + 2 * hottest + 6 * np.sqrt(logits.shape[-1])))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, e) / (1.0 + e))


def choose(scores: Array, k: int) -> Array:
    """int32 [rows, k]: positions of the k highest scores, highest first, ties to the lowest position.

    NaN counts as -inf. Positions scored -inf by exclusion (`excluded`) are the caller's business.
    """
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=-1, kind="stable")[..., :k]
    return order.astype(np.int32)


def _contract(subscripts: str, a: Array, b: Array) -> Array:
    """einsum of two operands through matmul, which is BLAS also when there are batch axes."""
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
