"""Limits: which calls a stated limit takes, over values and over a profile's ranges, and how a refusal is worded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.hal import (
    CallSpec,
    Need,
    UsageError,
    any_of,
    at_least,
    at_most,
    between,
    limits,
    multiple_of,
    multiple_of_bytes,
    one_of,
    per_dtype,
    same_as,
)
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
        (between(3, 8), "3 to 8", [3, 8], [2, 9]),
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
    assert [limit.holds(v, {}) for v in taken] == [True] * len(taken)
    assert [limit.holds(v, {}) for v in refused] == [False] * len(refused)


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
        ({"schemes": {"w": "fp8_block"}}, {}, "quantisation scheme of w is 'fp8_block', the kernel takes none"),
        ({"schemes": {"a": "none", "w": "int8"}}, {}, "quantisation scheme of w is 'int8', the kernel takes none"),
        # The first one broken is told: dtypes, then schemes, then dims and attributes as stated.
        (
            {"dims": {"D": 1}, "dtypes": {"x": "f"}, "schemes": {"w": "s"}},
            {"D": 2, "dtypes": {"x": one_of("g")}},
            "x is f, the kernel takes one of g",
        ),
        (
            {"dims": {"D": 1}, "schemes": {"w": "s"}},
            {"D": 2},
            "quantisation scheme of w is 's', the kernel takes none",
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
        (between(3, 8), (3, 8), None),
        (between(3, 8), (1, 8), 1),
        (between(3, 8), (3, 9), 9),
        (at_least(4), (4, 100), None),
        (at_least(4), (3, 100), 3),
        (multiple_of(64), (64, 64), None),
        (multiple_of(64), (64, 128), 65),
        (multiple_of(1, at_most=8), (1, 8), None),
        (multiple_of(1, at_most=8), (1, 512), 9),
        (one_of(1), (1, 1), None),
        (one_of(1), (1, 2), 2),
        (one_of(1, 2), (1, 2), None),
        (any_of(one_of(1), multiple_of(8)), (1, 64), 2),
        (any_of(at_most(8), at_least(9)), (1, 64), None),
        (any_of(at_most(8), at_least(10)), (1, 2**40), 9),
        (one_of(1, 2, 4), (1, 4), 3),
        (any_of(multiple_of(2), multiple_of(3)), (2, 4), None),
        (any_of(multiple_of(2), multiple_of(3)), (2, 9), 5),
        (any_of(at_most(2048), one_of(3072, *range(4096, 8193, 1024))), (1, 3072), 2049),
        (at_least(1), (1, 2**40), None),
    ],
)
def test_a_range_is_taken_only_as_a_whole(limit: Limit, span: tuple[int, int], refused: int | None) -> None:
    expected = None if refused is None else f"T = {refused}, the kernel takes {limit.text}"
    assert refusal({"dims": {"T": span}}, T=limit) == expected


DTYPES = {"x": "bfloat16", "y": "float32"}
SIMPLE = (
    st.integers(1, 40).map(at_most)
    | st.integers(1, 40).map(at_least)
    | st.builds(multiple_of, st.integers(1, 9), st.none() | st.integers(1, 40))
    | st.lists(st.integers(1, 40), min_size=1, max_size=6).map(lambda values: one_of(*values))
    | st.builds(multiple_of_bytes, st.integers(1, 40), st.sampled_from(["x", "y"]))
)
LIMITS = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda limits: any_of(*limits))
    | st.builds(lambda operand, a, b: per_dtype(operand, bfloat16=a, float32=b), st.sampled_from(["x", "y"]), inner, inner)
    | st.builds(lambda a: per_dtype("x", float16=a), inner),
    max_leaves=4,
)


@given(LIMITS, st.integers(1, 40), st.integers(0, 40))
def test_a_range_is_judged_as_by_trying_every_value(limit: Limit, low: int, width: int) -> None:
    span = range(low, low + width + 1)
    first = next((v for v in span if not limit.holds(v, DTYPES)), None)
    assert limit.refused((low, low + width), DTYPES) == first
    said = refusal({"dims": {"T": (low, low + width)}, "dtypes": DTYPES}, T=limit)
    assert (said is None) if first is None else said is not None and said.startswith(f"T = {first}, the kernel takes ")


@pytest.mark.parametrize(
    ("call", "stated", "message"),
    [
        # LayerNorm of PyTorch: "expect parameter to have scalar type" of the input.
        ({"dtypes": {"x": "bfloat16", "weight": "bfloat16"}}, {"dtypes": {"weight": same_as("x")}}, None),
        (
            {"dtypes": {"x": "bfloat16", "weight": "float32"}},
            {"dtypes": {"weight": same_as("x")}},
            "weight is float32, the kernel takes the dtype of x (x is bfloat16)",
        ),
        # npu_rms_norm: gamma in the input's dtype or float32.
        (
            {"dtypes": {"x": "bfloat16", "weight": "float16"}},
            {"dtypes": {"weight": any_of(same_as("x"), one_of("float32"))}},
            "weight is float16, the kernel takes the dtype of x, or one of float32 (x is bfloat16)",
        ),
        # torch._grouped_mm: "strides should be multiple of 16 bytes".
        ({"dims": {"K": 96}, "dtypes": {"x": "bfloat16"}}, {"K": multiple_of_bytes(16, of="x")}, None),
        ({"dims": {"K": 4}, "dtypes": {"x": "float32"}}, {"K": multiple_of_bytes(16, of="x")}, None),
        (
            {"dims": {"K": 4}, "dtypes": {"x": "bfloat16"}},
            {"K": multiple_of_bytes(16, of="x")},
            "K = 4, the kernel takes a multiple of 16 bytes of x (x is bfloat16)",
        ),
        (
            {"dims": {"K": (8, 9)}, "dtypes": {"x": "bfloat16"}},
            {"K": multiple_of_bytes(16, of="x")},
            "K = 9, the kernel takes a multiple of 16 bytes of x (x is bfloat16)",
        ),
        # Cambricon's single_query_cached_kv_attn: 128 heads, 256 in bfloat16.
        (
            {"dims": {"N": 256}, "dtypes": {"q_latent": "bfloat16"}},
            {"N": per_dtype("q_latent", bfloat16=at_most(256), float16=at_most(128))},
            None,
        ),
        (
            {"dims": {"N": 256}, "dtypes": {"q_latent": "float16"}},
            {"N": per_dtype("q_latent", bfloat16=at_most(256), float16=at_most(128))},
            "N = 256, the kernel takes at most 256 where q_latent is bfloat16, at most 128 where q_latent is float16 "
            "(q_latent is float16)",
        ),
        (
            {"dims": {"N": 1}, "dtypes": {"q_latent": "float32"}},
            {"N": per_dtype("q_latent", bfloat16=at_most(256))},
            "N = 1, the kernel takes at most 256 where q_latent is bfloat16 (q_latent is float32)",
        ),
    ],
)
def test_what_depends_on_the_dtype_of_an_operand(call: Any, stated: Any, message: str | None) -> None:
    assert refusal(call, **stated) == message


@pytest.mark.parametrize(
    ("need", "values", "message"),
    [
        (Need("no -1", lambda ids: ids >= 0), [[0, 3], [1, 2]], None),
        (Need("no -1", lambda ids: ids >= 0), [[0, 3], [1, -1]], "ids[1, 1] is -1, the kernel takes ids with no -1"),
        (Need("no -1", lambda ids: ids >= 0), np.zeros((0, 2)), None),
        (Need("two experts", lambda ids: len(np.unique(ids)) > 1), [[1], [1]], "the kernel takes ids with two experts"),
        (Need("rising values", lambda ids: np.diff(ids) > 0), [[1, 1]], "the kernel takes ids with rising values"),
    ],
)
def test_a_need_names_the_first_value_that_breaks_it(need: Need, values: Any, message: str | None) -> None:
    assert need.breach("ids", np.asarray(values)) == message


def test_ties_are_lowest_or_any() -> None:
    with pytest.raises(UsageError, match=r"^tie is 'lowset', expected one of lowest, any$"):
        limits(tie="lowset")


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
