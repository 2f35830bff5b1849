"""Canonical dtype names for the arrays of every library, and exact rounding from float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from porthal.hal.errors import UsageError

# Unit roundoff u = 2^-p of the formats, p = precision in bits including the hidden one.
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3fn": 2.0**-4,
}
_EXTENSION = ("bfloat16", "float8_e4m3fn")
FLOATS = ("float32", "bfloat16", "float16")
_ONE, _HALF, _BELOW, _MIDDLE, _LOST = (np.array(n, np.uint32) for n in (1, 16, 0x7FFF, 0x8000, 0xFFFF))
BLOCK = 2**14  # elements that stay in a core's cache while several passes go over them
MOVED = (*FLOATS, "int32", "int8", "uint8")  # among ranks, bit for bit
INTEGERS = ("int8", "uint8", "int32", "int64", "bool")
DTYPES = (*UNIT_ROUNDOFF, *INTEGERS)


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
    if name in DTYPES:
        return np.dtype(name)
    raise UsageError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")


def is_float(name: str) -> bool:
    return name in UNIT_ROUNDOFF


def itemsize(name: str) -> int:
    return numpy_dtype(name).itemsize


def widen(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Floats to float64, exactly; everything else unchanged."""
    if x.dtype == np.float64 or not is_float(dtype(x)):
        return x
    if dtype(x) == "bfloat16":  # a shift is faster than ml_dtypes' cast, and as exact
        flat = np.ascontiguousarray(x).reshape(-1).view(np.uint16)
        out = np.empty(flat.shape, np.float64)
        for at in range(0, flat.size, BLOCK):
            part = slice(at, at + BLOCK)
            out[part] = (flat[part].astype(np.uint32) << np.uint32(16)).view(np.float32)
        return out.reshape(x.shape)
    with np.errstate(invalid="ignore"):  # a NaN may be a signalling one
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
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty(flat.shape, np.uint16)
    for at in range(0, flat.size, BLOCK):
        part = slice(at, at + BLOCK)
        out[part] = _rounded(flat[part])
    return out.reshape(x.shape)


def _rounded(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Through float32, which rounds as x does unless it lies exactly in the middle between two bfloat16 numbers."""
    bits = x.astype(np.float32).view(np.uint32)
    middle = np.flatnonzero((bits & _LOST) == _MIDDLE)
    if middle.size:  # there: step back where the cast rounded away from zero, then mark what was lost in the last bit
        inexact = np.abs(bits[middle].view(np.float32).astype(np.float64)) - np.abs(x[middle])
        bits[middle] = bits[middle] - (inexact > 0) | (inexact != 0)
    rounded = bits >> _HALF
    nan = np.isnan(x)
    quiet = (rounded[nan] | np.uint32(0x40)) if nan.any() else None
    rounded &= _ONE
    rounded += _BELOW
    rounded += bits
    rounded >>= _HALF
    if quiet is not None:
        rounded[nan] = quiet
    return rounded
