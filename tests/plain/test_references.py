"""Every reference against something that is not it: a loop, another form of the formula, an invariance, a known value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from porthal.hal import Batch, Pages, PagesSpec, Rows, Selection, SelectionSpec, bind, contracts, numpy_dtype
from porthal.hal.operands import WeightSpec
from tests.oracles.draws import settings, share_of_each, threshold

CHECKS: dict[str, list[Callable[..., None]]] = {}
ops = {name: contract.reference for name, contract in contracts().items()}


def checks(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter a test as the second opinion on these contracts."""

    def enter(test: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            CHECKS.setdefault(name, []).append(test)
        return test

    return enter


def test_every_contract_has_a_second_opinion() -> None:
    assert set(CHECKS) == set(contracts())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def batch_of(*requests: tuple[int, int], size: int = 4) -> Batch:
    """Requests (query rows, keys), on shuffled pages."""
    need = [-(-kv // size) for _, kv in requests]
    pages = iter(np.random.default_rng(3).permutation(sum(need) + 2).tolist())
    tables = [[next(pages) for _ in range(n)] for n in need]
    return Batch.build([q for q, _ in requests], [kv for _, kv in requests], tables, size)


def pages_of(batch: Batch, rng: np.random.Generator, **widths: int) -> Pages:
    blocks = int(batch.block_table.max(initial=0)) + 3
    spec = PagesSpec(tuple(widths.items()), "float32", blocks, batch.block_size)
    return Pages(spec, {name: rng.standard_normal((spec.slots, width)) for name, width in widths.items()})


def key_of(batch: Batch, pages: Pages, field: str, request: int, position: int) -> Any:
    page = batch.block_table[request, position // batch.block_size]
    return pages[field][page * batch.block_size + position % batch.block_size]


MIXED = batch_of((1, 9), (3, 3), (2, 11), (2, 0))


# -- row by row ----------------------------------------------------------------------------------------------------------


@checks("rms_norm", "add_rms_norm")
def test_rms_norm_by_loops_and_by_its_invariance(rng: np.random.Generator) -> None:
    x, r, w = rng.standard_normal((3, 7)), rng.standard_normal((3, 7)), rng.standard_normal(7)
    for row, got in zip(x, ops["rms_norm"](x, w, eps=0.25)):
        norm = math.sqrt(sum(v * v for v in row) / 7 + 0.25)
        assert got == pytest.approx([v / norm * g for v, g in zip(row, w)], rel=1e-14)
    assert ops["rms_norm"](3 * x, w, eps=9e-5) == pytest.approx(ops["rms_norm"](x, w, eps=1e-5), rel=1e-13)
    assert ops["rms_norm"](np.array([[3.0, 4.0]]), np.ones(2), eps=0.0) == pytest.approx(np.array([[3, 4]]) / math.sqrt(12.5))
    y, total = ops["add_rms_norm"](x, r, w, eps=0.25)
    assert (total == x + r).all()
    assert y == pytest.approx(ops["rms_norm"](x + r, w, eps=0.25))


@checks("layer_norm")
def test_layer_norm_by_loops_and_its_invariances(rng: np.random.Generator) -> None:
    x, w, b = rng.standard_normal((3, 5)), rng.standard_normal(5), rng.standard_normal(5)
    for row, got in zip(x, ops["layer_norm"](x, w, b, eps=0.5)):
        mean = sum(row) / 5
        deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / 5 + 0.5)
        assert got == pytest.approx([(v - mean) / deviation * g + o for v, g, o in zip(row, w, b)], rel=1e-12)
    assert ops["layer_norm"](x + 64, w, b, eps=0.5) == pytest.approx(ops["layer_norm"](x, w, b, eps=0.5), rel=1e-9)


@checks("rope")
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rope_turns_complex_numbers_and_scores_depend_on_distance(layout: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((8, 2, 10))
    turn = {"theta": 100.0, "layout": layout, "start": 3, "width": 6}
    y = ops["rope"](x, MIXED, **turn)
    assert (y[..., :3] == x[..., :3]).all()
    assert (y[..., 9:] == x[..., 9:]).all()
    pairs = [(3, 4), (5, 6), (7, 8)] if layout == "interleaved" else [(3, 6), (4, 7), (5, 8)]
    for t, p in enumerate([8, 0, 1, 2, 9, 10, 0, 0]):
        for i, (a, b) in enumerate(pairs):
            z = (x[t, :, a] + 1j * x[t, :, b]) * np.exp(1j * p * 100.0 ** (-i / 3))
            assert y[t, :, a] == pytest.approx(z.real, abs=1e-12)
            assert y[t, :, b] == pytest.approx(z.imag, abs=1e-12)

    def score(p: int, s: int) -> float:
        rows = Batch.build([1, 1], [p + 1, s + 1], [range(9), range(9)], 4)
        q, k = ops["rope"](np.stack([x[0], x[1]]), rows, **turn)
        return float((q * k).sum())

    assert score(20, 13) == pytest.approx(score(9, 2), abs=1e-12)
    assert abs(score(20, 13) - score(20, 12)) > 1e-3


def test_rope_at_position_one_is_a_known_rotation() -> None:
    rows = Batch.build([1], [2], [[0]], 4)
    y = ops["rope"](np.array([[[1.0, 0.0]]]), rows, theta=10000.0, layout="interleaved", start=0, width=2)
    assert y.ravel() == pytest.approx([0.5403023058681398, 0.8414709848078965])


@checks("silu_mul")
def test_silu_mul_by_definition(rng: np.random.Generator) -> None:
    x = np.concatenate([rng.standard_normal((2, 6)), np.array([[-800.0, 800, 0, 1, 1, 2]])])
    got = ops["silu_mul"](x)
    for row, y in zip(x, got):
        for i in range(3):
            gate = row[i] / (1 + math.exp(-row[i])) if row[i] > -700 else 0.0
            assert y[i] == pytest.approx(gate * row[i + 3], rel=1e-14, abs=1e-300)


@checks("add", "cast", "concat", "take_rows", "embedding", "quantize", "dequantize")
def test_moves_and_sums_by_index(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((3, 2)), rng.standard_normal((3, 2))
    joined = ops["concat"](a, b)
    rows = ops["take_rows"](a, np.array([2, -1, 0], np.int32))
    table = ops["embedding"](np.array([1, 1, 0], np.int32), a)
    for t in range(3):
        for j in range(2):
            assert ops["add"](a, b)[t, j] == a[t, j] + b[t, j]
            assert (joined[t, j], joined[t, 2 + j]) == (a[t, j], b[t, j])
            assert rows[t, j] == [a[2, j], 0.0, a[0, j]][t]
            assert table[t, j] == a[[1, 1, 0][t], j]
    assert ops["cast"](a, to="bfloat16") is a  # the rounding itself is tested with the dtypes
    scale = np.float32(np.abs(x := rng.normal(size=(3, 96))).max(1, keepdims=True) / 127).astype(float)
    q, codes = contracts()["quantize"].reference(x, scheme="int8_token"), np.array([[round(v) for v in r] for r in x / scale])
    assert np.array_equal(q.native.parts["codes"], codes)
    assert np.array_equal(contracts()["dequantize"].reference(q, out="float32"), codes * scale)


# -- matrix products -----------------------------------------------------------------------------------------------------


@checks("linear", "head_linear", "grouped_gemm")
def test_products_by_loops(rng: np.random.Generator) -> None:
    x, w = rng.standard_normal((5, 3)), rng.standard_normal((4, 3))
    assert ops["linear"](x, w) == pytest.approx(np.array([[sum(a * b for a, b in zip(r, o)) for o in w] for r in x]))
    heads, wh = rng.standard_normal((2, 3, 4)), rng.standard_normal((3, 5, 4))
    got = ops["head_linear"](heads, wh)
    for t in range(2):
        for n in range(3):
            assert got[t, n] == pytest.approx([sum(wh[n, m] * heads[t, n]) for m in range(5)])
    we, counts = rng.standard_normal((4, 2, 3)), np.array([0, 2, 0, 1], np.int32)
    grouped = ops["grouped_gemm"](x, we, counts)
    for m, e in enumerate([1, 1, 3]):
        assert grouped[m] == pytest.approx([sum(x[m] * we[e, n]) for n in range(2)])


# -- experts -------------------------------------------------------------------------------------------------------------


def routed(
    logits: list[float], bias: list[float], k: int, scale: float, groups: int, kept: int
) -> tuple[list[int], list[float]]:
    """The router in plain Python."""
    gate = [float("nan") if math.isnan(v) else 1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in logits]
    biased = [-math.inf if math.isnan(g + b) else g + b for g, b in zip(gate, bias)]
    size = len(biased) // groups
    strength = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    open_groups = sorted(range(groups), key=lambda g: (-strength[g], g))[:kept]
    allowed = [e for e in range(len(biased)) if groups == 1 or e // size in open_groups]
    ids = sorted(allowed, key=lambda e: (-biased[e], e))[:k]
    return ids, [scale * gate[e] / (sum(gate[i] for i in ids) + 1e-20) for e in ids]


@checks("moe_route")
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2)])
def test_moe_route_by_sorting(groups: int, kept: int, rng: np.random.Generator) -> None:
    logits, bias = rng.standard_normal((20, 12)), rng.standard_normal(12)
    logits[3] = 0.0  # ties
    logits[4, 5] = np.nan
    bias[:2] = -5.0  # negative choice scores
    ids, weights = ops["moe_route"](logits, bias, k=3, scale=2.5, n_group=groups, topk_group=kept)
    for t in range(20):
        if groups > 1 and t == 4:
            continue  # which groups a NaN leaves open is covered by ids in range and distinct
        expected = routed(list(logits[t]), list(bias), 3, 2.5, groups, kept)
        assert list(ids[t]) == expected[0]
        assert weights[t] == pytest.approx(expected[1], nan_ok=True)
    good = ~np.isnan(weights).any(1)
    assert weights[good].sum(1) == pytest.approx(2.5)
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 12 for row in ids.tolist())


def one_expert(x: Any, w13: Any, w2: Any) -> Any:
    width = len(w13) // 2
    gate, up = w13[:width] @ x, w13[width:] @ x
    return w2 @ (gate / (1 + np.exp(-gate)) * up)


@checks("moe_experts", "moe_layer", "moe_permute", "moe_unpermute")
def test_experts_token_by_token_and_by_permutation(rng: np.random.Generator) -> None:
    x, w13, w2 = rng.standard_normal((6, 4)), rng.standard_normal((3, 10, 4)), rng.standard_normal((3, 4, 5))
    ids = np.array([[2, 4], [3, 2], [-1, 4], [4, 9], [0, 1], [2, 3]], np.int32)  # local experts are 2, 3, 4
    weights = rng.random((6, 2))
    expected = np.zeros((6, 4))
    for t in range(6):
        for j in range(2):
            if 2 <= ids[t, j] <= 4:
                expected[t] += weights[t, j] * one_expert(x[t], w13[ids[t, j] - 2], w2[ids[t, j] - 2])
    assert ops["moe_experts"](x, w13, w2, ids, weights, first_expert=2) == pytest.approx(expected)

    rows, counts, source = ops["moe_permute"](x, ids, E=3, first_expert=2)
    order = sorted((int(ids[t, j]), t * 2 + j) for t in range(6) for j in range(2) if 2 <= ids[t, j] <= 4)
    assert counts.tolist() == [3, 2, 3]
    assert source.tolist() == [m for _, m in order] + [-1] * 4
    assert (rows[:8] == x[source[:8] // 2]).all() and not rows[8:].any()
    h = ops["grouped_gemm"](ops["silu_mul"](ops["grouped_gemm"](rows, w13, counts)), w2, counts)
    h[8:] = np.nan  # padding is never read
    assert ops["moe_unpermute"](h, source, weights) == pytest.approx(expected)

    s13, s2 = rng.standard_normal((6, 4)), rng.standard_normal((4, 3))
    local = np.where((ids >= 2) & (ids <= 4), ids - 2, -1).astype(np.int32)
    shared = np.stack([one_expert(row, s13, s2) for row in x])
    assert ops["moe_layer"](x, w13, w2, local, weights, s13, s2) == pytest.approx(expected + shared)


# -- caches, selection, attention ----------------------------------------------------------------------------------------


@checks("kv_write", "page_copy")
def test_pages_by_a_dictionary_of_slots(rng: np.random.Generator) -> None:
    pages = pages_of(MIXED, rng, c=3, kp=2)
    first, second = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    slots = {s: list(v) for s, v in enumerate(pages["c"])}
    rows = iter(range(8))
    for r, (q, kv) in enumerate(((1, 9), (3, 3), (2, 11), (2, 0))):
        for position in range(max(kv - q, 0), kv):
            page = int(MIXED.block_table[r, position // 4])
            slots[page * 4 + position % 4] = list(first[next(rows)])
    before = pages["c"].copy()
    written = ops["kv_write"](pages, MIXED, first, second)
    assert (written["c"] == np.array([slots[s] for s in range(len(before))])).all()
    assert (pages["c"] == before).all()
    assert (written["kp"][MIXED.slots[:6]] == second[:6]).all()

    copied = ops["page_copy"](pages, np.array([0, 1], np.int32), np.array([1, 2], np.int32))
    assert (copied["c"][4:8] == before[0:4]).all()
    assert (copied["c"][8:12] == before[4:8]).all()  # what page 1 was before the call
    assert (copied["c"][12:] == before[12:]).all()


def index_score(iq: Any, w: Any, key: Any, scale: float) -> float:
    return scale * sum(float(a) * max(0.0, float(q @ key)) for a, q in zip(w, iq))


@checks("indexer_scores", "indexer_topk", "topk", "select_rows")
def test_selection_by_sorting(rng: np.random.Generator) -> None:
    iq, w = rng.standard_normal((8, 2, 3)), rng.standard_normal((8, 2))
    keys = pages_of(MIXED, rng, k=3)
    scores = ops["indexer_scores"](iq, w, keys, MIXED, scale=0.5)
    selected = ops["indexer_topk"](iq, w, keys, MIXED, k=4, scale=0.5)
    assert scores.shape == (8, 11)
    for t, (r, visible) in enumerate([(0, 9), (1, 1), (1, 2), (1, 3), (2, 10), (2, 11), (3, 0), (3, 0)]):
        expected = [index_score(iq[t], w[t], key_of(MIXED, keys, "k", r, s), 0.5) for s in range(visible)]
        assert scores[t, :visible] == pytest.approx(expected)
        assert np.isneginf(scores[t, visible:]).all()
        best = sorted(range(visible), key=lambda s: (-expected[s], s))[:4]
        indices, length = (part[t] for part in selected.native)
        assert sorted(indices[:length].tolist()) == sorted(best)
        assert (indices[length:] == -1).all()

    ties = np.array([[1.0, np.nan, 1.0, 0.0, -0.0, 1.0, -np.inf, 5, 5, 5, 5]] * 8)
    chosen = ops["topk"](ties, MIXED, k=4).native
    assert sorted(chosen.indices[0, :4].tolist()) == [0, 2, 7, 8]
    assert sorted(chosen.indices[3, :3].tolist()) == [0, 1, 2]  # NaN is last, but there are only three
    assert chosen.length.tolist() == [4, 1, 2, 3, 4, 4, 0, 0]
    again = ops["select_rows"](ops["topk"](ties, MIXED, k=4), np.array([3, 0], np.int32)).native
    assert (again.indices == chosen.indices[[3, 0]]).all() and again.length.tolist() == [3, 4]


@checks("sparse_mla")
def test_absorbed_attention_equals_naive_attention(rng: np.random.Generator) -> None:
    """W_UK and W_UV applied to keys and values of every position, as the layer was trained, then restricted."""
    heads, latent, rope, nope, wide = 2, 6, 4, 3, 5
    w_uk, w_uv = rng.standard_normal((heads, nope, latent)), rng.standard_normal((heads, wide, latent))
    qn, qp = rng.standard_normal((8, heads, nope)), rng.standard_normal((8, heads, rope))
    kv = pages_of(MIXED, rng, c=latent, kp=rope)
    indices = np.full((8, 5), -1, np.int32)
    length = np.array([5, 1, 2, 2, 3, 5, 0, 0], np.int32)
    for t, (n, seen) in enumerate(zip(length, MIXED.visible)):
        indices[t, :n] = rng.permutation(int(seen))[:n]
    selected = Selection(SelectionSpec(8, 5), Rows(indices, length))
    q_latent = np.einsum("tnd,ndc->tnc", qn, w_uk)
    o = ops["sparse_mla"](q_latent, qp, kv, selected, MIXED, scale=0.3)
    values = np.einsum("tnc,nvc->tnv", o, w_uv)
    for t in range(8):
        r = int(MIXED.row_request[t])
        positions = indices[t, : length[t]].tolist()
        for n in range(heads):
            logits, v = [], []
            for s in positions:
                c, kp = key_of(MIXED, kv, "c", r, s), key_of(MIXED, kv, "kp", r, s)
                logits.append(0.3 * float(np.concatenate([qn[t, n], qp[t, n]]) @ np.concatenate([w_uk[n] @ c, kp])))
                v.append(w_uv[n] @ c)
            weights = [math.exp(x) for x in logits]
            expected = sum((a / sum(weights) * b for a, b in zip(weights, v)), np.zeros(wide))
            assert values[t, n] == pytest.approx(expected, abs=1e-12)
    reversed_first = Selection(SelectionSpec(1, 5), Rows(indices[:1, ::-1].copy(), length[:1]))
    alone = ops["sparse_mla"](q_latent[:1], qp[:1], kv, reversed_first, batch_of((1, 9), (3, 3), (2, 11)), scale=0.3)
    assert alone == pytest.approx(o[:1], abs=1e-12)  # the order of a selection is free


# -- composites ----------------------------------------------------------------------------------------------------------


def composed_agrees(op: str, operands: dict[str, Any], weights: tuple[str, ...], **attrs: Any) -> list[Any]:
    """The decomposition's results in float32 on the reference backend, compared with the formula's; the formula's."""
    inner = bind("reference", overrides={op: "composed"})
    contract = contracts()[op]
    expected = contract.reference(*operands.values(), **attrs)
    given = {}
    for name, value in operands.items():
        if name in weights:
            array = value.astype(np.float32)
            given[name] = inner.prepare(WeightSpec(op, name, array.shape, "float32"), array.__getitem__)
        else:
            given[name] = value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == float else value
    got = getattr(inner, op)(*given.values(), **attrs)
    results = (got, expected) if isinstance(expected, tuple) else ((got,), (expected,))
    for g, e in zip(*results):
        pairs = [(g[f], e[f]) for f, _ in e.spec.fields] if isinstance(e, Pages) else [(g, e)]
        for a, b in pairs:
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    return list(results[1])


def turned(row: Any, position: int, theta: float) -> Any:
    out = row.copy()
    for i in range(len(row) // 2):
        z = (row[2 * i] + 1j * row[2 * i + 1]) * np.exp(1j * position * theta ** (-2 * i / len(row)))
        out[2 * i], out[2 * i + 1] = z.real, z.imag
    return out


def normed(row: Any, w: Any, eps: float) -> Any:
    return row / math.sqrt(float(row @ row) / len(row) + eps) * w


@checks("mla_prolog")
def test_mla_prolog_token_by_token(rng: np.random.Generator) -> None:
    heads, nope, rope, latent, q_rank, hidden = 2, 3, 4, 6, 5, 8
    n = rng.standard_normal
    kv = pages_of(MIXED, rng, c=latent, kp=rope)
    given = {
        "h": n((8, hidden)),
        "q_a": n((q_rank, hidden)),
        "q_norm": n(q_rank),
        "q_b": n((heads * (nope + rope), q_rank)),
        "kv_a": n((latent + rope, hidden)),
        "kv_norm": n(latent),
        "w_uk": n((heads, latent, nope)),
        "kv": kv,
        "batch": MIXED,
    }
    weights = ("q_a", "q_b", "kv_a", "w_uk")
    q_latent, q_rope, qr, written = composed_agrees("mla_prolog", given, weights, theta=100.0, eps=0.1)
    for t in range(8):
        h, p = given["h"][t], int(MIXED.positions[t])
        row = normed(given["q_a"] @ h, given["q_norm"], 0.1)
        q = (given["q_b"] @ row).reshape(heads, nope + rope)
        a = given["kv_a"] @ h
        assert qr[t] == pytest.approx(row)
        for m in range(heads):  # rope is the LAST part of a head
            assert q_latent[t, m] == pytest.approx(given["w_uk"][m] @ q[m, :nope])
            assert q_rope[t, m] == pytest.approx(turned(q[m, nope:], p, 100.0))
        if MIXED.slots[t] >= 0:
            assert written["c"][MIXED.slots[t]] == pytest.approx(normed(a[:latent], given["kv_norm"], 0.1))
            assert written["kp"][MIXED.slots[t]] == pytest.approx(turned(a[latent:], p, 100.0))


@checks("index_prolog")
def test_index_prolog_token_by_token(rng: np.random.Generator) -> None:
    heads, size, width, q_rank, hidden = 2, 6, 4, 5, 8
    n = rng.standard_normal
    given = {
        "qr": n((8, q_rank)),
        "h": n((8, hidden)),
        "wq_b": n((heads * size, q_rank)),
        "wk": n((size, hidden)),
        "k_norm": n(size),
        "k_bias": n(size),
        "w_head": n((heads, hidden)),
        "keys": pages_of(MIXED, rng, k=size),
        "batch": MIXED,
    }
    iq, w, written = composed_agrees("index_prolog", given, ("wq_b", "wk", "w_head"), theta=100.0, width=width)
    for t in range(8):
        p = int(MIXED.positions[t])
        q = (given["wq_b"] @ given["qr"][t]).reshape(heads, size)
        for m in range(heads):  # rope is the FIRST part of a head
            assert iq[t, m] == pytest.approx(np.concatenate([turned(q[m, :width], p, 100.0), q[m, width:]]))
        assert w[t] == pytest.approx(given["w_head"] @ given["h"][t])
        if MIXED.slots[t] >= 0:
            k = given["wk"] @ given["h"][t]
            k = (k - k.mean()) / math.sqrt(k.var() + 1e-6) * given["k_norm"] + given["k_bias"]
            assert written["k"][MIXED.slots[t]] == pytest.approx(np.concatenate([turned(k[:width], p, 100.0), k[width:]]))


@checks("mla_output", "mtp_input")
def test_output_and_mtp_input_token_by_token(rng: np.random.Generator) -> None:
    n = rng.standard_normal
    given = {"o": n((3, 2, 6)), "w_uv": n((2, 5, 6)), "w_o": n((4, 10))}
    (y,) = composed_agrees("mla_output", given, ("w_uv", "w_o"))
    for t in range(3):
        assert y[t] == pytest.approx(given["w_o"] @ np.concatenate([given["w_uv"][m] @ given["o"][t, m] for m in range(2)]))
    given = {"e": n((3, 4)), "g": n((3, 4)), "enorm": n(4), "hnorm": n(4), "eh_proj": n((4, 8))}
    (u,) = composed_agrees("mtp_input", given, ("eh_proj",), eps=0.1)
    for t in range(3):  # the embedding is the FIRST half
        halves = normed(given["e"][t], given["enorm"], 0.1), normed(given["g"][t], given["hnorm"], 0.1)
        assert u[t] == pytest.approx(given["eh_proj"] @ np.concatenate(halves))


# -- tokens --------------------------------------------------------------------------------------------------------------


@checks("argmax", "log_softmax", "gather_logprob")
def test_logits_by_loops(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((4, 9)) * 30
    logits[1, [2, 5]] = 200.0
    logits[2, 0] = np.nan
    best = [max(range(9), key=lambda v: (-math.inf if math.isnan(row[v]) else row[v], -v)) for row in logits]
    assert ops["argmax"](logits).tolist() == best
    clean = np.delete(logits, 2, axis=0)
    logp = ops["log_softmax"](clean)
    ids = np.array([3, 8, 0], np.int32)
    for t, row in enumerate(clean):
        norm = max(row) + math.log(math.fsum(math.exp(v - max(row)) for v in row))
        assert logp[t] == pytest.approx([v - norm for v in row], rel=1e-12)
        assert ops["gather_logprob"](clean, ids)[t] == logp[t, ids[t]]


@checks("check_finite")
def test_ids_are_kept_where_the_highest_logit_is_finite() -> None:
    nan, inf = math.nan, math.inf
    rows = [[1.0, -inf], [-inf, -inf], [nan, 2.0], [-inf, nan], [inf, 0.0], [-0.0, -1e38], [nan, nan]]
    for at in (0, 1):
        assert ops["check_finite"](np.array(rows), np.full(7, at)).tolist() == [at, -2, -2, -2, -2, at, -2]
    assert ops["check_finite"](np.array(rows), np.full(7, -1)).tolist() == [-1] * 7  # the tail behind a last token


@checks("sample")
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 3, 1.0), (2.0, 0, 0.7), (1.0, 4, 0.6)])
def test_sample_gives_each_id_its_share_of_u(temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> None:
    row = rng.standard_normal(6)
    grid = (np.arange(4000) + 0.5) / 4000
    ids = ops["sample"](np.tile(row, (4000, 1)), grid, *settings(4000, temperature, top_k, top_p))
    counted = np.bincount(ids, minlength=6) / 4000
    assert counted == pytest.approx(share_of_each(row, temperature, top_k, top_p), abs=1 / 2000)
    assert (ops["sample"](np.tile(row, (2, 1)), grid[:2], *settings(2, temperature=0)) == row.argmax()).all()


@checks("speculative_verify")
@pytest.mark.parametrize("with_probabilities", [False, True])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 0.95), (0.5, 3, 1), (2, 0, 0.7), (1, 4, 0.6), (1.5, 1, 1), (0.7, 0, 0.01)]
)
def test_drafts_leave_the_truncated_distribution_exactly_as_it_is(
    with_probabilities: bool, temperature: float, top_k: int, top_p: float, rng: np.random.Generator
) -> None:
    """The measure of all u that give a first token, over the drafts that are made, is that token's share."""
    V = 5
    row, q = rng.standard_normal(V), np.array([0.45, 0.1, 0.3, 0.1, 0.05])
    first = np.zeros(V)

    def tokens(d: int, accepting: np.ndarray, drawing: np.ndarray) -> np.ndarray:
        R = len(accepting)
        given = [np.tile(q, (R, 1, 1))] if with_probabilities else []
        u = np.stack([accepting, drawing], 1)
        given = [*settings(R, temperature, top_k, top_p), *given]
        return ops["speculative_verify"](np.tile(row, (R, 2, 1)), np.full((R, 1), d), u, *given)

    for d in range(V):
        accepted = threshold(lambda u, d=d: tokens(d, u, np.zeros(1))[:, 1] >= 0, 1)[0]
        drawn = np.zeros(V)
        if accepted < 1 - 1e-9:
            rejecting = np.full(V, (1 + accepted) / 2)
            drawn = np.diff(threshold(lambda u, d=d, r=rejecting: tokens(d, r, u)[:, 0] <= np.arange(V), V), prepend=0)
        first += q[d] * (accepted * np.eye(V)[d] + (1 - accepted) * drawn)
        if not with_probabilities:  # every draft alone gives it
            assert first / q[: d + 1].sum() == pytest.approx(share_of_each(row, temperature, top_k, top_p), abs=1e-9)
    assert first == pytest.approx(share_of_each(row, temperature, top_k, top_p), abs=1e-9)


@checks("quantize", "dequantize")
def test_codes_are_the_nearest_ones_and_stand_for_their_multiples(rng: np.random.Generator) -> None:
    """A scale for each row of int8, and one for each 128 columns of e4m3, of which the last block is short."""
    reference = bind("reference", check=False)
    x = rng.standard_normal((3, 130)).astype(np.float32)
    q = reference.quantize(x, scheme="int8_token")
    parts = reference.backend.to_logical(q)
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(parts["scale"], scale)
    np.testing.assert_array_equal(parts["codes"], np.rint(x / scale))
    np.testing.assert_array_equal(reference.dequantize(q, out="float32"), parts["codes"] * scale)

    groups = reference.backend.to_logical(reference.quantize(x, scheme="fp8_group"))
    scales = [np.abs(x[:, part]).max(1) / np.float32(448) for part in (slice(0, 128), slice(128, 130))]
    np.testing.assert_array_equal(groups["scale"], np.stack(scales, 1))
    codes = groups["codes"].view(np.uint8).view(numpy_dtype("float8_e4m3fn")).astype(np.float32)
    np.testing.assert_array_equal(codes[:, 128:], (x[:, 128:] / scales[1][:, None]).astype(numpy_dtype("float8_e4m3fn")))
