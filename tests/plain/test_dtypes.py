"""Rounding from float64, against exact integer arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.hal import UNIT_ROUNDOFF, UsageError, dtype, narrow, numpy_dtype, widen


def nearest_even(x: float, digits: int, smallest: int) -> Fraction:
    """x rounded to `digits` binary digits, ties to even, with exponents from `smallest` on, in exact arithmetic."""
    exact = abs(Fraction(x))
    exponent = smallest
    while exact >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - digits + 1)
    return round(exact / step) * step * (1 if x >= 0 else -1)


@given(st.floats(-1e38, 1e38, allow_subnormal=True))
def test_bfloat16_is_rounded_once_to_nearest_even(x: float) -> None:
    got = float(narrow(np.array([x]), "bfloat16").astype(np.float64)[0])
    assert Fraction(got) == nearest_even(x, 8, -126)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1 + 2**-8 + 2**-40, 1.0078125),  # a cast through float32 would round this twice, to 1.0
        (1 + 2**-8, 1.0),
        (1 + 3 * 2**-8, 1.015625),
        (3.3895e38, 3.3895313892515355e38),
        (3.3999e38, np.inf),
        (-np.inf, -np.inf),
        (-0.0, -0.0),
    ],
)
def test_bfloat16_edges(x: float, expected: float) -> None:
    got = narrow(np.array([x]), "bfloat16").astype(np.float64)[0]
    assert got == expected
    assert np.signbit(got) == np.signbit(expected)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_nan_stays_nan_and_widening_is_exact(name: str) -> None:
    values = narrow(np.array([np.nan, 0.1, -7.25, 1e-7]), name)
    assert dtype(values) == name
    assert np.isnan(widen(values)[0])
    assert (narrow(widen(values), name)[1:] == values[1:]).all()


def test_widen_keeps_the_shape_of_strided_views() -> None:
    x = narrow(np.arange(24.0).reshape(4, 6), "bfloat16")
    assert (widen(x[::2, 1::2].T) == np.arange(24.0).reshape(4, 6)[::2, 1::2].T).all()


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(UsageError, match="unknown dtype 'float24': expected one of"):
        numpy_dtype("float24")


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float32"])
def test_a_number_just_above_the_middle_is_rounded_once_and_up(name: str) -> None:
    """In float32 it is the middle between two numbers of the dtype, which goes to the even one: 1."""
    u = UNIT_ROUNDOFF[name]
    for sign in (1.0, -1.0):
        found = widen(narrow(np.array([sign * (1 + u), sign * (1 + u + 2.0**-40)]), name))
        assert found.tolist() == [sign, sign * (1 + 2 * u)]
