"""Each value generator that is named by what it provokes finds a mistake that was planted for it, at bring-up."""

import pytest

from porthal.conformance.cases import provocations
from porthal.conformance.cases.plan import cases
from porthal.conformance.cases.values import RECIPES
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.conformance.selftest.planting import planted
from porthal.conformance.selftest.values import FOUND_BY
from porthal.hal import contracts

OWN = {word for word, f in RECIPES.items() if f.__module__ == provocations.__name__}
DEFECTS = [(word, defect) for word, found in FOUND_BY.items() for defect in found]


def test_each_has_a_defect():
    """But those that only accompany another."""
    assert OWN - {beside for _, beside in provocations.COMPANIONS.values()} <= set(FOUND_BY) <= set(RECIPES)


@pytest.mark.parametrize(("word", "defect"), DEFECTS, ids=lambda v: v if isinstance(v, str) else v.key)
def test_its_defect_is_found_at_bring_up(word, defect):
    bench = Bindings(planted(defect))
    own = [case for case in cases(contracts()[defect.op]) if word in dict(case.recipes).values()]
    assert any(check(case, bench).verdict.startswith("FAIL") for case in own)
