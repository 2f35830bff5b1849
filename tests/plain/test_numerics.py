"""The words of the references: exact in golden mode, perturbing by what they state in noise mode; choosing by rule."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import porthal.ops
from porthal.hal import UNIT_ROUNDOFF, contracts
from porthal.hal.numerics import (
    BALANCED,
    FLUSHED,
    ROUNDED,
    ROUNDED_TO_ZERO,
    TURNS,
    U_ACC,
    Known,
    _contract,
    _noise,
    choose,
    dot,
    elementary,
    may_round,
    nearest,
    noise,
    sigmoid,
    single,
    softmax,
    softmax_slack,
    total,
)

SOURCES = Path(porthal.ops.__path__[0])
SUBSCRIPTS = sorted({s for f in SOURCES.glob("*.py") for s in re.findall(r'(?:dot|product)\("([^"]+)"', f.read_text())})
DTYPES = {"x": "bfloat16", "y": "float16", "f": "float32"}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def operands(subscripts: str, rng: np.random.Generator, **sizes: int) -> tuple[Any, Any]:
    left, right = subscripts.split("->")[0].split(",")
    size = {s: sizes.get(s, 3 + i) for i, s in enumerate(sorted(set(left + right)))}
    return tuple(rng.standard_normal([size[s] for s in x]) for x in (left, right))  # type: ignore[return-value]


# -- contraction -----------------------------------------------------------------------------------------------------


def test_the_references_subscripts_are_found() -> None:
    assert {"tk,nk->tn", "tnk,nmk->tnm", "thd,sd->ths", "th,ths->ts"} <= set(SUBSCRIPTS)


@pytest.mark.parametrize("subscripts", [*SUBSCRIPTS, "bik,bkj->bji", "abk,bak->ab", "k,k->", "i,j->ji"])
def test_contraction_is_einsum(subscripts: str, rng: np.random.Generator) -> None:
    a, b = operands(subscripts, rng)
    expected = np.einsum(subscripts, a, b)
    assert _contract(subscripts, a, b).shape == expected.shape
    np.testing.assert_allclose(dot(subscripts, a, b), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("subscripts", SUBSCRIPTS)
def test_contraction_of_strided_arrays(subscripts: str, rng: np.random.Generator) -> None:
    a, b = operands(subscripts, rng)
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan)
    wide[..., ::2] = a
    reversed_b = np.ascontiguousarray(b[::-1])[::-1]
    broadcast = np.broadcast_to(a[:1], a.shape)
    found, plain = dot(subscripts, wide[..., ::2], reversed_b), dot(subscripts, a, b)
    assert found.dtype == plain.dtype
    np.testing.assert_allclose(found, plain, rtol=0, atol=4e-16 * np.abs(a).max() * np.abs(b).max() * a.size, strict=True)
    np.testing.assert_allclose(dot(subscripts, broadcast, b), np.einsum(subscripts, broadcast, b), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("subscripts", "axis"), [(s, a) for s in SUBSCRIPTS for a in sorted(set(s) - set(",->"))]
)
def test_contraction_with_an_empty_axis(subscripts: str, axis: str, rng: np.random.Generator) -> None:
    a, b = operands(subscripts, rng, **{axis: 0})
    expected = np.einsum(subscripts, a, b)
    np.testing.assert_array_equal(dot(subscripts, a, b), expected, strict=True)
    with noise(rng, DTYPES):
        np.testing.assert_array_equal(dot(subscripts, a, b), expected, strict=True)


def test_contraction_carries_infinities_and_nan_without_warnings() -> None:
    a = np.array([[np.inf, 1.0], [np.nan, 1.0], [1e300, 1e300]])
    value = dot("tk,nk->tn", a, np.array([[1.0, 1.0], [0.0, 1.0], [1e300, 1e300]]))
    np.testing.assert_array_equal(value[0], [np.inf, np.nan, np.inf])
    assert np.isnan(value[1]).all()
    np.testing.assert_array_equal(value[2], [2e300, 1e300, np.inf])


# -- golden mode -----------------------------------------------------------------------------------------------------


def test_golden_mode_perturbs_nothing(rng: np.random.Generator) -> None:
    assert _noise.get() is None
    x = rng.standard_normal((5, 64))
    assert may_round("p", x, to="bfloat16") is x  # no unknown dtype is looked up either
    assert may_round("p", x, to="x") is x
    assert single(x) is x
    np.testing.assert_array_equal(total(x), np.sum(x, -1))
    np.testing.assert_array_equal(total(x, axis=0, keepdims=True), np.sum(x, 0, keepdims=True))
    np.testing.assert_array_equal(elementary(np.exp, x), np.exp(x))


def test_golden_products_of_integers_are_exact(rng: np.random.Generator) -> None:
    a, b = rng.integers(-(2**20), 2**20, (7, 300)), rng.integers(-(2**20), 2**20, (9, 300))
    exact = np.array([[sum(int(x) * int(y) for x, y in zip(p, q)) for q in b] for p in a])
    np.testing.assert_array_equal(dot("tk,nk->tn", a.astype(float), b.astype(float)), exact)


# -- noise mode ------------------------------------------------------------------------------------------------------


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("K", [1, 16, 1024])
def test_a_product_is_off_by_root_k_roundoffs_of_its_magnitude(K: int, rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((50, K)), rng.standard_normal((60, K))
    with noise(rng, DTYPES) as mode:
        error = dot("tk,nk->tn", a, b) - np.einsum("tk,nk->tn", a, b)
    step = error / (np.sqrt(K) * 2.0**-24 * (np.abs(a) @ np.abs(b).T))
    np.testing.assert_allclose(np.abs(step), 1, rtol=2e-4)  # float64 keeps 2^-29 of a relative 2^-24
    assert abs(step.mean()) < 5 / np.sqrt(step.size)
    assert mode.reduced


def test_a_batched_product_counts_only_the_summed_axis(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((40, 8, 25)), rng.standard_normal((8, 30, 25))
    with noise(rng, DTYPES):
        error = dot("tnk,nmk->tnm", a, b) - np.einsum("tnk,nmk->tnm", a, b)
    magnitude = np.einsum("tnk,nmk->tnm", np.abs(a), np.abs(b))
    np.testing.assert_allclose(np.abs(error), 5 * 2.0**-24 * magnitude, rtol=1e-3)


@pytest.mark.parametrize(("axis", "K"), [(-1, 100), (0, 30)])
def test_a_sum_is_off_by_root_k_roundoffs_of_its_magnitude(axis: int, K: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((30, 100))
    with noise(rng, DTYPES) as mode:
        error = total(x, axis=axis) - x.sum(axis)
    np.testing.assert_allclose(np.abs(error), np.sqrt(K) * 2.0**-24 * np.abs(x).sum(axis), rtol=1e-3)
    assert mode.reduced


@pytest.mark.parametrize("to", ["x", "y", "f", "bfloat16", "float16", "float32"])
def test_a_point_may_round_to_the_dtype_it_names(to: str, rng: np.random.Generator) -> None:
    value = rng.standard_normal((100, 100)) + 3
    with noise(rng, DTYPES) as mode:
        error = may_round("point", value, to=to) - value
    u = UNIT_ROUNDOFF[DTYPES.get(to, to)]
    np.testing.assert_allclose(rms(error / value), u / np.sqrt(3), rtol=1e-3)
    assert abs((error / value).mean()) < 5 * u / np.sqrt(3) / 100
    assert mode.points == ["point"]
    assert not mode.reduced  # a rounding stays with its element


def test_a_uniform_rounding_error_has_the_rms_of_the_noise(rng: np.random.Generator) -> None:
    """u / sqrt(3) of the value is what rounding to nearest gives just above a power of 2, where it is worst."""
    value = 1 + rng.random(100_000) * 2.0**-5
    stored = np.round(value * 2.0**7) / 2.0**7  # bfloat16 has 8 bits of precision
    assert rms((stored - value) / value) == pytest.approx(2.0**-8 / np.sqrt(3), rel=0.03)


@pytest.mark.parametrize(("to", "least"), [("float16", 2.0**-25), ("bfloat16", FLUSHED), ("float32", FLUSHED)])
def test_zero_is_perturbed_by_the_smallest_step(to: str, least: float, rng: np.random.Generator) -> None:
    with noise(rng, DTYPES):
        np.testing.assert_allclose(np.abs(may_round("p", np.zeros(8), to=to)), least / np.sqrt(3))


def test_single_and_elementary_are_off_by_float32_ulps(rng: np.random.Generator) -> None:
    x = rng.random((50, 50)) + 1
    with noise(rng, DTYPES) as mode:
        one, four, seven = single(x), elementary(np.exp, x), elementary(np.exp, x, ulps=7)
    assert rms(one / x - 1) == pytest.approx(U_ACC / np.sqrt(3), rel=1e-3)
    assert rms(four / np.exp(x) - 1) == pytest.approx(4 * U_ACC / np.sqrt(3), rel=1e-3)
    assert rms(seven / np.exp(x) - 1) == pytest.approx(7 * U_ACC / np.sqrt(3), rel=1e-3)
    assert mode.count == 3
    assert (mode.points, mode.reduced) == ([], False)


def norm_of(x: Any) -> Any:
    return contracts()["rms_norm"].reference(x, np.ones(x.shape[1]))


def test_the_seed_decides_the_noise(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 40))

    def run(seed: int) -> Any:
        with noise(np.random.default_rng(seed), {"y": "bfloat16"}) as mode:
            y = norm_of(x)
        assert (mode.points, mode.reduced, mode.count) == (["normalised"], True, 4)
        return y

    np.testing.assert_array_equal(run(5), run(5))
    assert (run(5) != run(6)).any()


def test_equal_values_are_rounded_alike_and_negatives_in_mirror_image(rng: np.random.Generator) -> None:
    x = rng.standard_normal(1000)
    with noise(rng, DTYPES):
        error = single(np.stack([x, x, -x])) - np.stack([x, x, -x])
        again = single(x) - x
        scalar = float(total(x[:4])) - x[:4].sum()
    np.testing.assert_array_equal(error[0], error[1])
    np.testing.assert_array_equal(error[0], -error[2])
    assert abs(np.sign(error[0] * again).mean()) < 5 / np.sqrt(1000)  # each point has signs of its own
    assert abs(np.sign(error[0]).mean()) < 5 / np.sqrt(1000)
    assert scalar != 0


def test_a_sum_over_equal_values_adds_up_their_error(rng: np.random.Generator) -> None:
    """1000 roundings of one number are 1000 times off, not sqrt(1000) times."""
    with noise(rng, DTYPES):
        error = may_round("p", np.full(1000, 0.3), to="bfloat16").sum() - 300
    assert abs(error) == pytest.approx(300 * 2.0**-8 / np.sqrt(3), rel=1e-6)


def test_a_run_can_round_and_do_nothing_else(rng: np.random.Generator) -> None:
    x = np.append(rng.standard_normal(100), [1e-30, 1e-45])
    for only, least in ((ROUNDED, np.float64(np.float32(1e-45))), (ROUNDED_TO_ZERO, 0.0)):
        with noise(rng, DTYPES, only):
            np.testing.assert_array_equal(single(x)[:-1], x.astype(np.float32).astype(np.float64)[:-1])
            assert single(x)[-1] == least
            np.testing.assert_array_equal(may_round("p", x, to="float16"), np.append(x[:100].astype(np.float16), [0, 0]))
            np.testing.assert_array_equal(total(x), x.sum())


def test_points_are_recorded_in_the_order_met(rng: np.random.Generator) -> None:
    experts = contracts()["moe_experts"].reference
    ids, ones = np.array([[0, 1]], np.int32), np.ones((1, 2))
    args = rng.standard_normal((1, 4)), rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 4, 3)), ids, ones
    with noise(rng, {"x": "bfloat16", "y": "bfloat16"}) as mode:
        experts(*args)
    # silu_mul's own point, before the product, is met inside.
    assert mode.points == ["gate_up", "activation", "activation", "expert"] * 2


def test_only_one_point_can_be_perturbed(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 40))
    golden, relative = norm_of(x), []
    for only in range(5):
        with noise(np.random.default_rng(1), {"y": "bfloat16"}, only=only) as mode:
            relative.append(rms(norm_of(x) / golden - 1))
        assert mode.count == 4
    # total, single, may_round, single; the fifth does not exist
    assert relative[0] == pytest.approx(np.sqrt(40) * U_ACC / 2, rel=0.01)  # half of what is under the root
    assert relative[1] == pytest.approx(U_ACC / np.sqrt(3), rel=0.01)
    assert relative[2] == pytest.approx(2.0**-8 / np.sqrt(3), rel=0.01)
    assert relative[3] == pytest.approx(U_ACC / np.sqrt(3), rel=0.01)
    assert relative[4] == 0


def test_a_number_between_two_codes_is_either_in_half_of_the_runs() -> None:
    """Equal ones of a row alike, since a chip divides them alike; those of two rows seldom in the same runs."""
    x = np.full((600, 3), 63.5)
    x[:, 2] = -63.5
    seen = []
    for turn in range(TURNS):
        with noise(np.random.default_rng(turn), {"x": "bfloat16"}, turn=turn):
            seen.append(nearest(x * (1 + 1e-8 * (-1) ** turn), np.round, 2.0**-22))
    outer = np.abs(seen) == 64
    assert (np.abs(seen)[~outer] == 63).all() and (outer.sum(0) == TURNS // 2).all()
    assert (outer[..., 0] == outer[..., 1]).all() and (outer[..., 0] == outer[..., 2]).all()
    assert 40 <= len(np.unique(outer[..., 0], axis=1).T) <= len(BALANCED) == 70


def test_contexts_nest_and_end_with_an_exception(rng: np.random.Generator) -> None:
    x = np.ones(4)
    with noise(rng, {"x": "bfloat16"}) as outer:
        may_round("first", x, to="x")
        with pytest.raises(ZeroDivisionError), noise(rng, {"x": "float32"}) as inner:
            small = may_round("inner", x, to="x")
            raise ZeroDivisionError
        assert _noise.get() is outer
        large = may_round("second", x, to="x")
    assert _noise.get() is None
    assert (outer.points, inner.points) == (["first", "second"], ["inner"])
    np.testing.assert_allclose(np.abs(small - 1), 2.0**-24 / np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(np.abs(large - 1), 2.0**-8 / np.sqrt(3))
    assert single(x) is x


def test_noise_is_not_seen_by_other_threads(rng: np.random.Generator) -> None:
    x, seen = np.ones(4), []
    with noise(rng, DTYPES) as mode:
        thread = threading.Thread(target=lambda: seen.append(may_round("elsewhere", x, to="x") is x))
        thread.start()
        thread.join()
    assert seen == [True]
    assert mode.points == []


def test_every_reference_with_a_point_names_a_dtype_that_exists() -> None:
    """`to` is an operand, a result or a dtype: a misspelt one would only show in noise mode."""
    found = 0
    for name, contract in contracts().items():
        for to in re.findall(r'may_round\(.*?to="(\w+)"\)', (SOURCES / f"{name}.py").read_text(), re.S):
            assert to in contract.dtypes or to in UNIT_ROUNDOFF, (name, to)
            found += 1
    assert found >= 20


# -- products known from another run --------------------------------------------------------------------------------

Pair = tuple[Any, Any]  # the operands of a product


def last_row_changed(x: Any) -> Any:
    return np.concatenate([x[:-1], 2 - x[-1:]])


RUNS: dict[str, Any] = {
    "alike": lambda x, y: [(x, y), (x.copy(), y.copy())],
    "the first differs": lambda x, y: [(x, y), (x + 1, y)],
    "the second differs": lambda x, y: [(x, y), (x, y + 1)],
    "both differ": lambda x, y: [(x, y), (x + 1, y + 1)],
    "the first differs in its last row": lambda x, y: [(x, y), (last_row_changed(x), y)],
    "the second differs in its last row": lambda x, y: [(x, y), (x, last_row_changed(y))],
    "the same address with other strides": lambda x, y: [(x, y), (x.T, y)],
    "another address with the same strides": lambda x, y: [(x[:3], y), (x[3:], y)],
    "whole numbers": lambda x, y: [(x.astype(np.int32), y), (last_row_changed(x.astype(np.int32)), y)],
    "one, then the other": lambda x, y: [(x, y), (x, y + 1), (last_row_changed(x), y + 1)],
    "truth": lambda x, y: [(x > 0, y), (x > 0, y), (last_row_changed(x > 0) != 0, y)],
    "the same bits of another type": lambda x, y: [(x, y), (x.view(np.int64), y)],
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_what_is_known_of_other_runs_changes_no_bit(name: str, given: bool, rng: np.random.Generator) -> None:
    def run(seed: int, pair: Pair, known: Known | None) -> Any:
        with noise(np.random.default_rng(seed), DTYPES, known=known):
            return dot("tk,nk->tn", *pair)

    x, y = rng.standard_normal((6, 6)), rng.standard_normal((5, 6))
    pairs = RUNS[name](x, y)
    known = Known([x, y] if given else [])
    for seed, pair in enumerate([*pairs, *pairs]):
        np.testing.assert_array_equal(run(seed, pair, known), run(seed, pair, None))


# -- softmax, sigmoid, choice ----------------------------------------------------------------------------------------


def test_softmax_of_nothing_is_zeros() -> None:
    x = np.array([[-np.inf, -np.inf], [0.0, -np.inf], [3e38, -3e38]])
    e, norm = softmax(x)
    np.testing.assert_array_equal(e, [[0, 0], [1, 0], [1, 0]])
    np.testing.assert_array_equal(norm, [[0], [1], [1]])
    e, norm = softmax(np.zeros((2, 0)))
    np.testing.assert_array_equal(e, np.zeros((2, 0)))
    np.testing.assert_array_equal(norm, np.zeros((2, 1)))


def test_softmax_of_nothing_in_noise_mode_is_what_flushing_explains(rng: np.random.Generator) -> None:
    with noise(rng, DTYPES):
        e, norm = softmax(np.array([[-np.inf, -np.inf], [0.0, -np.inf]]))
    assert np.abs(e[[0, 0, 1], [0, 1, 1]]).max() <= FLUSHED
    assert e[1, 0] == pytest.approx(1, abs=1e-6)
    assert norm[1, 0] == pytest.approx(1, abs=1e-6)


def test_softmax_by_definition(rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 9)) * 5
    e, norm = softmax(x)
    np.testing.assert_allclose(e / norm, np.exp(x) / np.exp(x).sum(-1, keepdims=True), rtol=1e-13)
    assert (e.max(-1) == 1).all()


@pytest.mark.parametrize(("rows", "V"), [(1, 100), (100, 1), (3, 400)])
def test_the_slack_of_a_softmax_grows_with_the_root_of_the_vocabulary(rows: int, V: int) -> None:
    logits = np.zeros((rows, V))
    logits[0] = 3
    logits[0, 1:] = -1e4  # which is never drawn
    rest = 8 + np.log(V) + 6 * V**0.5
    expected = [U_ACC * (rest + 12), *[U_ACC * rest] * (rows - 1)]
    np.testing.assert_allclose(softmax_slack(logits, np.full(rows, 0.5)), expected, rtol=1e-12)
    verified = np.stack([np.zeros_like(logits), logits], axis=1)  # of a request the row with the highest logit
    np.testing.assert_allclose(softmax_slack(verified, np.full(rows, 0.5)), expected, rtol=1e-12)


def test_the_slack_of_a_softmax_without_a_finite_logit() -> None:
    nothing = np.array([[-np.inf, np.nan], [np.inf, 1.0]])
    np.testing.assert_allclose(softmax_slack(nothing, np.zeros(2)), U_ACC * (8 + np.log(2) + 6 * 2**0.5))


def test_sigmoid_at_its_extremes() -> None:
    x = np.array([-np.inf, -1e300, -745.0, -40.0, -0.0, 0.0, 40.0, 745.0, 1e300, np.inf, np.nan])
    y = sigmoid(x)
    np.testing.assert_array_equal(y[[0, 1, 4, 5, 8, 9, 10]], [0, 0, 0.5, 0.5, 1, 1, np.nan])
    np.testing.assert_allclose(y[[2, 3]], np.exp([-745.0, -40.0]), rtol=1e-12)  # no cancellation in the tail
    middle = np.linspace(-30, 30, 61)
    np.testing.assert_allclose(sigmoid(middle) + sigmoid(-middle), 1, rtol=1e-15)


CHOICES: list[tuple[list[float], int, list[int]]] = [
    ([1.0, 3.0, 2.0], 2, [1, 2]),
    ([2.0, 2.0, 2.0], 2, [0, 1]),
    ([0.0, -0.0, 0.0], 3, [0, 1, 2]),
    ([-0.0, 0.0, -1.0], 2, [0, 1]),
    ([np.nan, -np.inf, np.nan, -1.0], 4, [3, 0, 1, 2]),  # NaN is -inf, and ties with it
    ([np.inf, np.nan, np.inf], 3, [0, 2, 1]),
    ([1.0, 2.0], 0, []),
    ([1.0, 2.0], 5, [1, 0]),
]


@pytest.mark.parametrize(("row", "k", "expected"), CHOICES)
def test_choose(row: list[float], k: int, expected: list[int]) -> None:
    chosen = choose(np.array([row, row]), k)
    assert chosen.dtype == np.int32
    assert chosen.shape == (2, len(expected))
    assert chosen.tolist() == [expected, expected]


def test_choose_by_sorting_pairs(rng: np.random.Generator) -> None:
    scores = rng.integers(-3, 3, (20, 40)).astype(float)
    by_pairs = [[i for _, i in sorted((-s, i) for i, s in enumerate(row))][:7] for row in scores]
    assert choose(scores, 7).tolist() == by_pairs
