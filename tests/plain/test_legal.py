"""The legal range is the test range: what a contract says of an attribute holds for calls, is planned, and is drawn."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal import ops
from porthal.conformance.cases.boundaries import GRIDS, TILES, UNEVEN, ends, values
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.classes import size_class
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.runner.properties import search
from porthal.hal import Reals, UsageError, contracts, use
from porthal.hal.contract import PAGE_SIZES
from porthal.hal.spans import worded
from tests.tokens import passed

ATTRIBUTES = [(op, name) for op, contract in contracts().items() for name in contract.attributes]


def facts_of(case):
    given = {a.name: a.default for a in case.contract.attributes.values()}
    return SimpleNamespace(**given | dict(case.dims) | dict(case.attrs))


@pytest.mark.parametrize(("op", "name"), ATTRIBUTES)
def test_every_attribute_has_a_legal_range_and_all_planned_values_are_in_it(op, name):
    contract = contracts()[op]
    for case in cases(contract, "standard"):
        facts = facts_of(case)
        assert getattr(facts, name) in contract.allowed(name, facts), case.token


@pytest.mark.parametrize("level", ["bring-up", "standard"])
@pytest.mark.parametrize(("op", "name"), ATTRIBUTES)
def test_plans_take_the_ends_of_every_range(op, name, level):
    """In one case or another, since ranges follow the sizes beside them."""
    contract, met = contracts()[op], set()
    for case in cases(contract, level):
        facts = facts_of(case)
        found = ends(contract.allowed(name, facts))
        met |= {found.index(v) for v in (getattr(facts, name),) if v in found}
    assert met >= {0, 1}


@pytest.mark.parametrize("level", ["bring-up", "standard"])
@pytest.mark.parametrize("op", [op for op, c in contracts().items() if "block_size" in c.legal])
def test_plans_take_pages_of_every_kind(op, level):
    """One slot, a few, and between powers of two; full tiles, and what leaves a remainder."""
    met = {case.block_size for case in cases(contracts()[op], level)}
    every = {size_class(n) for n in (1, 3, 16, 17, 128, 129, 512, 513)}
    assert len(every - {size_class(n) for n in met}) <= (level == "bring-up")
    assert 64 in met and len(met & {1, 16, 17, 48, 65, 128, 256, 257, 1024}) > (2 if level == "bring-up" else 5)


def test_properties_draw_anything_legal():
    def drawn(op, name):
        tokens = [result.token for result in search(contracts()[op], 60, passed)]
        return {token.partition(f",{name}=")[2].partition(",")[0] for token in tokens}

    assert len(drawn("moe_route", "k")) > 8 and len(drawn("topk", "block_size")) > 10 and len(drawn("rms_norm", "eps")) > 10


@given(st.integers(-5, 300), st.integers(1, 5000), st.integers(1, 7))
def test_values_are_legal_and_on_both_sides_of_every_boundary(low, length, step):
    span = range(low, low + length, step)
    found = values(span)
    assert set(found) <= set(span) and {span[0], span[-1]} <= set(found) and len(set(found)) == len(found)
    for n in (*TILES, UNEVEN, *GRIDS):
        below, above = [v for v in span if v <= n], [v for v in span if v > n]
        assert not (below and above) or {below[-1], above[0]} <= set(found)


def test_words():
    assert worded(PAGE_SIZES) == "1 to 1024" and worded(range(2, 9, 2)) == "2 to 8 in steps of 2" and worded([]) == "nothing"
    assert worded([1, 2, 4]) == "one of 1, 2, 4" and worded(Reals(1e-5, 1e4, apart=(0.0,))) == "0 or 1e-05 to 10000"


def test_a_checked_binding_refuses_floats_outside_of_their_range():
    logits, u, k = np.zeros((2, 3), np.float32), np.zeros(2, np.float32), np.zeros(2, np.int32)

    def sample(temperature, top_p=1.0):
        heat = np.array([1.0, temperature], np.float32)
        with use("reference"):
            return ops.sample(logits, u, heat, k, np.full(2, top_p, np.float32))

    assert sample(0.0).tolist() == sample(1e4).tolist() == [0, 0]
    for temperature in (-1.0, 1e-6, np.nan, np.inf):
        with pytest.raises(UsageError, match=r"sample: temperature\[1\] is .*, expected 0 or 1e-05 to 10000$"):
            sample(temperature)
    with pytest.raises(UsageError, match=r"sample: top_p\[0\] is 1.5, expected 0 to 1$"):
        sample(1.0, 1.5)


def test_all_planned_values_are_legal():
    for contract in contracts().values():
        for case in cases(contract):
            if case.recipes and not case.fault and elements(case) < 2**18:
                inputs = build(case)
                contract.check_values(inputs.operands, inputs.spec, lambda x: x)


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("topk,T=3,R=1,k=2,batch=mixed,block_size=64,0", "R is not one of its sizes, expected T"),
        ("linear,T=3,K=8,N=8,x:fp32,x~halfway,0", "halfway is about codes: it needs a scheme"),
    ],
)
def test_what_the_batch_binds_and_codes_without_a_scheme_are_refused(token, why):
    with pytest.raises(UsageError, match=why):
        Case.from_token(token)
