"""Integers that are ordered like floats, the same on every device: NaN as -inf, -0.0 as 0.0."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below the key of -inf


@triton.jit
def key_of(x):
    """int32, rising with the value."""
    x = x.to(tl.float32)
    x = tl.where(x != x, float("-inf"), tl.where(x == 0, 0.0, x))
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def first_highest(keys, position, END: tl.constexpr):
    """The lowest position of the highest key, along the last axis of a block of one axis."""
    return tl.min(tl.where(keys == tl.max(keys, 0), position, END), 0)
