"""What execution brings back, and how two results are compared bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from porthal.hal.dtypes import dtype, is_float

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Outcome:
    """Results in logical form by name (an array, or the arrays of an operand's parts), and what must not have happened.

    again       another run's results: the first that differ, where any do
    trespasses  what changed that the call may not write
    error       what the kernel raised
    moved       results of the same rows among others (see `invariance`), where there is such a call
    invariant   whether the kernel declares that these are the same bits
    flushes     whether the backend says that it may read denormals as zero
    """

    results: Mapping[str, Any] = field(default_factory=dict)
    again: Mapping[str, Any] = field(default_factory=dict)
    trespasses: tuple[str, ...] = ()
    error: str = ""
    moved: Mapping[str, Any] = field(default_factory=dict)
    invariant: bool = False
    flushes: bool = False


def bits(x: Array) -> Array:
    """An array's bits, all NaN alike."""
    x = np.ascontiguousarray(x)
    if not is_float(dtype(x)):
        return x
    found = x.view(f"u{x.dtype.itemsize}")
    if (nan := np.isnan(x)).any():
        found = found.copy()
        found[nan] = np.array(np.nan, x.dtype).view(found.dtype)
    return found


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same bits throughout, of NaN as well; cheaper than to say where they differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    word = f"u{a.dtype.itemsize}"
    return bool((a.view(word) == b.view(word)).all())


def differing(a: Array, b: Array) -> Array:
    """Where the bits of two arrays of one shape differ, all NaN alike."""
    return np.zeros(a.shape, bool) if same_bits(a, b) else bits(a) != bits(b)


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The first element whose bits differ: "y[3, 5] is 1.5, then 1.25"; "" where none does."""
    for name, one in first.items():
        other = second[name]
        pairs = [(f"{name}.{part}", one[part], other[part]) for part in one] if isinstance(one, dict) else [(name, one, other)]
        for what, a, b in pairs:
            if a.shape != b.shape:
                return f"{what} has shape {list(a.shape)}, then {list(b.shape)}"
            if (differs := differing(a, b)).any():
                at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differs)), differs.shape))
                return f"{what}{list(at)} is {a[at]}, then {b[at]}"
    return ""
