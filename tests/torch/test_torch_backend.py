"""The torch backend against the contracts' float64 references, on the CPU: values, edges, gradients, memory, copies."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import porthal  # noqa: E402
from porthal.backends.torch import backend as module  # noqa: E402
from porthal.hal import (  # noqa: E402
    FLOATS,
    UNIT_ROUNDOFF,
    Batch,
    CallSpec,
    NotClaimed,
    Pages,
    PagesSpec,
    Selection,
    SelectionSpec,
    Unavailable,
    Weight,
    WeightSpec,
    contracts,
    create,
    narrow,
    widen,
)
from porthal.hal.scheme import WEIGHTS  # noqa: E402
from tests.memory import attention_over  # noqa: E402

B = porthal.bind("torch", overrides={}, fallback="error")
REFERENCE = porthal.bind("reference", overrides={}, fallback="error")
COMPOSITES = {"mla_prolog", "index_prolog", "mla_output", "mtp_input", "moe_layer"}
few = settings(max_examples=25, deadline=None, derandomize=True)
floats = pytest.mark.parametrize("dtype", FLOATS)


class Made(NamedTuple):
    """An operand before any backend has it: its spec and its logical arrays."""

    spec: Any
    arrays: dict[str, np.ndarray]


def on(binding: Any, value: Any) -> Any:
    if isinstance(value, Made):
        return binding.backend.from_logical(value.spec, value.arrays)
    if isinstance(value, Batch):
        return binding.plan(value)
    return binding.from_numpy(value) if isinstance(value, np.ndarray) else value


def arrays(binding: Any, out: Any) -> list[np.ndarray]:
    """Results as NumPy; a selection in ascending order, since the contract leaves the order free."""
    found = []
    for value in out if isinstance(out, tuple) and not hasattr(out, "spec") else (out,):
        if isinstance(value, Selection):
            logical = binding.to_logical(value)
            indices, length = logical["indices"], logical["length"]
            assert ((indices >= 0) == (np.arange(indices.shape[1]) < length[:, None])).all(), "-1 only at the tail"
            found += [np.sort(indices, axis=1), length]
        elif isinstance(value, Pages):
            found += list(binding.to_logical(value).values())
        else:
            found.append(binding.to_numpy(value))
    return found


def agree(op: str, *operands: Any, roundings: float = 1, **attrs: Any) -> None:
    """The backend's results against the reference's: shape and dtype; integers and copies exactly; floats within
    `roundings` of the result's dtype and float32 accumulation; infinities and NaN in the same places."""
    results = [arrays(b, getattr(b, op)(*(on(b, v) for v in operands), **attrs)) for b in (B, REFERENCE)]
    for got, golden in zip(*results, strict=True):
        assert got.shape == golden.shape and got.dtype == golden.dtype
        if golden.dtype.kind == "i" or contracts()[op].exact:
            np.testing.assert_array_equal(widen(got), widen(golden))
            continue
        unit = UNIT_ROUNDOFF[str(golden.dtype)]
        y, g = widen(got), widen(golden)
        finite = np.isfinite(g)
        np.testing.assert_array_equal(np.where(finite, 0.0, y), np.where(finite, 0.0, g))
        size = np.abs(g[finite]).max(initial=0.0)
        bound = 2 * roundings * unit * (np.abs(g) if roundings == 1 else size) + 2.0**-19 * size
        assert (np.abs(y[finite] - g[finite]) <= np.broadcast_to(bound, g.shape)[finite]).all()


def normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return narrow(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def weight(op: str, operand: str, *shape: int, dtype: str = "float32") -> Made:
    return Made(WeightSpec(op, operand, shape, dtype), {"w": normal(len(operand), *shape, dtype=dtype)})


def pages(batch: Batch, dtype: str = "float32", spare: int = 2, **fields: int) -> Made:
    n = int(batch.block_table.max(initial=-1)) + 1 + spare
    spec = PagesSpec(tuple(fields.items()), dtype, n, batch.block_size)
    return Made(spec, {name: normal(width, spec.slots, width, dtype=dtype) for name, width in fields.items()})


def selection(batch: Batch, k: int, seed: int = 0) -> Made:
    rng = np.random.default_rng(seed)
    length = np.minimum(batch.visible, k).astype(np.int32)
    indices = np.full((batch.T, k), -1, np.int32)
    for t, n in enumerate(length):
        indices[t, :n] = rng.permutation(batch.visible[t])[:n]
    return Made(SelectionSpec(batch.T, k), {"indices": indices, "length": length})


@st.composite
def batches(draw: Any) -> Batch:
    """Requests of 0 to 4 rows over up to 200 earlier positions, some of them padded, on scattered pages."""
    size = draw(st.sampled_from([64, 128]))
    q, past = [], []
    for _ in range(draw(st.integers(0, 4))):
        q.append(draw(st.integers(0, 4)))
        past.append(draw(st.sampled_from([None, 0, 1, 60, 127, 200])))
    kv = [0 if p is None else p + n for p, n in zip(past, q)]
    need = [-(-n // size) for n in kv]
    order = list(np.random.default_rng(draw(st.integers(0, 9))).permutation(sum(need)))
    tables = [[order.pop() for _ in range(n)] for n in need]
    return Batch.build(q, kv, tables, size)


BATCH = Batch.build([1, 3, 0, 5, 2], [130, 70, 0, 5, 0], [[3, 1, 4], [0, 5], [], [2], []], 64)
EMPTY = Batch.build([], [], [], 64)
rows = st.sampled_from([0, 1, 5])


# -- values ----------------------------------------------------------------------------------------------------------


@floats
@given(T=rows, H=st.sampled_from([1, 7, 96]), seed=st.integers(0, 99))
@few
def test_row_by_row_ops(dtype: str, T: int, H: int, seed: int) -> None:
    def x(n: int = H, scale: float = 1.0) -> np.ndarray:
        return narrow(scale * widen(normal(seed, T, n)), dtype)

    scale = narrow(widen(normal(1, H)), dtype if seed % 2 else "float32")
    agree("rms_norm", x(scale=10.0 ** (seed % 5 - 2)), scale, eps=1e-5)
    agree("add_rms_norm", x(), x(), scale, eps=1e-5)
    agree("layer_norm", x() + narrow(np.asarray(5.0), dtype), scale, scale, eps=1e-6, roundings=2)
    agree("silu_mul", x(2 * H, scale=30.0))
    agree("add", x(), x(scale=100.0))
    agree("concat", x(), x(3))
    agree("embedding", np.arange(T, dtype=np.int32) % 3, weight("embedding", "table", 3, H, dtype=dtype))
    agree("take_rows", x(), np.array([-1] + [T - 1] * (T > 0), np.int32))
    agree("log_softmax", x(scale=100.0))
    agree("gather_logprob", x(), np.zeros(T, np.int32))
    for to in FLOATS:
        agree("cast", narrow(widen(x()) * 10.0 ** (seed % 90 - 45), dtype), to=to)


@floats
@given(T=rows, K=st.sampled_from([1, 7, 512]), seed=st.integers(0, 99))
@few
def test_matrix_products(dtype: str, T: int, K: int, seed: int) -> None:
    agree("linear", normal(seed, T, K, dtype=dtype), weight("linear", "w", 9, K, dtype=dtype))
    for out in FLOATS:
        agree("linear", normal(seed, T, K, dtype=dtype), weight("linear", "w", 9, K, dtype=dtype), out=out)
    agree("head_linear", normal(seed, T, 4, K, dtype=dtype), weight("head_linear", "w", 4, 9, K, dtype=dtype))


def test_linear_to_float32_rounds_nothing_and_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = normal(0, 3, 512, dtype="bfloat16"), weight("linear", "w", 40, 512, dtype="bfloat16")
    exact = widen(x) @ widen(w.arrays["w"]).T
    whole = B.to_numpy(B.linear(on(B, x), on(B, w), out="float32"))
    assert np.abs(whole - exact).max() < 1e-4 < np.abs(widen(narrow(exact, "bfloat16")) - exact).max()
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 512 * 4)
    np.testing.assert_allclose(B.to_numpy(B.linear(on(B, x), on(B, w), out="float32")), whole, rtol=1e-5, atol=1e-4)


@floats
@pytest.mark.parametrize("layout, width", [("interleaved", 8), ("half", 8), ("interleaved", 24), ("half", 24)])
def test_rope_anywhere_in_the_head(dtype: str, layout: str, width: int) -> None:
    far = Batch.build([2, 1], [100_000, 3], [list(range(1563)), [1563]], 64)
    for start in {0, 24 - width}:
        for batch in (far, BATCH, EMPTY):
            x = normal(start, batch.T, 3, 24, dtype=dtype)
            # An angle of 1e5 held in float32 is off by 2^-24 of itself, 0.006 radians.
            roundings = 0.003 / UNIT_ROUNDOFF[dtype] if batch is far else 1
            agree("rope", x, batch, theta=1e6, layout=layout, start=start, width=width, roundings=roundings)


@floats
@given(batch=batches(), k=st.sampled_from([1, 40, 300]))
@few
def test_sparse_attention(dtype: str, batch: Batch, k: int) -> None:
    q = normal(1, batch.T, 3, 16, dtype=dtype), normal(2, batch.T, 3, 8, dtype=dtype)
    agree("sparse_mla", *q, pages(batch, dtype, c=16, kp=8), selection(batch, k), batch, scale=0.3, roundings=2)


@floats
@given(batch=batches())
@few
def test_indexer_scores(dtype: str, batch: Batch) -> None:
    iq, w = normal(1, batch.T, 4, 16, dtype=dtype), normal(2, batch.T, 4, dtype=dtype)
    agree("indexer_scores", iq, w, pages(batch, dtype, k=16), batch, scale=0.1, roundings=2)


@pytest.mark.parametrize("temperature", [0.0, 0.05, 1.0])
@given(T=rows, V=st.sampled_from([1, 7, 300]), seed=st.integers(0, 99))
@few
def test_sampling_stays_within_what_rounding_explains(temperature: float, T: int, V: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = np.round(normal(seed, T, V) * 4).astype(np.float32) / 4  # ties
    operands = (
        logits,
        rng.random(T, np.float32),
        np.full(T, temperature, np.float32),
        rng.integers(0, V + 1, T).astype(np.int32),
        rng.choice([0.1, 0.9, 1.0], T).astype(np.float32),
    )
    ids = B.to_numpy(B.sample(*(on(B, v) for v in operands)))
    assert ids.dtype == np.int32
    admits = contracts()["sample"].admits
    assert admits(*(widen(v) for v in operands), results=ids, slack=np.full(T, 1e-5)) is None
    if temperature == 0:
        agree("sample", *operands)


@pytest.mark.parametrize("with_probabilities", [False, True])
@given(n=st.integers(1, 4), seed=st.integers(0, 99))
@few
def test_speculative_verification(with_probabilities: bool, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    R, V = 6, 5
    q = rng.dirichlet(np.ones(V), (R, n)).astype(np.float32)
    operands = [
        2 * normal(seed, R, n + 1, V),
        rng.integers(0, V, (R, n)).astype(np.int32),
        rng.random((R, n + 1), np.float32),
        np.where(np.arange(R) % 2, 0.7, 0.0).astype(np.float32),
        rng.integers(0, V + 1, R).astype(np.int32),
        rng.choice([0.3, 0.95, 1.0], R).astype(np.float32),
    ]
    operands[1][0] = operands[0][0, :n].argmax(1)  # all of request 0 is accepted
    agree("speculative_verify", *operands, *([q] if with_probabilities else []))


def test_a_draw_at_a_boundary_goes_to_the_next_candidate() -> None:
    one, all_, half = np.ones(1, np.float32), np.zeros(1, np.int32), np.full(1, 0.5, np.float32)
    agree("sample", np.zeros((1, 2), np.float32), half, one, all_, one)
    u = np.array([[0.9, 0.5]], np.float32)
    agree("speculative_verify", np.zeros((1, 2, 4), np.float32), np.array([[3]], np.int32), u, one, all_, one)
    early = u * np.float32(0.2)
    agree("speculative_verify", np.zeros((1, 2, 4), np.float32), np.array([[3]], np.int32), early, one, all_, one)


def test_sharp_temperatures_do_not_overflow() -> None:
    logits = np.array([[0.0, 80.0, -300.0], [-np.inf, -np.inf, 1.0]], np.float32)
    cold = np.full(2, 1e-30, np.float32)
    ids = B.sample(*(on(B, v) for v in (logits, np.full(2, 0.5, np.float32), cold, np.zeros(2, np.int32), cold + 1)))
    assert ids.tolist() == [1, 2]


# -- order -----------------------------------------------------------------------------------------------------------

special = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf, np.nan])


@given(values=st.lists(special, min_size=20, max_size=20), seen=st.integers(0, 20), k=st.integers(1, 25))
@few
def test_topk_takes_the_lowest_of_equals(values: list[float], seen: int, k: int) -> None:
    batch = Batch.build([1, 1], [20, seen], [[0], [1]], 64)
    scores = np.array([values, values], np.float32)
    scores[1, seen:] = np.inf  # never read
    agree("topk", scores, batch, k=k)


@floats
@given(values=st.lists(special, min_size=1, max_size=30))
@few
def test_argmax_takes_the_lowest_of_equals(dtype: str, values: list[float]) -> None:
    agree("argmax", narrow(np.array([values, values[::-1]]), dtype))


@given(batch=batches(), k=st.sampled_from([1, 3, 64, 300]), seed=st.integers(0, 9))
@few
def test_indexer_topk_is_exact_on_integers(batch: Batch, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = pages(batch, k=8)
    keys.arrays["k"][:] = rng.integers(-2, 3, keys.arrays["k"].shape)
    iq = rng.integers(-1, 2, (batch.T, 2, 8)).astype(np.float32)
    w = rng.integers(-2, 3, (batch.T, 2)).astype(np.float32)
    agree("indexer_topk", iq, w, keys, batch, k=k, scale=0.5)


def test_indexer_in_many_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.build([2, 30], [100, 700], [[12, 13], list(range(11))], 64)
    rng = np.random.default_rng(0)
    keys = pages(batch, k=8)
    keys.arrays["k"][:] = rng.integers(-2, 3, keys.arrays["k"].shape)
    iq, w = rng.integers(-1, 2, (32, 2, 8)).astype(np.float32), rng.integers(-2, 3, (32, 2)).astype(np.float32)
    monkeypatch.setattr(module, "KEY_BLOCK", 128)
    monkeypatch.setattr(module, "CHUNK_BYTES", 100_000)
    agree("indexer_topk", iq, w, keys, batch, k=50, scale=0.5)
    agree("indexer_scores", iq, w, keys, batch, scale=0.5)
    q = normal(1, 32, 3, 16), normal(2, 32, 3, 8)
    agree("sparse_mla", *q, pages(batch, c=16, kp=8), selection(batch, 50), batch, scale=0.3)


@pytest.mark.parametrize("groups", [{}, {"n_group": 4, "topk_group": 2}])
def test_routing_with_ties_and_nan(groups: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    logits = rng.choice(np.array([-1.0, 0.0, 2.0, np.nan], np.float32), (40, 16))
    logits[0] = np.nan
    ids, weights = B.moe_route(on(B, logits), on(B, np.zeros(16, np.float32)), k=3, scale=2.5, **groups)
    golden, _ = REFERENCE.moe_route(logits, np.zeros(16, np.float32), k=3, scale=2.5, **groups)
    np.testing.assert_array_equal(ids.numpy(), golden)
    clean = ~np.isnan(np.take_along_axis(logits, golden, 1)).any(1)
    assert clean.sum() > 10
    np.testing.assert_allclose(weights.numpy()[clean].sum(1), 2.5, rtol=1e-6)
    barred = np.where(np.arange(16) % 5, normal(2, 16), -np.inf).astype(np.float32)
    for bias in (normal(2, 16), barred):
        agree("moe_route", normal(1, 30, 16), bias, k=3, scale=2.5, roundings=4, **groups)
    agree("moe_route", normal(1, 30, 16), np.full(16, -np.inf, np.float32), k=3, scale=2.5, roundings=4, **groups)
    agree("moe_route", normal(1, 0, 16), normal(2, 16), k=3, scale=2.5, **groups)


# -- experts ---------------------------------------------------------------------------------------------------------


def expert_ids(T: int, seed: int = 0) -> np.ndarray:
    """Three distinct experts of 0..5 per row, some absent."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(6)[:3] for _ in range(T)]) if T else np.zeros((0, 3))
    return np.where(rng.random((T, 3)) < 0.2, -1, ids).astype(np.int32)


@floats
@given(T=st.sampled_from([0, 1, 17]), first=st.sampled_from([0, 1, 9]), seed=st.integers(0, 99))
@few
def test_experts(dtype: str, T: int, first: int, seed: int) -> None:
    ids, x, w = expert_ids(T, seed), normal(seed, T, 8, dtype=dtype), normal(seed, T, 3)
    agree("moe_permute", x, ids, E=4, first_expert=first)
    w13, w2 = (weight("moe_experts", n, *s, dtype=dtype) for n, s in (("w13", (4, 12, 8)), ("w2", (4, 8, 6))))
    agree("moe_experts", x, w13, w2, ids, w, first_expert=first, roundings=6)


@floats
def test_padding_rows_of_experts_affect_nothing(dtype: str) -> None:
    x = normal(0, 9, 7, dtype=dtype)
    x[8] = np.nan
    w = weight("grouped_gemm", "w", 4, 6, 7, dtype=dtype)
    counts = np.array([2, 0, 5, 1], np.int32)
    y = B.grouped_gemm(on(B, x), on(B, w), on(B, counts))
    golden = REFERENCE.grouped_gemm(x, on(REFERENCE, w), counts)
    np.testing.assert_allclose(widen(B.to_numpy(y))[:8], widen(golden)[:8], rtol=2 * UNIT_ROUNDOFF[dtype], atol=1e-5)
    source = np.array([5, -1, 0, 3, -1, -1], np.int32)
    rows = normal(1, 6, 7, dtype=dtype)
    rows[source < 0] = np.nan
    agree("moe_unpermute", rows, source, normal(2, 3, 2))


# -- cache -----------------------------------------------------------------------------------------------------------


@floats
@given(batch=batches())
@few
def test_writes_touch_only_their_slots(dtype: str, batch: Batch) -> None:
    cache = pages(batch, dtype, c=16, kp=8)
    cache.arrays["c"][:] = np.nan
    first = normal(1, batch.T, 16, dtype=dtype)
    first[batch.T // 2 :, 0] = np.inf
    agree("kv_write", cache, batch, first, normal(2, batch.T, 8, dtype=dtype))
    agree("kv_write", pages(batch, dtype, k=16), batch, first)


@floats
def test_pages_are_copied_as_they_were_before(dtype: str) -> None:
    source, target = np.array([0, 1, 1], np.int32), np.array([1, 5, 0], np.int32)
    agree("page_copy", pages(BATCH, dtype, c=16, kp=8), source, target)
    agree("page_copy", pages(BATCH, dtype, c=16, kp=8), source[:0], target[:0])


def test_attention_reads_only_what_is_selected() -> None:
    """Poison everywhere else: unselected slots, other pages, the slots of padded and empty rows."""
    cache, sel = pages(BATCH, c=16, kp=8), selection(BATCH, 40)
    sel.arrays["length"][:] = sel.arrays["length"] // 3  # not even position 0 is always among the selected
    sel.arrays["indices"][np.arange(40) >= sel.arrays["length"][:, None]] = -1
    used = np.zeros(cache.spec.slots, bool)
    for t in range(BATCH.T):
        used[BATCH.slots_of(BATCH.row_request[t])[sel.arrays["indices"][t, : sel.arrays["length"][t]]]] = True
    for field in cache.arrays.values():
        field[~used] = np.nan
    assert 0 < used.sum() < len(used) and (sel.arrays["length"] == 0).any()
    agree("sparse_mla", normal(1, BATCH.T, 3, 16), normal(2, BATCH.T, 3, 8), cache, sel, BATCH, scale=0.3)


def test_selected_and_taken_rows_move() -> None:
    nan = np.full((2, 3), np.nan, np.float32)
    agree("take_rows", nan, np.array([-1, 1], np.int32))
    agree("select_rows", selection(BATCH, 40), np.array([3, 1, 1], np.int32))


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_strided_arrays_are_as_good_as_contiguous_ones() -> None:
    def strided(*shape: int) -> torch.Tensor:
        """A slice of a transposed array."""
        wide = torch.from_numpy(normal(len(shape), shape[-1] + 3, *shape[:-1]))
        return wide.permute(*range(1, len(shape)), 0)[..., 2:-1]

    T, batch = BATCH.T, B.plan(BATCH)
    w = {n: on(B, weight(*n.split("."), *s)) for n, s in {
        "linear.w": (5, 16), "head_linear.w": (3, 5, 16), "embedding.table": (4, 6),
        "moe_experts.w13": (6, 12, 16), "moe_experts.w2": (6, 16, 6), "grouped_gemm.w": (2, 5, 16),
    }.items()}  # fmt: skip
    ids, keys = torch.from_numpy(expert_ids(T)), on(B, pages(BATCH, k=16))
    kv, sel = on(B, pages(BATCH, c=16, kp=8)), on(B, selection(BATCH, 40))
    counts = torch.tensor([4, 3], dtype=torch.int32)
    turn = {"theta": 1e4, "layout": "half", "start": 2, "width": 8}
    calls = {
        "linear": lambda f: B.linear(f(T, 16), w["linear.w"]),
        "head_linear": lambda f: B.head_linear(f(T, 3, 16), w["head_linear.w"]),
        "grouped_gemm": lambda f: B.grouped_gemm(f(7, 16), w["grouped_gemm.w"], counts),
        "moe_experts": lambda f: B.moe_experts(f(T, 16), w["moe_experts.w13"], w["moe_experts.w2"], ids, f(T, 3)),
        "rms_norm": lambda f: B.rms_norm(f(T, 16), f(16)),
        "layer_norm": lambda f: B.layer_norm(f(T, 16), f(16), f(16)),
        "rope": lambda f: B.rope(f(T, 3, 16), batch, **turn),
        "silu_mul": lambda f: B.silu_mul(f(T, 16)),
        "concat": lambda f: B.concat(f(T, 16), f(T, 3)),
        "kv_write": lambda f: B.kv_write(on(B, pages(BATCH, k=16)), batch, f(T, 16))["k"],
        "indexer_scores": lambda f: B.indexer_scores(f(T, 3, 16), f(T, 3), keys, batch, scale=0.5),
        "topk": lambda f: B.topk(f(T, 130), batch, k=9).native.indices,
        "sparse_mla": lambda f: B.sparse_mla(f(T, 3, 16), f(T, 3, 8), kv, sel, batch, scale=0.5),
        "argmax": lambda f: B.argmax(f(T, 16)),
    }
    for name, call in calls.items():
        got, plain = call(strided), call(lambda *shape: strided(*shape).contiguous())
        torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_fields_may_be_views_of_one_joint_row() -> None:
    made = pages(BATCH, c=16, kp=8)
    apart = on(B, made)
    row = torch.cat([*apart.native.values(), torch.full((made.spec.slots, 1), 7.0)], dim=1)
    joint = Pages(made.spec, {"c": row[:, :16], "kp": row[:, 16:24]})
    batch, sel = B.plan(BATCH), on(B, selection(BATCH, 40))
    rows = on(B, normal(1, BATCH.T, 16)), on(B, normal(2, BATCH.T, 8))
    q = on(B, normal(3, BATCH.T, 3, 16)), on(B, normal(4, BATCH.T, 3, 8))
    pair = torch.tensor([0], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    seen = []
    for cache in (apart, joint):
        cache = B.page_copy(B.kv_write(cache, batch, *rows), *pair)
        seen.append([*cache.leaves(), B.sparse_mla(*q, cache, sel, batch, scale=0.3)])
    for one, other in zip(*seen):
        assert torch.equal(one, other)
    assert (row[:, 24] == 7.0).all()


# -- composites ------------------------------------------------------------------------------------------------------


def test_what_is_own_and_what_is_composed() -> None:
    status = {op: choice.status for op, choice in B.choices.items()}
    assert {op for op, s in status.items() if s == "composed"} == COMPOSITES
    assert {s for op, s in status.items() if op not in COMPOSITES} == {"own"}


# -- gradients -------------------------------------------------------------------------------------------------------


def slope(op: str, operands: list[Any], at: int, direction: np.ndarray, out: np.ndarray, **attrs: Any) -> float:
    """d/dh of sum(out * reference(..., x + h * direction, ...)) by central differences in float64."""
    reference = contracts()[op].reference

    def value(h: float) -> float:
        moved = []
        for i, v in enumerate(operands):
            if isinstance(v, Made):
                logical = {name: widen(a) for name, a in v.arrays.items()}
                if i == at:
                    logical[next(iter(logical))] += h * direction
                if isinstance(v.spec, WeightSpec):
                    moved.append(logical["w"])
                elif isinstance(v.spec, PagesSpec):
                    moved.append(Pages(v.spec, logical))
                else:
                    moved.append(Selection(v.spec, tuple(logical.values())))
            else:
                moved.append(widen(v) + h * direction if i == at else widen(v) if isinstance(v, np.ndarray) else v)
        y = reference(*moved, **attrs)
        y = y[0] if op == "add_rms_norm" else y[1] if op == "moe_route" else y
        return float((np.where(np.isfinite(y), y, 0) * out).sum())

    h = 1e-5
    return (value(h) - value(-h)) / (2 * h)


T = BATCH.T
DIFFERENTIABLE: dict[str, tuple[list[Any], tuple[int, ...], dict[str, Any]]] = {
    "linear": ([normal(1, T, 7), weight("linear", "w", 5, 7)], (0, 1), {}),
    "head_linear": ([normal(1, T, 3, 7), weight("head_linear", "w", 3, 5, 7)], (0, 1), {}),
    "rms_norm": ([normal(1, T, 7), normal(2, 7)], (0, 1), {"eps": 1e-5}),
    "add_rms_norm": ([normal(1, T, 7), normal(3, T, 7), normal(2, 7)], (0, 1, 2), {"eps": 1e-5}),
    "layer_norm": ([normal(1, T, 7), normal(2, 7), normal(3, 7)], (0, 1, 2), {"eps": 1e-5}),
    "rope": ([normal(1, T, 3, 12), BATCH], (0,), {"theta": 1e4, "layout": "interleaved", "start": 4, "width": 8}),
    "silu_mul": ([normal(1, T, 8)], (0,), {}),
    "embedding": ([np.array([0, 2, 2], np.int32), weight("embedding", "table", 4, 5)], (1,), {}),
    "log_softmax": ([normal(1, T, 8)], (0,), {}),
    "gather_logprob": ([normal(1, T, 8), np.arange(T, dtype=np.int32) % 8], (0,), {}),
    "moe_route": ([normal(1, T, 8), normal(2, 8)], (0,), {"k": 3, "scale": 2.5}),
    "moe_experts": (
        [
            normal(1, T, 8),
            weight("moe_experts", "w13", 6, 12, 8),
            weight("moe_experts", "w2", 6, 8, 6),
            expert_ids(T),
            normal(2, T, 3),
        ],
        (0, 1, 2, 4),
        {},
    ),
    "indexer_scores": ([normal(1, T, 3, 8), normal(2, T, 3), pages(BATCH, k=8), BATCH], (0, 1, 2), {"scale": 0.3}),
    "sparse_mla": (
        [normal(1, T, 3, 16), normal(2, T, 3, 8), pages(BATCH, c=16, kp=8), selection(BATCH, 20), BATCH],
        (0, 1, 2),
        {"scale": 0.3},
    ),
}


@pytest.mark.parametrize("op, at", [(op, at) for op, (_, places, _) in DIFFERENTIABLE.items() for at in places])
def test_gradients_are_the_references_slopes(op: str, at: int) -> None:
    operands, _, attrs = DIFFERENTIABLE[op]
    native = [on(B, v) for v in operands]
    leaf = native[at].leaves()[0] if isinstance(native[at], (Weight, Pages)) else native[at]
    leaf.requires_grad_()
    y = getattr(B, op)(*native, **attrs)
    y = y[0] if op == "add_rms_norm" else y[1] if op == "moe_route" else y
    out = normal(9, *y.shape)
    torch.where(torch.isfinite(y), y, 0.0).mul(torch.from_numpy(out)).sum().backward()
    direction = widen(normal(8, *leaf.shape))
    expected = slope(op, operands, at, direction, out, **attrs)
    assert torch.isfinite(leaf.grad).all()
    assert float((widen(leaf.grad.numpy()) * direction).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_gradients_flow_through_the_cache() -> None:
    """A written row is attended to: its gradient is that of attention over the row itself."""
    batch = B.plan(Batch.build([5], [5], [[0]], 64))
    first, second = (on(B, normal(s, 5, n)).requires_grad_() for s, n in ((1, 16), (2, 8)))
    q = on(B, normal(3, 5, 2, 16)), on(B, normal(4, 5, 2, 8))
    cache = B.kv_write(B.alloc_pages(PagesSpec((("c", 16), ("kp", 8)), "float32", 1, 64)), batch, first, second)
    sel = B.topk(torch.zeros(5, 5), batch, k=8)
    weigh = on(B, normal(5, 5, 2, 16))
    got = torch.autograd.grad((B.sparse_mla(*q, cache, sel, batch, scale=0.3) * weigh).sum(), (first, second))
    logits = 0.3 * (torch.einsum("tnc,sc->tns", q[0], first) + torch.einsum("tnr,sr->tns", q[1], second))
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)[:, None]
    dense = torch.softmax(logits.masked_fill(later, -torch.inf), -1) @ first
    for one, other in zip(got, torch.autograd.grad((dense * weigh).sum(), (first, second))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# -- services --------------------------------------------------------------------------------------------------------


def test_a_plan_is_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = porthal.bind("torch").backend
    sent = []
    monkeypatch.setattr(backend, "from_numpy", lambda x: sent.append(x) or torch.from_numpy(x.copy()))
    for batch in (BATCH, EMPTY):
        sent.clear()
        plan = backend.plan(batch).native
        assert len(sent) == 1
        for name in ("cu_q", "kv_len", "positions", "visible", "row_request", "slots"):
            host, device = getattr(batch, name), getattr(plan, name)
            assert str(device.dtype) == f"torch.{host.dtype}"
            np.testing.assert_array_equal(device.numpy(), host)
        np.testing.assert_array_equal(plan.block_table[:, : batch.block_table.shape[1]].numpy(), batch.block_table)
        np.testing.assert_array_equal(plan.targets.numpy(), batch.slots[plan.written.numpy()])


def test_only_to_numpy_copies_to_the_host() -> None:
    before = B.backend.host_copies
    batch, cache, keys = B.plan(BATCH), on(B, pages(BATCH, c=16, kp=8)), on(B, pages(BATCH, k=8))
    sel = B.indexer_topk(on(B, normal(1, T, 2, 8)), on(B, normal(2, T, 2)), keys, batch, k=20, scale=0.3)
    o = B.sparse_mla(on(B, normal(1, T, 3, 16)), on(B, normal(2, T, 3, 8)), cache, sel, batch, scale=0.3)
    B.moe_experts(o[:, 0, :8], *(on(B, m) for m in DIFFERENTIABLE["moe_experts"][0][1:]))
    assert B.backend.host_copies == before
    B.to_numpy(o)
    assert B.backend.host_copies == before + 1


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "int64", "bool"])
def test_arrays_cross_over_bit_for_bit_and_share_nothing(dtype: str) -> None:
    x = np.arange(-6, 6).reshape(3, 4).astype(np.float64)
    x = narrow(x / 3, dtype) if dtype in FLOATS else x.astype(dtype)
    x.setflags(write=False)
    there = B.from_numpy(x.T)
    back = B.to_numpy(there)
    assert str(there.dtype) == f"torch.{dtype}" and back.dtype == x.dtype
    assert np.array_equal(back, x.T)
    there.zero_()
    assert back.any() and x.any()
    scalar = B.from_numpy(x[2, 3])
    assert scalar.shape == () and B.to_numpy(scalar) == x[2, 3]


def test_operands_are_updated_in_place() -> None:
    spec = WeightSpec("linear", "w", (3, 4), "bfloat16")
    old, new = normal(1, 3, 4, dtype="bfloat16"), normal(2, 3, 4, dtype="bfloat16")
    held = B.prepare(spec, lambda index: old[index])
    held.native.requires_grad_()
    address = held.native.data_ptr()
    assert B.prepare(spec, lambda index: new[index], into=held) is held and held.native.data_ptr() == address
    np.testing.assert_array_equal(B.to_logical(held)["w"], new)

    for made in (pages(BATCH, "bfloat16", c=16, kp=8), selection(BATCH, 40)):
        other = {name: np.flip(value, 0).copy() for name, value in made.arrays.items()}
        held = on(B, made)
        leaves = held.leaves()
        assert B.from_logical(made.spec, other, held) is held
        assert all(a is b for a, b in zip(held.leaves(), leaves))
        for name, value in B.to_logical(held).items():
            np.testing.assert_array_equal(value, other[name])


def test_a_tensor_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = B.backend
    assert backend.refuses_array(torch.zeros(1)) is None
    assert backend.refuses_array(np.zeros(1)) == "ndarray, expected a torch tensor"
    meta = torch.zeros(1, device="meta")
    assert backend.refuses_array(meta) == "on meta, expected a tensor on cpu"
    monkeypatch.setattr(backend, "device", "meta")
    assert backend.refuses_array(meta) is None


def test_a_device_that_torch_lacks_is_unavailable() -> None:
    for device in ("cpu:7", "cpu:0", "privateuseone", "cuda:x", "mkldnn"):
        with pytest.raises(Unavailable, match=f"^torch has no device '{device}' here: ") as refused, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, of its older names
            create(f"torch:{device}")
        assert "\n" not in str(refused.value)
    with pytest.raises(Unavailable, match="torch has no device 'meta' here"):
        create("torch:meta")


def test_a_quantised_table_is_not_claimed() -> None:
    spec = CallSpec({"T": 1, "V": 8, "H": 8}, {"ids": "int32", "table": "float32"}, {}, {"table": "fp8_block"})
    with pytest.raises(NotClaimed, match=r"embedding .*quantisation scheme of table is .fp8_block."):
        porthal.bind("torch", profile={"embedding": [spec]}, fallback="error")
    porthal.bind("torch", profile={"embedding": [replace(spec, schemes={"table": "none"})]}, fallback="error")


@pytest.mark.parametrize("name", WEIGHTS)
def test_experts_under_a_scheme_are_composed_of_products_that_take_it(name: str) -> None:
    dims = {"T": 1, "H": 8, "I": 8, "E": 2, "k": 1}
    dtypes = {"x": "float32", "w13": "float32", "w2": "float32", "ids": "int32", "weights": "float32"}
    spec = CallSpec(dims, dtypes, {"first_expert": 0}, {"w13": name, "w2": name})
    assert porthal.bind("torch", profile={"moe_experts": [spec]}).choices["moe_experts"].status == "composed"


def test_the_same_bits_every_time() -> None:
    for op in ("moe_experts", "sparse_mla", "indexer_scores", "layer_norm"):
        operands, _, attrs = DIFFERENTIABLE[op]
        one, other = (getattr(B, op)(*(on(B, v) for v in operands), **attrs) for _ in range(2))
        assert torch.equal(one, other)


# -- memory and time at GLM-5's size ---------------------------------------------------------------------------------


def test_attention_at_full_size_stays_within_the_stated_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """At a context of 4096 tokens; tests/proof has four times as many."""
    for found in attention_over(4096):
        with capsys.disabled():
            print(f"\n{found}")
        assert found.within
