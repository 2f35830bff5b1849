"""The C++ kernels of the cpu backend against plain NumPy in float64, in every instruction set that this CPU runs."""

import math
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from porthal.hal import UsageError, create

pytestmark = pytest.mark.usefixtures("isa")
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def random(rng, *shape, dtype=F32, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(dtype)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# rms_norm


def rms_norm(x, weight, eps=1e-5):
    y = np.full(x.shape, 7, x.dtype)
    native.rms_norm(x, weight, y, eps)
    return y


def rms_norm_exact(x, weight, eps=1e-5):
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@DTYPES
@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 3), (2, 17), (5, 64), (4, 129), (70, 1000), (2, 6144)])
def test_rms_norm(shape, dtype, wide_weight):
    rng = np.random.default_rng(1)
    x, weight = random(rng, *shape, dtype=dtype), random(rng, shape[1], dtype=F32 if wide_weight else dtype)
    y, exact = rms_norm(x, weight), rms_norm_exact(x, weight)
    # half a bfloat16 ulp is up to 2**-8 of the value; the float32 chain before it has a few of 2**-24
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=2**-8 + 2**-20 if dtype == BF16 else 2**-20)


@DTYPES
def test_rms_norm_reads_any_strides(dtype):
    rng = np.random.default_rng(2)
    base, weights = random(rng, 12, 90, dtype=dtype), random(rng, 180, dtype=dtype)
    for x in (base[::2, 3:40], base[::-1, 5:], base[:, ::3], base[:, ::-1], base.T, np.broadcast_to(base[:1], (4, 90))):
        for weight in (
            weights[1 : 2 * x.shape[1] : 2],
            weights[: x.shape[1]][::-1],
            np.broadcast_to(weights[0], x.shape[1]),
        ):
            assert same_bits(rms_norm(x, weight), rms_norm(x.copy(), weight.copy()))


@DTYPES
def test_rms_norm_keeps_nan_and_zero_rows_to_themselves(dtype):
    x = np.ones((4, 37), dtype)
    x[1, 36], x[2] = np.nan, 0
    y = rms_norm(x, np.ones(37, dtype)).astype(np.float64)
    assert np.isnan(y[1]).all()
    assert (y[2] == 0).all()
    assert np.isfinite(y[[0, 3]]).all()


def test_rms_norm_rounds_to_nearest_even_and_keeps_subnormals():
    # mean(x^2) + eps = 1 exactly, so that y is the weight rounded: ties go to the even neighbour
    x, weight = np.ones((1, 5), BF16), np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 2**-130, -1 - 2**-8])
    assert rms_norm(x, weight, eps=0.0).astype(np.float64).tolist() == [[1, 1 + 2**-6, 1 + 2**-7, 2.0**-130, -1]]


def test_rms_norm_in_place_and_threads(threads):
    rng = np.random.default_rng(3)
    x, weight = random(rng, 300, 1000), random(rng, 1000)
    threads(1)
    one = rms_norm(x, weight)
    threads(2)
    native.rms_norm(x, weight, x, 1e-5)
    assert same_bits(x, one)


# topk


def topk(scores, length, k):
    indices = np.full((len(scores), k), 77, np.int32)
    native.topk(scores, np.asarray(length, np.int32), k, indices)
    return indices


def topk_exact(scores, length, k):
    wide = np.where(np.isnan(scores.astype(np.float64)), -np.inf, scores.astype(np.float64))
    out = np.full((len(scores), k), -1, np.int32)
    for row, n, to in zip(wide, length, out, strict=True):
        order = np.argsort(-row[:n], kind="stable")[:k]
        to[: len(order)] = np.sort(order)
    return out


@DTYPES
@pytest.mark.parametrize("size", [1, 7, 16, 33, 300, 5000, 40000])
@pytest.mark.parametrize("k", [0, 1, 8, 300, 2048])
def test_topk(dtype, size, k):
    rng = np.random.default_rng(size + k)
    scores = random(rng, 4, size, dtype=dtype)
    length = [size, 0, size // 2, max(0, size - 1)]
    assert np.array_equal(topk(scores, length, k), topk_exact(scores, length, k))


@DTYPES
@pytest.mark.parametrize(
    "name",
    ["equal", "few values", "rising", "falling", "spikes", "runs", "NaN for too few", "NaN beside -inf", "special", "huge"],
)
def test_topk_of_hard_rows(dtype, name):
    n, rng = 20000, np.random.default_rng(4)
    at = np.arange(n)
    sampled = at % ((n - 16) // 63) < 16  # the runs from which a threshold is guessed
    scores = {
        "equal": np.zeros((1, n)),
        "few values": rng.integers(-2, 3, (1, n)),
        "rising": at[None],
        "falling": -at[None],
        "spikes": np.where(at % 10 == 0, 1e30, at / n)[None],  # what a strided sample mistakes
        "runs": (sampled * 1e30 + at / n)[None],  # what a sample of runs mistakes
        "NaN for too few": np.where(sampled & (at < 400), 9.0, np.where(at % 2, np.nan, -at / n))[None],
        "NaN beside -inf": np.where(at < n // 2, np.nan, -np.inf)[None],
        "special": rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0], (1, n)),
        "huge": rng.choice([-1, 1], (1, n)) * 10.0 ** rng.uniform(-38, 38, (1, n)),
    }[name].astype(dtype)
    for k in (1, 100, 2048, n, n + 3):
        assert np.array_equal(topk(scores, [n], k), topk_exact(scores, [n], k))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_topk_of_any_row(data):
    value = st.floats(width=32) | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0])
    row = data.draw(st.lists(value, min_size=1, max_size=60))
    length, k = data.draw(st.integers(0, len(row))), data.draw(st.integers(0, 70))
    for dtype in (F32, BF16):
        with np.errstate(over="ignore"):
            scores = np.array([row], F32).astype(dtype)
        assert np.array_equal(topk(scores, [length], k), topk_exact(scores, [length], k))


@DTYPES
def test_topk_reads_any_strides_and_threads(dtype, threads):
    base = random(np.random.default_rng(5), 9, 9000, dtype=dtype)
    for scores in (base[::2, 1:], base[:, ::3], base[:, ::-1], base[:, :50].T):
        length = np.full(2 * len(scores), scores.shape[1], np.int32)[::2]
        exact = topk_exact(scores, length, 40)
        for count in (1, 2, 3):
            threads(count)
            assert np.array_equal(topk(scores, length, 40), exact)


# moe_experts


class Experts:
    """Random experts, packed and plain."""

    def __init__(self, rng, experts, hidden, inner, dtype):
        self.plain13 = random(rng, experts, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5)
        self.plain2 = random(rng, experts, hidden, inner, dtype=dtype, scale=inner**-0.5)
        self.w13 = native.Packed(experts, 2 * inner, hidden, dtype, gated=True)
        self.w2 = native.Packed(experts, hidden, inner, dtype)
        for e in range(experts):
            self.w13.set(e, self.plain13[e])
            self.w2.set(e, self.plain2[e])

    def run(self, x, ids, weights, first=0):
        y = np.full(x.shape, 7, x.dtype)
        native.moe_experts(x, np.asarray(ids, np.int32), np.asarray(weights, np.float32), self.w13, self.w2, first, False, y)
        return y

    def exact(self, x, ids, weights, first=0):
        y = np.zeros(x.shape)
        for t, token in enumerate(x.astype(np.float64)):
            for id_, weight in zip(ids[t], weights[t], strict=True):
                e = int(id_) - first
                if id_ < 0 or not 0 <= e < len(self.plain13):
                    continue
                gate, up = np.split(self.plain13[e].astype(np.float64) @ token, 2)
                y[t] += float(weight) * (self.plain2[e].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up))
        return y


def route(rng, tokens, experts, k):
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    return ids, rng.random((tokens, k), np.float32)


def assert_close(y, exact, dtype):
    """Errors against the size of a row: inner sums cancel, so single elements may be small by chance."""
    size = np.sqrt((exact**2).mean(-1, keepdims=True)) + 1e-30
    assert (np.abs(y.astype(np.float64) - exact) / size).max(initial=0) < (3e-2 if dtype == BF16 else 1e-5)
    error = np.sqrt((((y.astype(np.float64) - exact) / size) ** 2).mean()) if y.size else 0
    assert error < (6e-3 if dtype == BF16 else 2e-6)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner"),
    [(1, 4, 2, 64, 32), (0, 2, 1, 8, 8), (3, 3, 3, 1, 1), (7, 5, 2, 33, 19), (13, 2, 2, 130, 67), (50, 8, 3, 257, 96),
     (900, 3, 2, 48, 40)],
)  # fmt: skip
def test_moe_experts(dtype, tokens, experts, k, hidden, inner):
    rng = np.random.default_rng(tokens + hidden)
    packed = Experts(rng, experts, hidden, inner, dtype)
    x = random(rng, tokens, hidden, dtype=dtype)
    ids, weights = route(rng, tokens, experts, k) if tokens else (np.zeros((0, k), np.int32), np.zeros((0, k), F32))
    assert_close(packed.run(x, ids, weights), packed.exact(x, ids, weights), dtype)


@DTYPES
def test_moe_experts_skips_ids_it_does_not_hold(dtype):
    rng = np.random.default_rng(6)
    packed, x = Experts(rng, 4, 40, 24, dtype), random(rng, 6, 40, dtype=dtype)
    ids = np.int32([[8, 9], [-1, 10], [7, 12], [-1, -1], [11, -(2**31)], [2**31 - 1, 8]])
    weights = rng.random(ids.shape, np.float32)
    y = packed.run(x, ids, weights, first=8)
    assert_close(y, packed.exact(x, ids, weights, first=8), dtype)
    assert not y[2:4].any()
    assert not packed.run(x, np.full((6, 2), -1), weights).any()
    assert not packed.run(x, np.zeros((6, 0), np.int32), np.zeros((6, 0), F32)).any()


@DTYPES
def test_moe_experts_row_depends_on_its_own_inputs_only(dtype, threads):
    """Bit for bit: alone, in any batch, skewed to one expert, with any number of threads, beside NaN and inf."""
    rng = np.random.default_rng(7)
    packed, tokens = Experts(rng, 6, 600, 300, dtype), 450
    x = random(rng, tokens, 600, dtype=dtype)
    ids, weights = route(rng, tokens, 6, 2)
    threads(1)
    whole = packed.run(x, ids, weights)
    for rows in ([0], [449], [3, 1], list(range(9)), list(range(100, 113))):
        assert same_bits(packed.run(x[rows], ids[rows], weights[rows]), whole[rows])
    threads(2)
    assert same_bits(packed.run(x, ids, weights), whole)
    skewed = ids.copy()
    skewed[1:] = ids[0]
    x[5], x[6, 3] = np.nan, np.inf
    y = packed.run(x, skewed, weights)
    assert same_bits(y[:1], whole[:1])
    assert np.isnan(y[5].astype(F32)).all()
    assert np.isfinite(np.delete(y, [5, 6], 0).astype(F32)).all()


@DTYPES
def test_moe_experts_reads_any_strides(dtype):
    rng = np.random.default_rng(8)
    packed = Experts(rng, 3, 31, 20, dtype)
    base = random(rng, 20, 93, dtype=dtype)
    wide_ids, wide_weights = route(rng, 20, 3, 3)
    for x in (base[:, :31], base[::-1, 31:62], base[:, ::3], base[:, 30::-1]):
        ids, weights = wide_ids[:, ::2], wide_weights[::1, ::2]
        y = np.empty(x.shape, dtype)
        native.moe_experts(x, ids, weights, packed.w13, packed.w2, 0, False, y)
        assert same_bits(y, packed.run(x.copy(), ids.copy(), weights.copy()))


def test_moe_experts_sums_choices_in_order():
    """1 + 2**-24 + 2**-24 is 1 from the left and more than 1 from the right."""
    w13, w2 = native.Packed(3, 2, 1, F32, gated=True), native.Packed(3, 1, 1, F32)
    gate = np.float32(1.0)
    unit = np.float32(gate / (1 + np.exp(-gate)))
    for e in range(3):
        w13.set(e, np.float32([[1], [1]]))
        w2.set(e, np.float32([[1]]))
    y = np.zeros((1, 1), F32)
    native.moe_experts(np.ones((1, 1), F32), np.int32([[0, 1, 2]]), np.float32([[0, 0, 1]]), w13, w2, 0, False, y)
    base = y[0, 0]
    assert abs(base - unit) <= np.spacing(unit)
    small = np.float32(2**-25)
    native.moe_experts(np.ones((1, 1), F32), np.int32([[2, 1, 0]]), np.float32([[1, small, small]]), w13, w2, 0, False, y)
    assert y[0, 0] == base
    native.moe_experts(
        np.ones((1, 1), F32), np.int32([[0, 1, 2]]), np.float32([[small * 2, small * 2, 1]]), w13, w2, 0, False, y
    )
    assert y[0, 0] > base


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
def test_packing_gives_back_every_bit(dtype, gated):
    rng = np.random.default_rng(9)
    for rows, columns in [(2, 1), (34, 7), (130, 129), (64, 256), (6, 300)]:
        packed = native.Packed(3, rows, columns, dtype, gated=gated)
        bits = rng.integers(0, 256, (3, rows, columns * dtype.itemsize), np.uint8)  # NaN payloads included
        logical = bits.view(dtype).reshape(3, rows, columns)
        for e in range(3):
            packed.set(e, logical[e])
        packed.set(1, np.asfortranarray(logical[1])[::-1][::-1])
        for e in range(3):
            back = np.empty((rows, columns), dtype)
            packed.get(e, back)
            assert same_bits(back, logical[e])
        assert packed.shape == (3, rows, columns)
        assert packed.nbytes >= logical.nbytes


# threads and refusals


def test_python_threads_may_call_at_once(threads):
    threads(2)
    rng = np.random.default_rng(10)
    x, weight = random(rng, 400, 1024), random(rng, 1024)
    expected, results = rms_norm(x, weight), [None] * 4

    def work(i):
        for _ in range(20):
            results[i] = rms_norm(x, weight)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(same_bits(y, expected) for y in results)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes(threads):
    threads(2)
    rng = np.random.default_rng(11)
    x, weight = random(rng, 400, 1024), random(rng, 1024)
    expected = rms_norm(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(rms_norm(x, weight), expected) and native.num_threads() == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_bad_arguments_are_refused_in_a_sentence():
    x, w, y = np.ones((2, 3), F32), np.ones(3, F32), np.ones((2, 3), F32)
    packed = Experts(np.random.default_rng(0), 2, 3, 4, F32)
    ids, mix, n = np.zeros((2, 1), np.int32), np.ones((2, 1), F32), np.int32([3, 3])
    out = np.zeros((2, 2), np.int32)
    read_only = y.copy()
    read_only.flags.writeable = False
    run, pack = native.moe_experts, native.Packed
    for call, words in [
        (lambda: native.rms_norm(x.astype(np.float64), w, y, 1e-5), "x has dtype float64"),
        (lambda: native.rms_norm(x.astype(">f4"), w, y, 1e-5), "x has dtype >f4"),
        (lambda: native.rms_norm(x, w[:2], y, 1e-5), r"weight has shape \[2\], expected \[3\]"),
        (lambda: native.rms_norm(x, w.astype(BF16), y, 1e-5), "weight has dtype bfloat16, expected native float32"),
        (lambda: native.rms_norm(x, w, y.T, 1e-5), "y has shape"),
        (lambda: native.rms_norm(x, w, np.asfortranarray(y), 1e-5), "y is strided"),
        (lambda: native.rms_norm(x, w, read_only, 1e-5), "y is read-only"),
        (lambda: native.rms_norm(x, w, y.astype(BF16), 1e-5), "y has dtype bfloat16"),
        (lambda: native.topk(x, n, 3, out), "indices has shape"),
        (lambda: native.topk(x, n + 1, 2, out), "length has 4 at 0, expected 0 to 3"),
        (lambda: native.topk(x, n.astype(np.int64), 2, out), "length has dtype int64"),
        (lambda: native.topk(x, n, -1, out), "k is -1"),
        (lambda: run(x.astype(BF16), ids, mix, packed.w13, packed.w2, 0, False, y), "differ in dtype"),
        (lambda: run(x, ids, mix, packed.w2, packed.w13, 0, False, y), "gated=True"),
        (lambda: run(x, ids, mix, packed.w13, pack(2, 4, 4, F32), 0, False, y), "do not fit together"),
        (lambda: run(x, ids.astype(np.int64), mix, packed.w13, packed.w2, 0, False, y), "ids has dtype int64"),
        (lambda: run(x, ids, mix[:1], packed.w13, packed.w2, 0, False, y), "weights has shape"),
        (lambda: pack(1, 3, 4, F32, gated=True), "as many gate as up rows"),
        (lambda: pack(1, 0, 4, F32), "at least 1"),
        (lambda: pack(1, 2, 4, np.float64), "dtype is float64"),
        (lambda: packed.w2.set(0, y), "logical has shape"),
        (lambda: native.set_num_threads(0), "num_threads is 0"),
        (lambda: native.set_isa("abacus"), "expected one of baseline"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(IndexError, match="expert is 2"):
        packed.w2.set(2, np.ones((3, 4), F32))


def test_experts_packed_for_another_instruction_set_still_run(isa):
    rng = np.random.default_rng(12)
    packed, x = Experts(rng, 2, 70, 30, F32), random(rng, 3, 70)
    ids, weights = route(rng, 3, 2, 2)
    y = packed.run(x, ids, weights)
    native.set_isa("baseline")
    assert same_bits(packed.run(x, ids, weights), y)
    if isa != "baseline":
        with pytest.raises(ValueError, match="different instruction sets"):
            native.moe_experts(x, ids, weights, packed.w13, native.Packed(2, 70, 30, F32), 0, False, y)


def test_the_host_has_one_device():
    for device in ("1", "3", "cuda"):
        with pytest.raises(UsageError, match=f"^cpu has no device '{device}': expected 'cpu' alone$"):
            create(f"cpu:{device}")
