"""Products with packed weights against float64, in every instruction set that this CPU runs."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa")
F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
HALF_ULP = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}


def random(rng, *shape, dtype=F32):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def packed(w, gated=False):
    matrices = w.reshape(-1, *w.shape[-2:])
    made = native.Packed(*matrices.shape, w.dtype, gated)
    for e, matrix in enumerate(matrices):
        made.set(e, matrix)
    return made


def run(op, x, w, *more, shape, out=None):
    y = np.full(shape, 7, out or x.dtype)
    op(x, w, *more, y)
    return y


def linear(x, w, out=None):
    return run(native.linear, x, w, shape=(len(x), w.shape[1]), out=out)


def wide(a):
    return a.astype(np.float64)


def assert_close(y, x, w, out):
    """y[t, n] against x[t] w[n]: fp32 sums of at most the size of |x| |w|, rounded once to `out`."""
    exact, size = wide(x) @ wide(w).T, np.abs(wide(x)) @ np.abs(wide(w)).T
    error = np.abs(wide(y) - exact) - HALF_ULP[np.dtype(out)] * np.abs(exact)
    assert (error <= (4 + x.shape[-1] ** 0.5) * 2**-23 * size + 1e-7 * HALF_ULP[np.dtype(out)]).all()


@DTYPES
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 1, 1), (0, 8, 8), (3, 7, 33), (6, 257, 64), (7, 96, 130), (12, 64, 31), (13, 300, 65), (20, 131, 96), (21, 600, 70),
     (40, 515, 129), (48, 544, 96), (130, 1090, 33), (193, 66, 34), (400, 33, 65), (520, 64, 33)],
)  # fmt: skip
def test_linear(rows, depth, columns, dtype):
    rng = np.random.default_rng(rows + depth)
    x, w = random(rng, rows, depth, dtype=dtype), random(rng, columns, depth, dtype=dtype)
    for out in {dtype, F32, F16}:
        assert_close(linear(x, packed(w), out), x, w, out)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_products_of_whole_numbers_are_exact(data):
    """Sums below 2**24 have no rounding, so every value is known whatever the order: in any dtype, of any shape and strides."""
    size = st.integers(1, 80)
    heads, rows, depth, columns = (data.draw(s) for s in (st.integers(1, 3), size, size, size))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([F32, BF16, F16]))
    x = rng.integers(-3, 4, (rows, heads, 2 * depth)).astype(dtype)[:, :, :: data.draw(st.sampled_from([2, -2]))]
    w = rng.integers(-3, 4, (heads, columns, depth)).astype(dtype)
    exact = np.einsum("tnk,nmk->tnm", wide(x), wide(w))
    y = run(native.head_linear, x, packed(w), shape=(rows, heads, columns))
    assert np.array_equal(y, exact.astype(dtype))
    assert np.array_equal(linear(x[:, 0], packed(w[0]), F32), exact[:, 0].astype(F32))
    counts = rng.multinomial(data.draw(st.integers(0, rows)), np.ones(heads) / heads).astype(np.int32)
    grouped = run(native.grouped_gemm, x[:, 0], packed(w), counts, shape=(rows, columns))
    expert = np.repeat(np.arange(heads), counts)
    exact = np.einsum("mk,mnk->mn", wide(x[: len(expert), 0]), wide(w[expert]))
    assert np.array_equal(grouped[: len(expert)], exact.astype(dtype))
    assert (grouped[len(expert) :] == 7).all()


@DTYPES
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype, threads):
    rng = np.random.default_rng(3)
    x, w = random(rng, 450, 600, dtype=dtype), packed(random(rng, 200, 600, dtype=dtype))
    threads(1)
    whole = linear(x, w)
    for n in (1, 2, 5, 12, 13, 20, 21, 60):
        assert linear(x[7 : 7 + n], w).tobytes() == whole[7 : 7 + n].tobytes()
    threads(2)
    assert linear(x, w).tobytes() == whole.tobytes()
    x[3], x[4, 2], x[5, 1] = np.nan, np.inf, -np.inf
    beside = linear(x, w)
    assert np.isnan(wide(beside[3])).all()
    assert not np.isfinite(wide(beside[4:6])).any()
    assert np.delete(beside, [3, 4, 5], 0).tobytes() == np.delete(whole, [3, 4, 5], 0).tobytes()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_float32_that_is_bfloat16_takes_half_of_the_bytes_and_gives_the_same_bits(data):
    rows, depth, columns = (data.draw(st.integers(1, most)) for most in (60, 600, 140))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x, w = random(rng, rows, depth), random(rng, 3, columns, depth).astype(BF16).astype(F32)
    w[0, 0, :1], w[1, 0, -1:] = -0.0, np.inf
    kept, whole = packed(w), packed(w)
    third = np.full((columns, depth), 1 / 3, F32)
    whole.set(1, third)  # from here on as float32
    for made, expected in ((kept, w[1]), (whole, third)):
        back = np.empty_like(w)
        for e in range(3):
            made.get(e, back[e])
        assert back.tobytes() == np.stack([w[0], expected, w[2]]).tobytes()
    whole.set(1, w[1])
    assert whole.nbytes == 2 * kept.nbytes
    counts = np.int32(rng.multinomial(rows, np.ones(3) / 3))
    one, other = (run(native.grouped_gemm, x, p, counts, shape=(rows, columns)) for p in (kept, whole))
    assert one.tobytes() == other.tobytes()


def test_experts_of_which_half_is_bfloat16():
    rng = np.random.default_rng(6)
    x, ids = random(rng, 30, 33), rng.integers(-1, 4, (30, 2)).astype(np.int32)
    mix, w13, w2 = rng.random((30, 2), np.float32), random(rng, 4, 38, 33), random(rng, 4, 33, 19)
    w13, w2 = (w.astype(BF16).astype(F32) for w in (w13, w2))

    def whole(w, gated):
        made = packed(np.full_like(w, 1 / 3), gated)
        for e, matrix in enumerate(w):
            made.set(e, matrix)
        return made

    ups, downs = (packed(w13, True), whole(w13, True)), (packed(w2), whole(w2, False))
    pairs = [(up, down) for up in ups for down in downs]
    results = {run(native.moe_experts, x, ids, mix, *pair, 0, False, shape=x.shape).tobytes() for pair in pairs}
    assert len(results) == 1


def test_experts_in_half_precision():
    """The experts of float16 against those of float32 with the same values."""
    rng = np.random.default_rng(4)
    x, ids = random(rng, 30, 33, dtype=F16), rng.integers(-1, 4, (30, 2)).astype(np.int32)
    w13, w2 = random(rng, 4, 38, 33, dtype=F16) / 8, random(rng, 4, 33, 19, dtype=F16) / 8
    mix, results = rng.random((30, 2), np.float32), []
    for dtype in (F16, F32):
        y = x.astype(dtype)  # added to, so as of a shared expert
        native.moe_experts(x.astype(dtype), ids, mix, packed(w13.astype(dtype), True), packed(w2.astype(dtype)), 0, True, y)
        results.append(wide(y))
    np.testing.assert_allclose(*results, rtol=2**-11, atol=2e-5)


def test_one_expert_needs_no_ids():
    rng = np.random.default_rng(5)
    x, w13, w2 = random(rng, 5, 24), packed(random(rng, 1, 20, 24), True), packed(random(rng, 1, 24, 10))
    y, same = np.empty((2, 5, 24), F32)
    native.moe_experts(x, None, None, w13, w2, 0, False, y)
    native.moe_experts(x, np.zeros((5, 1), np.int32), np.ones((5, 1), F32), w13, w2, 0, False, same)
    assert y.tobytes() == same.tobytes()


def test_bad_products_are_refused_in_a_sentence():
    x, w, y = np.ones((4, 3), F32), packed(np.ones((2, 5, 3), F32)), np.ones((4, 5), F32)
    one, gated = packed(np.ones((5, 3), F32)), packed(np.ones((4, 3), F32), True)
    for call, words in [
        (lambda: native.linear(x, w, y), "w must be packed as one matrix"),
        (lambda: native.linear(x, gated, y), "without gated=True"),
        (lambda: native.linear(x.astype(BF16), one, y), "x has dtype bfloat16, expected native float32"),
        (lambda: native.linear(x[:, :2], one, y), r"x has shape \[4, 2\], expected \[any, 3\]"),
        (lambda: native.linear(x, one, y.astype(np.int32)), "y has dtype int32"),
        (lambda: native.head_linear(x, w, y), r"x has shape \[4, 3\], expected \[any, 2, 3\]"),
        (lambda: native.head_linear(np.ones((4, 2, 3), F32), w, y), "y has shape"),
        (lambda: native.grouped_gemm(x, w, np.int32([3, 2]), y), "counts has 2 at 1, expected 0 to 1, the rows that are left"),
        (lambda: native.grouped_gemm(x, w, np.int32([-1, 2]), y), "counts has -1 at 0"),
        (lambda: native.grouped_gemm(x, w, np.int64([1, 2]), y), "counts has dtype int64"),
        (lambda: native.grouped_gemm(x, w, np.int32([1]), y), "counts has shape"),
        (lambda: native.moe_experts(x, None, None, packed(np.ones((2, 4, 3), F32), True), packed(np.ones((2, 3, 2), F32)), 0,
                                    False, x), "there is one expert"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
