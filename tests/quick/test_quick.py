"""What a commit must not break: one op of each family on the reference, and the first words of the demo model."""

from __future__ import annotations

import pytest

from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.hal import Contract, contracts, create
from porthal.hal.signature import ARRAY
from tests import demo

FEW = 20  # of an op's cases, the smallest


def kinds(contract: Contract) -> set[str]:
    return {operand.kind for operand in contract.signature.operands}


PRIMITIVES = {name: c for name, c in contracts().items() if not c.decomposition}
FAMILIES = {
    "arrays": lambda c: kinds(c) == {ARRAY} and not c.exact and not c.choice,
    "weights": lambda c: "Weight" in kinds(c) and not c.exact,
    "pages": lambda c: bool(c.signature.mutated),
    "selection": lambda c: {"Selection", "Pages"} <= kinds(c),
    "discrete choice": lambda c: bool(c.choice),
    "copy": lambda c: kinds(c) == {ARRAY} and c.exact and not c.choice,
}
MEMBERS = {family: [c for c in PRIMITIVES.values() if belongs(c)] for family, belongs in FAMILIES.items()}
MEMBERS["composite"] = [c for c in contracts().values() if c.decomposition]


def smallest(family: str) -> Contract:
    """The op whose cases have the fewest numbers."""
    return min(MEMBERS[family], key=lambda c: sum(map(elements, cases(c))))


def test_families_do_not_overlap():
    chosen = [c.name for members in MEMBERS.values() for c in members]
    assert len(set(chosen)) == len(chosen) > 25


@pytest.mark.parametrize("family", MEMBERS)
def test_an_op_of_each_family_passes_on_the_reference(family):
    bindings = Bindings(create("reference"))
    results = [check(case, bindings) for case in sorted(cases(smallest(family)), key=elements)[:FEW]]
    assert [r.explain() for r in results if r.failed] == []
    assert len(results) == FEW and all(r.own or r.status == "refusal" for r in results)


def test_the_demo_model_says_what_it_always_said():
    assert bytes(demo.text("reference", "float32", 8)) == b"__init__"
