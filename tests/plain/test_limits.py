"""Limits: which calls a stated limit takes, over values and over a profile's ranges, and how a refusal is worded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.hal import CallSpec, any_of, at_least, at_most, limits, multiple_of, one_of
from porthal.hal.limits import Limit


def refusal(call: dict[str, Any], **stated: Any) -> str | None:
    @limits(**stated)
    def kernel() -> None: ...

    parts = (call.get(part, {}) for part in ("dims", "dtypes", "attrs", "schemes"))
    return kernel.limits.refuses(CallSpec(*parts))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("limit", "text", "taken", "refused"),
    [
        (one_of("bfloat16", "float16"), "one of bfloat16, float16", ["float16"], ["float32"]),
        (one_of(64, 128), "one of 64, 128", [64, 128], [65, 96]),
        (at_most(8), "at most 8", [-1, 0, 8], [9]),
        (at_least(2), "at least 2", [2, 99], [1, 0]),
        (multiple_of(16), "a multiple of 16", [16, 160], [8, 0, 17, -16]),
        (multiple_of(16, at_most=64), "a multiple of 16 up to 64", [16, 64], [80, 0]),
        (
            any_of(one_of(1), multiple_of(64, at_most=256), at_least(1000)),
            "one of 1, or a multiple of 64 up to 256, or at least 1000",
            [1, 64, 256, 1000],
            [2, 320, 999],
        ),
    ],
)
def test_what_a_limit_takes_and_how_it_reads(limit: Limit, text: str, taken: list[Any], refused: list[Any]) -> None:
    assert limit.text == text
    assert [limit.holds(v) for v in taken] == [True] * len(taken)
    assert [limit.holds(v) for v in refused] == [False] * len(refused)


@pytest.mark.parametrize(
    ("call", "stated", "message"),
    [
        (
            {"dtypes": {"x": "float32"}},
            {"dtypes": {"x": one_of("bfloat16", "float16")}},
            "x is float32, the kernel takes one of bfloat16, float16",
        ),
        ({"dims": {"D": 96}}, {"D": multiple_of(64)}, "D = 96, the kernel takes a multiple of 64"),
        ({"dims": {"D": 96}}, {"D": 128}, "D = 96, the kernel takes one of 128"),
        (
            {"attrs": {"layout": "half"}},
            {"layout": "interleaved"},
            "layout = half, the kernel takes one of interleaved",
        ),
        ({"attrs": {"k": 9}}, {"k": any_of(one_of(12), at_most(8))}, "k = 9, the kernel takes one of 12, or at most 8"),
        ({"schemes": {"w": "fp8_block"}}, {}, "quantisation scheme is 'fp8_block', the kernel takes none"),
        ({"schemes": {"a": "none", "w": "int8"}}, {}, "quantisation scheme is 'int8', the kernel takes none"),
        # The first one broken is told: dtypes, then schemes, then dims and attributes as stated.
        (
            {"dims": {"D": 1}, "dtypes": {"x": "f"}, "schemes": {"w": "s"}},
            {"D": 2, "dtypes": {"x": one_of("g")}},
            "x is f, the kernel takes one of g",
        ),
        (
            {"dims": {"D": 1}, "schemes": {"w": "s"}},
            {"D": 2},
            "quantisation scheme is 's', the kernel takes none",
        ),
        ({"dims": {"A": 1, "B": 1}}, {"B": 2, "A": 2}, "B = 1, the kernel takes one of 2"),
    ],
)
def test_a_refusal_names_the_first_limit_broken(call: Any, stated: Any, message: str) -> None:
    assert refusal(call, **stated) == message


@pytest.mark.parametrize(
    ("call", "stated"),
    [
        ({"dims": {"D": 128}, "schemes": {"w": "none"}}, {"D": 128}),
        ({"dtypes": {"x": "bfloat16"}}, {"dtypes": {"x": one_of("bfloat16")}}),
        ({"dtypes": {}}, {"dtypes": {"second": one_of("bfloat16")}}),  # an optional operand that is absent
        ({"dims": {}}, {"B": 64}),
        ({"attrs": {"causal": True}}, {"causal": True}),
        ({}, {}),
    ],
)
def test_what_is_within_the_limits_is_taken(call: Any, stated: Any) -> None:
    assert refusal(call, **stated) is None


@pytest.mark.parametrize(
    ("limit", "span", "refused"),
    [
        (at_most(8), (1, 8), None),
        (at_most(8), (1, 9), 9),
        (at_least(4), (4, 100), None),
        (at_least(4), (3, 100), 3),
        (multiple_of(64), (64, 64), None),
        (multiple_of(64), (64, 128), 65),
        (multiple_of(1, at_most=8), (1, 8), None),
        (multiple_of(1, at_most=8), (1, 512), 512),
        (one_of(1), (1, 1), None),
        (one_of(1), (1, 2), 2),
        (one_of(1, 2), (1, 2), None),
        (any_of(one_of(1), multiple_of(8)), (1, 64), 2),
        (any_of(at_most(8), at_least(9)), (1, 64), None),
    ],
)
def test_a_range_is_taken_only_as_a_whole(limit: Limit, span: tuple[int, int], refused: int | None) -> None:
    expected = None if refused is None else f"T = {refused}, the kernel takes {limit.text}"
    assert refusal({"dims": {"T": span}}, T=limit) == expected


LIMITS = (
    st.integers(1, 40).map(at_most)
    | st.integers(1, 40).map(at_least)
    | st.builds(multiple_of, st.integers(1, 9), st.none() | st.integers(1, 40))
)


@given(LIMITS, st.integers(1, 40), st.integers(0, 40))
def test_a_range_is_judged_as_by_trying_every_value(limit: Limit, low: int, width: int) -> None:
    assert (refusal({"dims": {"T": (low, low + width)}}, T=limit) is None) == all(
        limit.holds(v) for v in range(low, low + width + 1)
    )


def test_the_decorator_leaves_the_kernel_and_its_facts() -> None:
    @limits(provider="vendor.call", tie="any", H=at_most(4))
    def kernel(x: int) -> int:
        return x + 1

    @limits()
    def plain() -> None: ...

    assert kernel(1) == 2
    assert (kernel.provider, kernel.tie) == ("vendor.call", "any")
    assert kernel.limits.facts["H"].text == "at most 4"
    assert (plain.provider, plain.tie, dict(plain.limits.facts), dict(plain.limits.dtypes)) == ("", "lowest", {}, {})
