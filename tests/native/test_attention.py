"""Attention over pages and its indexer on the cpu backend, against the contracts in float64, in every instruction set that
this CPU runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from porthal.backends.cpu import _native  # noqa: F401
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from porthal.hal import Batch, PagesSpec, Rows, Selection, SelectionSpec, contracts, create, numpy_dtype, widen
from porthal.hal.scheme import Scaled, scheme_of

pytestmark = pytest.mark.usefixtures("isa")
CPU = create("cpu")
DTYPES = ("float32", "bfloat16", "float16")
ROUNDING = {"float32": 2.0**-16, "bfloat16": 2.0**-7, "float16": 2.0**-9}


def cache(rng, fields, dtype, pages, size):
    made = CPU.alloc_pages(PagesSpec(fields, dtype, pages, size))
    for name, width in fields:
        made[name][...] = rng.standard_normal((pages * size, width)).astype(numpy_dtype(dtype))
    return made


def requests(rng, q_lens, kv_lens, size):
    """Requests whose pages lie anywhere, and how many pages there are."""
    counts = [-(-n // size) for n in kv_lens]
    order = iter((rng.permutation(sum(counts)) + 1).tolist())
    return Batch.build(q_lens, kv_lens, [[next(order) for _ in range(n)] for n in counts], size), sum(counts) + 1


def exact(op, *operands, **attrs):
    def wide(value):
        if isinstance(value, np.ndarray):
            return widen(value)
        return replace(value, native={n: widen(v) for n, v in value.native.items()}) if hasattr(value.spec, "fields") else value

    return contracts()[op].reference(*(v if isinstance(v, Batch) else wide(v) for v in operands), **attrs)


def floats(rng, shape, dtype):
    return rng.standard_normal(shape).astype(numpy_dtype(dtype))


class Attention:
    """A call of sparse_mla whose rows select some of the positions that they see."""

    def __init__(self, seed, heads, c, r, k, q_lens, kv_lens, size, dtype):
        rng = np.random.default_rng(seed)
        self.batch, pages = requests(rng, q_lens, kv_lens, size)
        self.kv = cache(rng, (("c", c), ("kp", r)), dtype, pages, size)
        T = self.batch.T
        self.q = floats(rng, (T, heads, c), dtype), floats(rng, (T, heads, r), dtype)
        indices = np.full((T, k), -1, np.int32)
        for t, n in enumerate(np.minimum(self.batch.visible, k)):
            indices[t, :n] = rng.permutation(self.batch.visible[t])[:n]
        self.sel = Selection(SelectionSpec(T, k), Rows(indices, np.minimum(self.batch.visible, k)))

    def run(self, scale=0.1):
        return CPU.sparse_mla(*self.q, self.kv, self.sel, self.batch, scale=scale)

    def exact(self, scale=0.1):
        return exact("sparse_mla", *self.q, self.kv, self.sel, self.batch, scale=scale)


def assert_close(found, wanted, dtype):
    size = np.abs(wanted).max(initial=1e-30)
    assert np.abs(found.astype(np.float64) - wanted).max(initial=0) <= ROUNDING[dtype] * size


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_sparse_mla_of_any_shape(data):
    dtype, widths = data.draw(st.sampled_from(DTYPES)), st.integers(1, 70) | st.sampled_from([32, 64])
    heads, c, r = data.draw(st.sampled_from([1, 3, 8, 20, 65])), data.draw(widths), data.draw(widths)
    kv_lens = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))
    q_lens = [min(n, data.draw(st.integers(1, 3))) for n in kv_lens]
    call = Attention(data.draw(st.integers(0, 99)), heads, c, r, data.draw(st.integers(1, 310)), q_lens, kv_lens, 7, dtype)
    assert_close(call.run(), call.exact(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_mla_bits_depend_on_neither_threads_nor_other_rows_nor_strides(dtype, threads):
    call = Attention(1, 20, 96, 32, 400, [2, 3], [500, 450], 16, dtype)
    threads(1)
    whole = call.run()
    assert_close(whole, call.exact(), dtype)
    call.q = tuple(np.repeat(q, 2, axis=2)[:, :, ::2] for q in call.q)
    for count in (1, 2, 3):
        threads(count)
        assert call.run().tobytes() == whole.tobytes()
    alone = Batch(np.int32([0, 1]), call.batch.visible[:1], call.batch.block_table[:1], 16)
    sel = Selection(SelectionSpec(1, 400), Rows(*(part[:1] for part in call.sel.native)))
    first = CPU.sparse_mla(*(q[:1] for q in call.q), call.kv, sel, alone, scale=0.1)
    assert first.tobytes() == whole[:1].tobytes()


def test_sparse_mla_of_scores_that_rise_to_the_last_key_or_are_far_below_zero():
    call = Attention(2, 8, 64, 8, 500, [1], [500], 16, "float32")
    call.sel.native.indices[:] = np.arange(500)
    keys = call.kv["kp"][call.batch.slots_of(0)]
    keys[:] = np.linspace(-40, 40, 500)[:, None]
    call.kv["kp"][call.batch.slots_of(0)] = keys
    for q in (1.0, -1.0):
        call.q[1][:] = q
        assert_close(call.run(), call.exact(), "float32")


def test_what_a_call_may_not_read_is_refused():
    call = Attention(3, 4, 16, 4, 10, [1], [30], 8, "float32")
    for bad, words in ((-1, "position is -1"), (40, "page -1 at"), (2**31 - 1, "page -1 at")):
        call.sel.native.indices[0, 4] = bad
        with pytest.raises(ValueError, match=words):
            call.run()
    call.sel.native.indices[0, 4] = 0
    call.batch.block_table[0, 0] = 99
    with pytest.raises(ValueError, match="block_table has page 99 at"):
        call.run()
    call.sel.native.length[0] = 11
    with pytest.raises(ValueError, match="length has 11 at 0, expected 0 to 10"):
        call.run()


class Indexer:
    def __init__(self, seed, heads, width, q_lens, kv_lens, size, dtype, w="float32"):
        rng = np.random.default_rng(seed)
        self.batch, pages = requests(rng, q_lens, kv_lens, size)
        self.keys = cache(rng, (("k", width),), dtype, pages, size)
        self.iq, self.w = floats(rng, (self.batch.T, heads, width), dtype), floats(rng, (self.batch.T, heads), w)

    @property
    def operands(self):
        return self.iq, self.w, self.keys, self.batch

    def scores(self):
        return CPU.indexer_scores(*self.operands, scale=0.1)

    def chosen(self, k):
        return CPU.indexer_topk(*self.operands, k=k, scale=0.1).native

    def chosen_of_scores(self, k):
        return CPU.topk(self.scores(), self.batch, k=k).native


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_indexer_of_any_shape(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    heads, width = data.draw(st.sampled_from([1, 4, 5, 32, 40, 70])), data.draw(st.integers(1, 70) | st.sampled_from([32, 64]))
    kv_lens = data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=3))
    q_lens = [min(n, data.draw(st.integers(1, 20))) for n in kv_lens]
    w = data.draw(st.sampled_from(["float32", dtype]))
    call = Indexer(data.draw(st.integers(0, 99)), heads, width, q_lens, kv_lens, 7, dtype, w)
    found, wanted = call.scores(), exact("indexer_scores", *call.operands, scale=0.1)
    seen = np.isfinite(wanted)
    assert np.array_equal(np.isneginf(found), ~seen)
    size = np.abs(wanted[seen]).max(initial=1e-30)
    assert np.abs(found[seen] - wanted[seen]).max(initial=0) <= 2.0**-18 * size
    k = data.draw(st.integers(1, 250))
    assert all(np.array_equal(a, b) for a, b in zip(call.chosen(k), call.chosen_of_scores(k)))


@pytest.mark.parametrize(("dtype", "heads", "width"), [("float32", 3, 16), ("bfloat16", 3, 16), ("bfloat16", 40, 64)])
def test_indexer_bits_and_choice_do_not_depend_on_threads(dtype, heads, width, threads):
    call = Indexer(4, heads, width, [1, 20], [30_000, 2000], 64, dtype)
    threads(1)
    scores, chosen = call.scores(), call.chosen(300)
    assert all(np.array_equal(a, b) for a, b in zip(chosen, call.chosen_of_scores(300)))
    for count in (2, 3):
        threads(count)
        assert call.scores().tobytes() == scores.tobytes()
        assert all(np.array_equal(a, b) for a, b in zip(call.chosen(300), chosen))


@pytest.mark.parametrize("heads", [3, 5])
def test_a_key_that_is_nan_makes_scores_of_its_own_nan_only(heads):
    call = Indexer(5, heads, 16, [2], [60], 8, "float32")
    call.keys["k"][call.batch.slots_of(0)[7]] = np.nan
    scores = call.scores()
    assert np.isnan(scores[:, 7]).all()
    assert np.isnan(scores).sum() == 2
    assert 7 not in call.chosen(40).indices


def test_pages_keep_their_dtype_and_the_fields_of_a_slot_are_beside_each_other():
    spec = PagesSpec((("c", 512), ("kp", 64)), "bfloat16", 3, 4)
    pages = CPU.alloc_pages(spec)
    c, kp = pages.leaves()
    assert c.dtype == kp.dtype == numpy_dtype("bfloat16")
    assert (c.strides, c.ctypes.data % 64, kp.ctypes.data - c.ctypes.data) == ((1152, 2), 0, 1024)
    assert not widen(c).any()
    coded = CPU.alloc_pages(PagesSpec((("k", 128),), "bfloat16", 3, 64, "int8_keys"))
    assert [(v.dtype.name, v.shape, v.ctypes.data % 64) for v in coded.leaves()] == [
        ("int8", (192, 128), 0), ("float32", (192, 1), 0)
    ]  # fmt: skip
    logical = {name: np.full((12, width), 3, numpy_dtype("bfloat16")) for name, width in spec.fields}
    assert CPU.from_logical(spec, logical, pages) is pages
    assert all(np.array_equal(widen(v), widen(logical[n])) for n, v in CPU.to_logical(pages).items())


class CodedIndexer(Indexer):
    """The same with keys under a scheme."""

    def __init__(self, scheme, *shape):
        super().__init__(*shape)
        spec = replace(self.keys.spec, scheme=scheme)
        parts = scheme_of(scheme).quantised(widen(self.keys["k"]))
        parts["scale"][::5] *= np.float32(1.37)
        top = {"int8_keys": 127, "fp8_keys": 448}[scheme]  # so that scales of queries are powers of two, and nothing is rounded
        iq = np.random.default_rng(shape[0]).integers(-15, 16, self.iq.shape) * 1.0
        iq[..., ::32] = top
        self.iq = (iq * 2.0 ** -np.arange(iq.shape[1])[:, None].clip(max=9)).astype(self.iq.dtype)
        self.keys = CPU.from_logical(spec, {"k": parts["codes"], "k_scale": parts["scale"]})
        self.said = Scaled(scheme_of(scheme), parts)

    def exact(self):
        wide = replace(self.keys, native={"k": self.said})
        return contracts()["indexer_scores"].reference(widen(self.iq), widen(self.w), wide, self.batch, scale=0.1)


@pytest.mark.parametrize("scheme", ["int8_keys", "fp8_keys"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "width", "size"),
    [(1, 7, 7), (5, 128, 16), (16, 64, 64), (32, 128, 64), (40, 128, 48), (20, 192, 64), (96, 64, 128)],
)
def test_indexer_of_codes(scheme, dtype, heads, width, size):
    call = CodedIndexer(scheme, heads + width, heads, width, [1, 3, 20, 1], [0, 200, 333, 64], size, dtype)
    found, wanted = call.scores(), call.exact()
    seen = np.isfinite(wanted)
    assert np.array_equal(np.isneginf(found), ~seen)
    assert np.abs(found[seen] - wanted[seen]).max() <= 2.0**-17 * np.abs(wanted[seen]).max()
    assert all(np.array_equal(a, b) for a, b in zip(call.chosen(70), call.chosen_of_scores(70)))
