"""Canonical dtype names for the arrays of every library, and exact rounding from float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from porthal.hal.errors import UsageError

# Unit roundoff u = 2^-(p) of the formats, p = precision in bits including the hidden one.
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3fn": 2.0**-4,
}
_EXTENSION = ("bfloat16", "float8_e4m3fn")
FLOATS = ("float32", "bfloat16", "float16")
INTEGERS = ("int8", "uint8", "int32", "int64", "bool")


def dtype(x: Any) -> str:
    """The canonical name of an array's dtype, "bfloat16" for NumPy (ml_dtypes) and torch alike."""
    return _name(x.dtype)


@cache
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a canonical name; bfloat16 and float8 come from ml_dtypes, imported on first use."""
    if name in _EXTENSION:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    if name in UNIT_ROUNDOFF or name in INTEGERS:
        return np.dtype(name)
    known = ", ".join((*UNIT_ROUNDOFF, *INTEGERS))
    raise UsageError(f"unknown dtype {name!r}: expected one of {known}")


def is_float(name: str) -> bool:
    return name in UNIT_ROUNDOFF


def itemsize(name: str) -> int:
    return numpy_dtype(name).itemsize


def widen(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Floats to float64, exactly; everything else unchanged."""
    if x.dtype == np.float64 or not is_float(dtype(x)):
        return x
    if dtype(x) == "bfloat16":  # a shift is faster than ml_dtypes' cast, and as exact
        bits = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).astype(np.float64).reshape(x.shape)
    return x.astype(np.float64)


def narrow(x: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Round float64 once, to nearest even, to the named dtype (ml_dtypes' own casts go through float32 and round twice)."""
    if dtype(x) == name:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "bfloat16":
            return _bfloat16_bits(x).view(numpy_dtype("bfloat16"))
        return (_rounded_to_odd(x) if name in _EXTENSION else x).astype(numpy_dtype(name))


def _rounded_to_odd(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 whose last bit says whether anything was lost, so that rounding it again is rounding once."""
    single = np.ascontiguousarray(x, dtype=np.float32)
    inexact = np.abs(single.astype(np.float64)) - np.abs(x)
    bits = single.view(np.uint32).copy()
    bits -= (inexact > 0).astype(np.uint32)  # step back where the cast rounded away from zero
    bits |= (inexact != 0) & ~np.isnan(inexact)
    return bits.view(np.float32).reshape(x.shape)


def _bfloat16_bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = _rounded_to_odd(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.asarray(np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16).reshape(x.shape))
