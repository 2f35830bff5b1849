"""Large calls with small goldens: every number of the large one has the value that its reference would give it."""

from dataclasses import replace

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request, requests, spelled
from porthal.conformance.cases.copies import build, repeats
from porthal.conformance.cases.domain import per_expert
from porthal.conformance.cases.plan import cases
from porthal.conformance.cases.values import Draw
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.judgement.golden import Golden
from porthal.conformance.runner.check import check
from porthal.hal import Pages, UsageError, contracts

COPIED = [op for op, contract in contracts().items() if contract.independent]


def copied(op: str, batch: str = "9*1/40+6*3/70+5/0+2*9/33+40/200", few: int = 3) -> Case:
    """A call of an op in which copies stand along everything that is independent."""
    contract = contracts()[op]
    case = next(c for c in cases(contract) if not (c.view or c.fault or c.absent or c.recipes) and "H" not in c.attrs)
    takes = bool(contract.signature.of_kind("Batch"))
    rows = sum(r.q for r in requests(batch)) if takes else 41
    size = {s: 17 for s in contract.independent} | {contract.rows: rows}
    limits = {"K": 96, "H": 96, "V": 64, "G": 4, "E": 16, "Q": 32, "I": 32, "S": 32, "D": 256 if takes else 32, "N": 17}
    dims = tuple((n, size[n] if n in size else min(v, limits.get(n, v))) for n, v in case.dims)
    attrs = tuple((n, min(v, 16) if n in ("k", "E") else v) for n, v in case.attrs)
    return replace(case, dims=dims, attrs=attrs, batch=batch if takes else "", distinct=few)


@pytest.mark.parametrize("op", COPIED)
def test_the_small_call_has_the_results_of_all_copies(op):
    inputs = build(copied(op))
    assert inputs.copies
    large, small = Golden(inputs).results(), Golden(inputs.copies.small).results()
    rows = contracts()[op].rows
    for result in contracts()[op].signature.results:
        one, few = large[result.name], small[result.name]
        if isinstance(one, Pages):
            here, there = inputs.batch.slots, inputs.copies.small.batch.slots
            at = inputs.copies.at[rows]
            written = (here >= 0) & (at >= 0)
            assert written.sum() > 3
            for field in one.native:
                np.testing.assert_array_equal(one[field][here[written]], few[field][there[at[written]]])
            continue
        parts = {"": (one, few)} if isinstance(one, np.ndarray) else {p: (one.parts()[p], few.parts()[p]) for p in few.parts()}
        for whole, part in parts.values():
            for axis, dim in enumerate(result.dims[: whole.ndim]):
                if dim in inputs.copies.at:
                    places = inputs.copies.at[dim]
                    whole = whole.take(np.flatnonzero(places >= 0), axis)
                    part = part.take(places[places >= 0], axis)
            assert whole.size
            np.testing.assert_allclose(whole, part, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("op", COPIED)
def test_neighbours_differ_and_every_distinct_row_occurs(op):
    inputs = build(copied(op))
    for symbol, at in inputs.copies.at.items():
        assert set(at[at >= 0]) == set(range(len(set(at[at >= 0]))))
        if symbol != contracts()[op].rows or not (inputs.batch or per_expert(contracts()[op])):
            assert (np.diff(at) != 0).all()


def wrong_at(op: str, name: str, change) -> Bindings:
    """The reference, one of whose results is changed."""

    def kernel(self, *operands, **attrs):
        out = Reference().derive(contracts()[op])(*operands, **attrs)
        found = contracts()[op].named(out)
        change(found[name])
        return out

    return Bindings(type("Wrong", (Reference,), {"name": "wrong", op: kernel})())


@pytest.mark.parametrize("t", [0, 1, 20, 39, 40])
@pytest.mark.parametrize("n", [0, 9, 16])
def test_one_wrong_number_is_found_wherever_it_is(t, n):
    case = copied("linear")

    def change(y):
        y[t, n] += 1

    result = check(case, wrong_at("linear", "y", change))
    assert result.verdict == "FAIL_VALUE" and result.at == f"y[{t}, {n}]" and result.message.startswith(result.at)
    assert check(case, Bindings(Reference())).verdict == "PASS"


def test_one_wrong_choice_is_found_wherever_it_is():
    case = Case.from_token("moe_route,T=41,E=16,k=2,scale=2.5,distinct=4,0")
    for t in (0, 17, 40):

        def change(ids, t=t):
            ids[t, 0] = (ids[t, 1] + 1) % 16

        assert check(case, wrong_at("moe_route", "ids", change)).verdict == "FAIL_VALUE"
    assert check(case, Bindings(Reference())).verdict == "PASS"


def test_a_wrong_slot_is_found_wherever_it_is():
    case = Case.from_token("kv_write,T=30,A=8,B=4,pages:bf16,batch=30*1/500,block_size=16,distinct=3,0")
    slots = build(case).batch.slots
    for t in (0, 13, 29):

        def change(pages, t=t):
            pages["a"][slots[t], 3] = 0.125

        assert check(case, wrong_at("kv_write", "pages", change)).verdict == "FAIL_VALUE"


def test_rows_that_are_not_computed_are_finite_selections_are_whole():
    token = "indexer_topk,T=40,G=4,D=32,k=16,scale=0.125,iq:fp32,batch=40/300,block_size=16,distinct=4,0"
    inputs = build(Case.from_token(token))
    left_out = np.flatnonzero(inputs.copies.at["T"] < 0)
    assert len(left_out) == 36 and 39 not in left_out and 0 not in left_out

    def change(sel):
        sel.native.indices[left_out[5], 2] = sel.native.indices[left_out[5], 1]

    result = check(Case.from_token(token), wrong_at("indexer_topk", "sel", change))
    assert result.verdict == "FAIL_VALUE" and f"row {left_out[5]}" in result.message and "twice" in result.message
    assert check(Case.from_token(token), Bindings(Reference())).verdict == "PASS"


def test_requests_alike_are_spelled_once():
    found = [Request(1, 5)] * 64 + [Request(4, 130, 1)]
    assert spelled(found) == "64*1/5+4/130/1" and requests(spelled(found)) == tuple(found)
    assert requests("5000*1/5") is None


@pytest.mark.parametrize(
    "token, why",
    [
        ("linear,T=9,K=8,N=8,x:bf16,distinct=1,0", "at least 2"),
        ("linear,T=9,K=8,N=8,x:bf16,distinct=,0", "expected at least 2"),
        ("linear,T=9,K=8,N=8,x:bf16,distinct=4,view=broadcast,0", "does not go with broadcast"),
        ("kv_write,T=9,A=8,B=8,pages:bf16,batch=mixed,block_size=16,distinct=4,0", "spelled"),
        ("page_copy,A=8,B=4,M=2,pages:bf16,block_size=16,distinct=4,0", "has none"),
    ],
)
def test_what_cannot_be_copied_is_refused(token, why):
    with pytest.raises(UsageError, match=why):
        Case.from_token(token)


def test_the_order_of_copies_depends_on_its_name_alone():
    assert repeats(12, 3, "a").tolist() == repeats(12, 3, "a").tolist() != repeats(12, 3, "b").tolist()
    assert repeats(12, 3, "a")[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("n", [0, 1, 5, 1000])
def test_the_first_of_a_permutation_are_those_of_the_whole(n: int) -> None:
    draw = Draw("sparse_mla,0/sel/3", (1,))
    assert sorted(whole := draw.order(n).tolist()) == list(range(n))
    assert all(draw.order(n, first).tolist() == whole[:first] for first in (0, 1, 3, 52, n))
