"""Products with codes under a scheme, in every instruction set that this CPU runs."""

import ml_dtypes
import numpy as np
import pytest

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from porthal.hal import scheme_of
from porthal.hal.scheme import WEIGHTS

pytestmark = pytest.mark.usefixtures("isa")
F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
SCHEMES = pytest.mark.parametrize("scheme", WEIGHTS)
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
ONE = {"mxfp4": 127, "nvfp4": 0x38}  # as a scale of a byte


def parts_of(scheme, w):
    return scheme_of(scheme).quantised(w.astype(np.float64))


def packed(scheme, w, dtype, gated=False):
    return of_parts(scheme, [parts_of(scheme, matrix) for matrix in w.reshape(-1, *w.shape[-2:])], dtype, gated)


def of_parts(scheme, matrices, dtype, gated=False):
    made = native.Packed(len(matrices), *matrices[0]["codes"].shape, dtype, gated, scheme)
    for e, parts in enumerate(matrices):
        made.set_codes(e, **parts)
    return made


def linear(x, w, rows):
    y = np.full((len(x), rows), 7, F32)
    native.linear(x, w, y)
    return y


def exact(scheme, rng, *shape):
    """Parts whose scales are powers of two; of codes that a rule makes, the largest of a block is among them."""
    if scheme in ONE:
        form = scheme_of(scheme).form(shape)
        step = 1 if scheme == "mxfp4" else 8
        parts = {
            "codes": rng.integers(0, 16, shape).astype(np.uint8),
            "scale": (ONE[scheme] + step * rng.integers(-1, 2, form["scale"][0])).astype(np.uint8),
            "whole": (2.0 ** rng.integers(-1, 2, shape[:1])).astype(F32),
        }
        return {name: parts[name] for name in form}
    top = {"int8_channel": 127, "fp8_block": 448, "int4_g128": 7, "int4_g32": 7}[scheme]
    w = rng.integers(-7, 8, shape).astype(np.float64)
    w[..., ::2, ::32] = top * rng.choice([-1, 1], w[..., ::2, ::32].shape)
    w[..., 1::2, ::32] = -top
    return parts_of(scheme, w / 8)


@SCHEMES
@DTYPES
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(1, 1, 1), (0, 8, 8), (3, 7, 33), (6, 257, 64), (7, 96, 130), (13, 300, 65), (33, 576, 96), (40, 515, 129), (70, 131, 34)],
)
def test_exact_products(scheme, dtype, rows, depth, columns):
    """Where every sum is a whole number below 2**24 times a power of two nothing is rounded: the value is known."""
    rng = np.random.default_rng(rows + depth)
    x, parts = rng.integers(-3, 4, (rows, depth)).astype(np.float64), exact(scheme, rng, columns, depth)
    x[:, ::32] = 127 if scheme == "int8_channel" else 7  # so that the scales of rows are powers of two, or x stays exact
    if scheme == "fp8_block":
        x[:, ::32] = 448 / 64
    y = linear(x.astype(dtype), of_parts(scheme, [parts], dtype), columns)
    assert np.array_equal(y, (x @ scheme_of(scheme).numbers(parts).T).astype(F32))


@SCHEMES
def test_a_row_has_the_same_bits_whatever_is_beside_it(scheme, threads):
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((230, 600)).astype(BF16), packed(scheme, rng.standard_normal((200, 600)), BF16)
    threads(1)
    all_rows = linear(x, w, 200)
    for n in (1, 2, 5, 12, 13, 20, 40):
        assert linear(x[7 : 7 + n], w, 200).tobytes() == all_rows[7 : 7 + n].tobytes()
    threads(2)
    assert linear(x, w, 200).tobytes() == all_rows.tobytes()
    x[3, 1], x[4, 2] = np.nan, np.inf
    beside = linear(x, w, 200)
    assert not np.isfinite(beside[3:5]).any()
    assert np.delete(beside, [3, 4], 0).tobytes() == np.delete(all_rows, [3, 4], 0).tobytes()


@SCHEMES
@DTYPES
def test_parts_come_back_bit_for_bit_and_take_little_more_than_they_must(scheme, dtype):
    """No dequantised copy: codes and scales take at most 1.05 times their own bytes, whatever the dtype beside them."""
    rng = np.random.default_rng(4)
    for gated, shape in ((False, (576, 1024)), (True, (640, 1152))):
        parts = parts_of(scheme, rng.standard_normal(shape))
        made = native.Packed(1, *shape, dtype, gated, scheme)
        made.set_codes(0, **parts)
        back = {name: np.zeros_like(part) for name, part in parts.items()}
        made.get_codes(0, **back)
        assert all(back[name].tobytes() == parts[name].tobytes() for name in parts)
        code_bytes = parts["codes"].size * (1 if "8" in scheme_of(scheme).codes else 0.5)
        assert made.nbytes <= 1.05 * (code_bytes + sum(part.nbytes for name, part in parts.items() if name != "codes"))
    odd = parts_of(scheme, rng.standard_normal((130, 131)))
    made = native.Packed(1, 130, 131, dtype, True, scheme)
    made.set_codes(0, **{name: np.asfortranarray(part) for name, part in odd.items()})
    back = {name: np.zeros_like(part) for name, part in odd.items()}
    made.get_codes(0, **back)
    assert all(back[name].tobytes() == odd[name].tobytes() for name in odd)


@SCHEMES
@DTYPES
@pytest.mark.parametrize("rows", [1, 20])
def test_every_code(scheme, dtype, rows):
    """Alone in a row of zeros each code is multiplied with what stands for 1, the lowest of int4 and int8 too, which no rule
    of rounding makes; of 256 of e4m3 two are NaN."""
    rule, top = scheme_of(scheme), {"int8_channel": 127, "fp8_block": 448}.get(scheme, 1)
    every = {"int8": np.arange(-128, 128), "int4": np.arange(-8, 8)}.get(rule.codes, np.arange(256))
    every = np.arange(16) if rule.codes == "float4_e2m1fn" else every
    form = rule.form((len(every), 256))
    codes = np.zeros(*form["codes"])
    np.fill_diagonal(codes, every)
    ones = {name: np.full(shape, ONE.get(scheme, 1) if name == "scale" else 1, kind) for name, (shape, kind) in form.items()}
    made = of_parts(scheme, [ones | {"codes": codes}], dtype)
    y = linear(np.full((rows, 256), top, dtype), made, len(every)) / top
    np.testing.assert_array_equal(y, np.tile(rule.decoded(codes.diagonal()), (rows, 1)))


@DTYPES
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("scheme", ONE)
def test_every_scale_of_a_byte(scheme, dtype, rows):
    """Negative ones, NaN, subnormal ones and the least power of two among them; ragged groups of a ragged panel."""
    rule, depth = scheme_of(scheme), 40
    form = rule.form((256, depth))
    parts = {name: np.full(shape, ONE[scheme] if name == "scale" else 2, kind) for name, (shape, kind) in form.items()}
    at = np.random.default_rng(6).integers(0, form["scale"][0][1], 256)
    parts["scale"][np.arange(256), at] = np.arange(256)
    for first in range(0, depth, rule.block[1]):
        x = np.zeros((rows, depth))
        x[:, first] = 1
        y = linear(x.astype(dtype), of_parts(scheme, [parts], dtype), 256)
        np.testing.assert_array_equal(y, (x @ rule.numbers(parts).T).astype(F32))


@SCHEMES
def test_experts_as_their_parts(scheme):
    """The fused call gives what the two products and the gate between them give, but for one rounding in between."""
    rng = np.random.default_rng(5)
    x, ids = rng.standard_normal((37, 160)).astype(F32), rng.integers(-1, 4, (37, 2)).astype(np.int32)
    mix, w13, w2 = rng.random((37, 2), F32), rng.standard_normal((4, 2 * 75, 160)), rng.standard_normal((4, 160, 75))
    up, down, y = packed(scheme, w13, F32, True), packed(scheme, w2, F32), np.empty_like(x)
    native.moe_experts(x, ids, mix, up, down, 0, False, y)
    expected = np.zeros_like(x)
    for e in range(4):
        h = linear(x, packed(scheme, w13[e], F32), 150)
        with np.errstate(over="ignore"):
            gated = h[:, :75] / (1 + np.exp(-h[:, :75])) * h[:, 75:]
        out = linear(gated, packed(scheme, w2[e], F32), 160)
        for t, j in np.argwhere(ids == e):
            expected[t] += mix[t, j] * out[t]
    off = np.abs(y - expected)
    assert (off <= 1e-5 * np.abs(expected).max()).mean() > 0.9  # where a code of what is hidden does not lie on a boundary
    assert off.max() <= 0.02 * np.abs(expected).max()


def rows_under(scheme, x):
    """Codes and scales that the native module makes of rows."""
    form = scheme_of(scheme).form(x.shape)
    parts = [np.empty(shape, dtype) for shape, dtype in form.values()]
    native.quantize(x, *parts, scheme_of(scheme).block[1])
    return parts


@DTYPES
@pytest.mark.parametrize("scheme", ["int8_token", "fp8_group", "int8_tile_latents", "fp8_latents"])
def test_rows_to_codes_and_back(scheme, dtype):
    """Scales that are powers of two leave one answer to every number, ties among them; any strides."""
    rng, rule = np.random.default_rng(8), scheme_of(scheme)
    x = rng.integers(-200, 201, (9, 2 * 200)) / 4
    x[:, 1::32], x[3] = 127 if rule.codes == "int8" else 448 / 8, 0
    x = x.astype(dtype)[:, ::-2][:, ::-1]
    codes, scale = rows_under(scheme, x)
    expected = rule.quantised(x.astype(np.float64))
    assert np.array_equal(scale, expected["scale"])
    assert np.array_equal(rule.decoded(codes), rule.decoded(expected["codes"]))
    y = np.empty(x.shape, dtype)
    native.dequantize(codes, scale, rule.block[1], y)
    assert np.array_equal(y, rule.numbers(expected).astype(dtype))
    native.dequantize(*(np.asfortranarray(part) for part in (codes, scale)), rule.block[1], y)
    assert np.array_equal(y, rule.numbers(expected).astype(dtype))


def test_what_is_not_finite_is_nan_in_its_group_alone():
    x = np.ones((3, 256), F32)
    x[0, 3], x[1, 200] = np.nan, -np.inf
    codes, scale = rows_under("fp8_group", x)
    y = np.empty_like(x)
    native.dequantize(codes, scale, 128, y)
    assert np.isnan(y[0, :128]).all() and np.isnan(y[1, 128:]).all()
    assert (y[0, 128:] == 1).all() and (y[1, :128] == 1).all() and (y[2] == 1).all()


@pytest.mark.parametrize(("heads", "width"), [(32, 128), (16, 64), (8, 128), (3, 96), (40, 100)])
def test_scores_of_keys_that_are_codes(heads, width):
    """Whole numbers, and scales that are powers of two: every score is known."""
    rng, slots = np.random.default_rng(9), 5 * 16
    keys, queries = rng.integers(-9, 10, (slots, width)), rng.integers(-9, 10, (6, heads, width))
    queries[..., 0] = 127
    scale, w = 2.0 ** rng.integers(-3, 3, (slots, 1)), rng.integers(-3, 4, (6, heads))
    table, visible = np.int32([[4, 1, 0, 3]]), np.int32([50, 51, 52, 53, 54, 55])
    scores = np.empty((6, 64), F32)
    native.indexer_scores((queries / 4).astype(BF16), w.astype(F32), keys.astype(np.int8), scale.astype(F32), visible,
                          np.int32([0, 6]), table, 16, 0.5, scores)  # fmt: skip
    at = (table[0][:, None] * 16 + np.arange(16)).ravel()
    products = np.maximum(np.einsum("thd,sd->ths", queries / 4, keys[at] * scale[at]), 0)
    expected = 0.5 * np.einsum("th,ths->ts", w, products)
    assert np.array_equal(scores, np.where(np.arange(64) < visible[:, None], expected, -np.inf))
    best = np.empty((6, 8), np.int32)
    native.indexer_topk((queries / 4).astype(BF16), w.astype(F32), keys.astype(np.int8), scale.astype(F32), visible,
                        np.int32([0, 6]), table, 16, 0.5, 8, best)  # fmt: skip
    for row, chosen in zip(scores, best):
        assert np.array_equal(chosen, np.sort(np.argsort(-row, kind="stable")[:8]))


@DTYPES
@pytest.mark.parametrize("scheme", ["int8_latents", "int8_tile_latents", "fp8_latents"])
def test_attention_over_latents_that_are_codes(scheme, dtype):
    """The same bits as over a cache that holds the numbers that the codes say."""
    rng, slots, heads, width = np.random.default_rng(10), 320, 8, 256
    codes, scale = rows_under(scheme, rng.standard_normal((slots, width)).astype(dtype))
    numbers = np.empty((slots, width), dtype)
    native.dequantize(codes, scale, scheme_of(scheme).block[1], numbers)
    q, qr, kp = (rng.standard_normal(shape).astype(dtype) for shape in ((3, heads, width), (3, heads, 64), (slots, 64)))
    indices = np.stack([np.sort(rng.permutation(300)[:200]) for _ in range(3)]).astype(np.int32)
    rest = kp, indices, np.int32([200, 0, 150]), np.int32([0, 3]), np.arange(5, dtype=np.int32)[None], 64, 0.1
    results = []
    for c, c_scale, group in ((codes, scale, scheme_of(scheme).block[1]), (numbers, None, 0)):
        o = np.empty((3, heads, width), dtype)
        native.sparse_mla(q, qr, c, c_scale, group, *rest, o)
        results.append(o.tobytes())
    assert results[0] == results[1]


def test_bad_codes_are_refused_in_a_sentence():
    made, plain = native.Packed(1, 5, 3, F32, False, "int8_channel"), native.Packed(1, 5, 3, F32)
    codes, scale, w = np.zeros((5, 3), np.int8), np.ones((5, 1), F32), np.zeros((5, 3), F32)
    short, halves = native.Packed(1, 5, 3, F32, False, "nvfp4"), np.zeros((5, 3), np.uint8)
    for call, words in [
        (lambda: made.set_codes(0, codes.view(np.uint8), scale), "codes has dtype uint8, expected native int8"),
        (lambda: made.set_codes(0, codes[:4], scale), r"codes has shape \[4, 3\], expected \[5, 3\]"),
        (lambda: made.set_codes(0, codes, scale.T), r"scale has shape \[1, 5\], expected \[5, 1\]"),
        (lambda: made.set_codes(0, codes, scale.astype(F16)), "scale has dtype float16"),
        (lambda: made.set(0, w), "packed under a scheme: set their codes"),
        (lambda: made.get(0, w), "packed under a scheme: get their codes"),
        (lambda: plain.set_codes(0, codes, scale), "packed without a scheme: they have no codes"),
        (lambda: native.Packed(1, 5, 3, F32, False, "int5"), "scheme is 'int5', expected one that this module packs"),
        (lambda: made.set_codes(0, codes, scale, scale), "whole must be None under int8_channel"),
        (lambda: short.set_codes(0, halves, halves[:, :1]), "whole must be given under nvfp4"),
        (lambda: short.set_codes(0, halves, halves[:, :1], scale[:4, 0]), r"whole has shape \[4\], expected \[5\]"),
        (lambda: short.set_codes(0, halves, scale, scale[:, 0]), "scale has dtype float32, expected native uint8"),
        (lambda: native.Packed(1, 1, 1 << 17, F32, False, "int8_channel"), "columns is 131072, expected at most 131071"),
        (lambda: linear(np.ones((2, 3), BF16), made, 5), "x has dtype bfloat16, expected native float32"),
        (lambda: native.quantize(w, codes, scale, 2), r"scale has shape \[5, 1\], expected \[5, 2\]"),
        (lambda: native.quantize(w, codes, scale, -1), "group is -1, expected at least 0"),
        (lambda: native.quantize(w, w, scale, 0), "codes has dtype float32, expected native int8, or uint8 of e4m3"),
        (lambda: native.kv_write_codes(codes, scale, np.int64([5]), w[:1], 0), r"slots\[0\] is 5, expected -1 to 4"),
        (lambda: native.kv_write_codes(codes[:, ::2], scale, np.int64([0]), w[:1, ::2], 0), "has gaps inside a row"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
