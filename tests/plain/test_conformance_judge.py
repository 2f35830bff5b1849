"""The judge accepts honest kernels at the strict level and rejects planted defects on the bring-up cases."""

import re
from dataclasses import replace

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.placing import MARGIN
from porthal.conformance.judgement.choices import judge_top
from porthal.conformance.judgement.golden import Golden, Spread
from porthal.conformance.judgement.judge import judge_floats
from porthal.conformance.level import LEVELS
from porthal.conformance.runner.check import check
from porthal.conformance.runner.runs import run
from porthal.conformance.verdicts import Failed
from porthal.hal import contracts, create, narrow, widen
from porthal.hal.numerics import single as held
from porthal.hal.numerics import total
from tests.honest import (
    HONEST,
    backend,
    f32,
    linear,
    moe_route,
    product,
    rms_norm,
    rope,
    rounded,
    silu_mul,
    single,
    strictly_judged,
)


@pytest.mark.parametrize("name", [name for name in HONEST if name != "sparse_mla"])  # which takes a minute, and is proved
def test_honest_kernels_pass_at_the_strict_level(name, monkeypatch):
    """Judged strictly and run twice; tests/proof runs them as often as the level says."""
    monkeypatch.setitem(LEVELS, "strict", replace(LEVELS["strict"], runs=2))
    results = strictly_judged(name)
    assert len(results) > 15
    assert [r.explain() for r in results if r.failed] == []
    assert all(r.own or r.status == "refusal" for r in results)


# -- planted defects -------------------------------------------------------------------------------------------------


def without_eps(self, x, weight, *, eps):
    return rms_norm(self, x, weight, eps=1e-30)


def unwritten_tail(self, x, weight, *, eps):
    out = self.empty(x.shape, str(x.dtype))
    out[..., :-1] = rms_norm(self, x, weight, eps=eps)[..., :-1]
    return out


def stale_rows(self, x, weight, *, eps):
    y = rms_norm(self, x, weight, eps=eps)
    y[16:] = 0  # a grid of sixteen rows
    return y


def beside_the_output(self, x, weight, *, eps):
    y = rms_norm(self, x, weight, eps=eps)
    y.base[MARGIN + y.size] = 0
    return y


def onto_the_input(self, x, weight, *, eps):
    y = rms_norm(self, x, weight, eps=eps)
    if x.flags.writeable:
        x[...] = y
    return y


def into_the_gaps_of_a_view(self, x, weight, *, eps):
    y = rms_norm(self, x, weight, eps=eps)
    if x.base is not None and x.base.shape[-1] > x.shape[-1]:
        x.base[..., 0] = 1
    return y


def as_if_contiguous(self, x, weight, *, eps):
    whole = x if x.base is None else x.base
    if not x.flags.c_contiguous and whole.size >= x.size:
        x = whole.reshape(-1)[: x.size].reshape(x.shape)
    return rms_norm(self, x, weight, eps=eps)


def without_last_column(self, x, w, *, out="x"):
    return rounded(self, *product(self, x, w, out, slice(None, -1)))


def swapped_rows(self, x, w, *, out="x"):
    y = linear(self, x, w, out=out)
    if len(y) > 1:
        y[[0, 1]] = y[[1, 0]]
    return y


def bfloat16_accumulator(self, x, w, *, out="x"):
    y, like = product(self, x, w, out, slice(0, 16))
    for k in range(16, x.shape[1], 16):
        y = widen(narrow((y + product(self, x, w, out, slice(k, k + 16))[0]).astype(np.float64), "bfloat16")).astype(f32)
    return rounded(self, y, like)


def truncating(self, x, w, *, out="x"):
    y, like = product(self, x, w, out)
    if str(like.dtype) != "bfloat16":
        return rounded(self, y, like)
    return (y.view(np.uint32) >> 16).astype(np.uint16).view(like.dtype)


def half_precision_inside(self, x, w, *, out="x"):
    y, like = product(self, x, w, out)
    with np.errstate(over="ignore"):
        return rounded(self, y.astype(np.float16).astype(f32), like)


def one_element_off(self, x, w, *, out="x"):
    y = linear(self, x, w, out=out)
    if y.size:
        y[-1, -1] *= 1.05
    return y


def all_float32(self, x, w, *, out="x"):
    return single(linear(self, x, w, out=out))


def transposed_result(self, x, w, *, out="x"):
    return linear(self, x, w, out=out).T


def raising(self, x, w, *, out="x"):
    raise RuntimeError("aicore exception 507015\nand a long trace")


class Drifting:
    calls = 0

    def linear(self, x, w, *, out="x"):
        Drifting.calls += 1
        return (single(linear(self, x, w, out=out)) * f32(1 + 2**-23 * (Drifting.calls % 2))).astype(
            str(x.dtype) if out == "x" else out
        )


def variance_by_difference(self, x, weight, bias, *, eps):
    wide = single(x)
    mean = wide.mean(-1, keepdims=True, dtype=f32)
    variance = np.maximum((wide * wide).mean(-1, keepdims=True, dtype=f32) - mean * mean, 0)
    return rounded(self, (wide - mean) / np.sqrt(variance + f32(eps)) * single(weight) + single(bias), x)


def halves_swapped(self, x):
    return silu_mul(self, np.concatenate(np.split(x, 2, axis=-1)[::-1], axis=-1))


def sigmoid_overflowing(self, x):
    gate, up = np.split(single(x), 2, axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.exp(gate)
        return rounded(self, gate * (e / (1 + e)) * up, x)


def weights_from_biased_scores(self, logits, bias, *, k, scale, n_group=1, topk_group=1):
    ids, _ = moe_route(self, logits, bias, k=k, scale=scale, n_group=n_group, topk_group=topk_group)
    s = np.take_along_axis(1 / (1 + np.exp(-logits)) + bias, ids, 1)
    return ids, (f32(scale) * s / (s.sum(-1, keepdims=True) + f32(1e-20))).astype(f32)


def same_expert_for_nan(self, logits, bias, *, k, scale, n_group=1, topk_group=1):
    ids, w = moe_route(self, logits, bias, k=k, scale=scale, n_group=n_group, topk_group=topk_group)
    ids[np.isnan(logits).all(-1)] = 0
    return ids, w


def one_group(self, logits, bias, *, k, scale, n_group=1, topk_group=1):
    return moe_route(self, logits, bias, k=k, scale=scale)


def ties_to_the_highest(self, scores, batch, *, k):
    sel = Reference.derive(backend(), contracts()["topk"])(np.ascontiguousarray(scores), batch, k=k)
    for t, n in enumerate(sel.native.length):
        row = np.where(np.isnan(scores[t, : batch.visible[t]]), -np.inf, scores[t, : batch.visible[t]])
        order = np.argsort(-row[::-1], kind="stable")[:n]
        sel.native.indices[t, :n] = len(row) - 1 - order
    return sel


def zero_in_the_tail(self, scores, batch, *, k):
    sel = Reference.derive(backend(), contracts()["topk"])(scores, batch, k=k)
    sel.native.indices[sel.native.indices < 0] = 0
    return sel


def reading_invisible_scores(self, scores, batch, *, k):
    sel = Reference.derive(backend(), contracts()["topk"])(scores, batch, k=k)
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    for t, n in enumerate(sel.native.length):
        sel.native.indices[t, :n] = order[t, :n]
    return sel


def last_logit_wins(self, logits):
    flipped = np.where(np.isnan(widen(logits)), -np.inf, widen(logits))[:, ::-1]
    return (logits.shape[1] - 1 - flipped.argmax(-1)).astype(np.int32) if len(logits) else np.zeros(0, np.int32)


def padding_leaks(self, x, w, counts):
    mixed = np.eye(len(x), dtype=f32) @ single(x)  # a permutation by matrix: zero times NaN is NaN
    experts = np.minimum(np.searchsorted(np.cumsum(counts), np.arange(len(x)), side="right"), len(counts) - 1)
    return rounded(self, np.stack([w.native[e].astype(f32) @ row for e, row in zip(experts, mixed)]), x)


def last_expert_for_minus_one(self, x, w13, w2, ids, weights, *, first_expert=0):
    ids = np.where(ids < 0, len(w13.native) - 1 + first_expert, ids)
    return create("reference").derive(contracts()["moe_experts"])(
        x, w13, w2, ids, weights, first_expert=first_expert)


def padding_written(self, pages, batch, first, second=None):
    Reference.derive(backend(), contracts()["kv_write"])(pages, batch, first, second)
    written = pages
    for (name, _), rows in zip(pages.spec.fields, (first, second)):
        if rows is not None and len(rows):
            written[name][batch.slots] = widen(rows)  # slot -1 is the cache's last
    return written


def wrong_layout(self, x, batch, *, theta, layout, start, width):
    return rope(self, x, batch, theta=theta, layout="half", start=start, width=width)


def narrow_angles(self, x, batch, *, theta, layout, start, width):
    table = narrow(batch.positions.astype(np.float64), "bfloat16")
    coarse = type("Coarse", (), {"positions": widen(table)})
    return rope(self, x, coarse, theta=theta, layout=layout, start=start, width=width)


def truncating_cast(self, x, *, to):
    wide = single(x)
    if to != "bfloat16":
        return narrow(wide.astype(np.float64), to)
    return (wide.view(np.uint32) >> 16).astype(np.uint16).view(narrow(np.zeros(0), "bfloat16").dtype)


def masks_refused(self, logits, ids):
    return np.where((ids < 0) | np.isfinite(single(logits)).all(-1), ids, np.int32(-2))


def any_token(self, logits, u, temperature, top_k, top_p):
    every = np.zeros_like(top_k)
    return Reference.derive(backend(), contracts()["sample"])(logits, u, temperature, every, top_p)


def short_prefix(self, *operands):
    tokens = Reference.derive(backend(), contracts()["speculative_verify"])(*operands)
    tokens[:, -1] = -1
    return tokens


DEFECTS = [
    ("rms_norm", without_eps, "FAIL_VALUE"),
    ("rms_norm", unwritten_tail, "FAIL_VALUE"),
    ("rms_norm", stale_rows, "FAIL_VALUE"),
    ("rms_norm", beside_the_output, "FAIL_WROTE_OUTSIDE"),
    ("rms_norm", onto_the_input, "FAIL_MUTATED"),
    ("rms_norm", into_the_gaps_of_a_view, "FAIL_WROTE_OUTSIDE"),
    ("rms_norm", as_if_contiguous, "FAIL_VALUE"),
    ("linear", without_last_column, "FAIL_VALUE"),
    ("linear", swapped_rows, "FAIL_VALUE"),
    ("linear", bfloat16_accumulator, "FAIL_VALUE"),
    ("linear", truncating, "FAIL_VALUE"),
    ("linear", half_precision_inside, "FAIL_VALUE"),
    ("linear", one_element_off, "FAIL_VALUE"),
    ("linear", all_float32, "FAIL_DTYPE"),
    ("linear", transposed_result, "FAIL_SHAPE"),
    ("linear", raising, "FAIL_ERROR"),
    ("linear", Drifting.linear, "FAIL_NONDETERMINISTIC"),
    ("layer_norm", variance_by_difference, "FAIL_VALUE"),
    ("silu_mul", halves_swapped, "FAIL_VALUE"),
    ("silu_mul", sigmoid_overflowing, "FAIL_VALUE"),
    ("moe_route", weights_from_biased_scores, "FAIL_VALUE"),
    ("moe_route", same_expert_for_nan, "FAIL_VALUE"),
    ("moe_route", one_group, "FAIL_VALUE"),
    ("topk", ties_to_the_highest, "FAIL_VALUE"),
    ("topk", zero_in_the_tail, "FAIL_VALUE"),
    ("topk", reading_invisible_scores, "FAIL_VALUE"),
    ("argmax", last_logit_wins, "FAIL_VALUE"),
    ("grouped_gemm", padding_leaks, "FAIL_VALUE"),
    ("moe_experts", last_expert_for_minus_one, "FAIL_VALUE"),
    ("kv_write", padding_written, "FAIL_WROTE_OUTSIDE"),
    ("rope", wrong_layout, "FAIL_VALUE"),
    ("rope", narrow_angles, "FAIL_VALUE"),
    ("cast", truncating_cast, "FAIL_VALUE"),
    ("check_finite", masks_refused, "FAIL_VALUE"),
    ("sample", any_token, "FAIL_VALUE"),
    ("speculative_verify", short_prefix, "FAIL_VALUE"),
]


@pytest.mark.parametrize(("op", "kernel", "verdict"), DEFECTS, ids=[k.__qualname__ for _, k, _ in DEFECTS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_planted_defects_are_found(op, kernel, verdict):
    """By some case of the plan, the cheapest tried first."""
    bench, others = Bindings(backend(**{op: kernel})), []
    for case in sorted((c for c in cases(contracts()[op]) if not c.fault), key=elements):
        result = check(case, bench)
        if result.failed and result.verdict == verdict:
            return
        others.append(result.explain())
    pytest.fail("\n".join(others))


def nan_first(self, scores, batch, *, k):
    return Reference.derive(backend(), contracts()["topk"])(np.where(np.isnan(scores), np.inf, scores), batch, k=k)


def test_a_nan_that_was_chosen_is_called_so():
    case = Case.from_token("topk,T=7,k=7,scores~special,batch=1/30+1/31+1/32+4/40,block_size=64,0")
    result = check(case, Bindings(backend(topk=nan_first)))
    assert re.search(r"sel row \d \(k = 7\) has \d+ with score nan, which counts as -inf, below the k-th score", result.message)


def judged(y, g, most=0.0, kind="float32", level="bring-up"):
    """The judge's word on one array, against a value that may be off by `most`."""
    inputs = build(Case.from_token("add,T=1,H=7,a:fp32,0"))
    result = narrow(np.asarray(y, np.float64), kind)
    g = np.asarray(g, np.float64)
    spread = Spread(g, np.full(g.shape, most / 6), np.full(g.shape, most))
    try:
        return judge_floats(inputs, "y", result, spread, LEVELS[level]).verdict
    except Failed as failed:
        return failed.judgement.verdict


def test_overflow_is_right_where_rounding_overflows():
    inf, top = np.inf, 65504.0
    assert judged([inf, -inf], [1e6, -1e6], kind="float16") == "PASS"
    assert judged([inf], [-1e6], kind="float16") == "FAIL_VALUE"
    assert judged([top], [65530.0], kind="float16") == "PASS"  # rounds to infinity, within the budget of the largest
    assert judged([inf], [65500.0], kind="float16", level="strict") == "PASS"
    assert judged([inf], [60000.0], kind="float16") == "FAIL_VALUE"
    assert judged([top], [inf], kind="float16") == "FAIL_VALUE"
    assert judged([inf], [top * 1.01], kind="float32") == "FAIL_VALUE"


def test_nan_is_compared_by_position():
    assert judged([np.nan, 1], [np.nan, 1]) == "PASS"
    assert judged([1, np.nan], [np.nan, 1]) == "FAIL_VALUE"
    assert judged([np.nan], [np.inf]) == "FAIL_VALUE"


def test_each_block_has_its_own_places_and_budget(monkeypatch):
    monkeypatch.setattr("porthal.conformance.judgement.judge.BLOCK", 4)
    inputs, g = build(Case.from_token("add,T=1,H=7,a:fp32,0")), np.ones((2, 5))
    most = np.where(np.arange(10).reshape(2, 5) < 4, 0.5, 0.0)
    never, off = np.ones((2, 5), np.float32), np.ones((2, 5), np.float32)
    never[1, 2], off[1, 2] = np.nan, 1.25
    for y, message in ((never, r"y\[1, 2\] is nan, expected 1;"), (off, r"y\[1, 2\] is 1\.25, expected 1: off by ")):
        with pytest.raises(Failed, match=message):
            judge_floats(inputs, "y", y, Spread(g, most / 6, most), LEVELS["bring-up"])


def test_zeros_within_a_wide_budget_are_not_trusted():
    g = np.full((4, 8), 1e-3)
    assert judged(g, g, most=1.0) == "PASS"
    assert judged(g * 0, g, most=1.0) == "UNTRUSTED"
    assert judged(g * 0, g * 1e-37, most=0.0) == "PASS"  # what a chip may flush


def test_one_unit_in_the_last_place_is_the_limit_of_an_elementwise_op():
    assert judged([1 + 2**-7], [1.0], kind="bfloat16", level="strict") == "FAIL_VALUE"
    assert judged([1 + 2**-7], [1 + 2**-8], kind="bfloat16", level="strict") == "PASS"


@pytest.mark.parametrize("token", ["silu_mul,T=257,I=96,x:fp32,0", "rope,T=33,N=8,D=64,theta=10000.0,layout=half,start=0,"
                                   "width=64,x:fp32,batch=long,block_size=64,0"])  # fmt: skip
def test_no_budget_vanishes_by_chance(token):
    """Without reductions every permitted point counts in full: equal ones of opposite sign cannot cancel."""
    (spread,) = Golden(build(Case.from_token(token))).spread().values()
    there = np.abs(spread.value) > 0
    relative = spread.most[there] / np.abs(spread.value[there])
    assert relative.min() > 2**-24
    assert (spread.most <= 6 * spread.sigma).all()


PIECEWISE = {
    "rms_norm": "rms_norm,T=17,H=96,x:fp16,0",
    "rope": "rope,T=17,N=2,D=8,theta=10000.0,layout=half,start=0,width=8,x:bf16,batch=mixed,block_size=64,0",
    "moe_route": "moe_route,T=17,E=16,k=8,scale=2.5,0",
}


@pytest.mark.parametrize("op", PIECEWISE)
def test_the_pieces_of_a_reference_make_the_whole(op, monkeypatch):
    """Bit for bit; moe_route's weights are those of a choice, which is cut with the rows."""
    inputs = build(Case.from_token(PIECEWISE[op]))
    golden = Golden(inputs)
    choice = [golden.results()["ids"][:, ::-1].copy()] if op == "moe_route" else []
    function = inputs.contract.finish if choice else None
    same_in_pieces(golden, function, choice, monkeypatch)


def test_a_reference_that_goes_row_by_row_is_taken_whole(monkeypatch):
    """It is perturbed at as many points as it has rows, so that a piece has other ones."""

    def by_rows(x, weight, gain, *, eps):
        return np.stack([held(row * scale / total(np.square(row))) for row, scale in zip(x, gain)])

    same_in_pieces(Golden(build(Case.from_token(PIECEWISE["rms_norm"]))), by_rows, [np.arange(1.0, 18.0)], monkeypatch)


def same_in_pieces(golden, function, extra, monkeypatch):
    found = []
    for piece in (2**30, 1):
        monkeypatch.setattr("porthal.conformance.judgement.golden.PIECE", piece)
        assert (len(golden._pieces(tuple(extra))) > 2) is (piece == 1)
        found.append(golden._perturbed(function, *extra))
    whole, pieces = found
    assert whole.keys() == pieces.keys() and whole
    for key, spread in whole.items():
        assert (spread.most > 0).any(axis=-1).all()
        for part in ("value", "sigma", "most"):
            assert np.array_equal(getattr(spread, part), getattr(pieces[key], part)), (key, part)


def test_what_a_chip_may_flush_widens_sigma_as_well():
    wider = Spread(np.zeros(2), np.array([3.0, 0.0]), np.array([5.0, 0.0])).wider(np.array([4.0, 2.0]))
    assert wider.sigma.tolist() == [5, 2] and wider.most.tolist() == [9, 2]


def test_a_choice_among_groups_may_be_that_of_flushed_scores():
    """A chip that flushes denormals sees equal groups, and takes the first."""
    inputs = build(Case.from_token("moe_route,T=17,E=16,k=1,scale=2.5,n_group=8,topk_group=1,0"))
    logits = np.broadcast_to(np.linspace(-94, -90, 16, dtype=np.float32), (17, 16)) - np.arange(17)[:, None] / 16
    operands = dict(inputs.operands, logits=logits.astype(np.float32), bias=np.zeros(16, np.float32))
    golden = Golden(replace(inputs, operands=operands))
    assert (golden.results()["ids"] == 15).all()
    judge_top(golden, np.zeros((17, 1), np.int32), LEVELS["strict"], "lowest")


def test_a_declared_order_of_ties_is_accepted_and_said():
    def topk(self, scores, batch, *, k):
        return ties_to_the_highest(self, scores, batch, k=k)

    topk.tie = "any"
    report = run(backend(topk=topk), ["topk"])
    assert report.ok
    assert any("own order of ties" in r.note for r in report.results)


def test_error_messages_are_one_line():
    report = run(backend(linear=raising), ["linear"])
    assert report.exit_code == 1
    place = f"raised in raising at {__file__}:{raising.__code__.co_firstlineno + 1}"
    assert {r.message for r in report.failures} == {f"RuntimeError: aicore exception 507015; and a long trace; {place}"}
    assert len(report.failures) + report.rows[0].passed == len(report.results)  # the run went on
