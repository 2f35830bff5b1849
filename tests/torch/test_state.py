"""Kernels that keep something between calls: programs, drafts and layouts find what single calls let pass."""

from __future__ import annotations

import pytest

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import LAYOUTS, THREADS, elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.conformance.selftest.planting import Defect, planted
from porthal.conformance.selftest.state import DEFECTS
from porthal.conformance.selftest.variants import variants
from porthal.hal import contracts

FEW = 2**20  # elements
FIRST = {d.kind: d for d in reversed(DEFECTS)}  # of each kind


def sequences(op: str, dtype: str = "") -> list[Case]:
    """The cases of an op, small ones first, that are more than a call on dense operands with tables as long as needed."""
    found = [c for c in cases(contracts()[op], "standard", [dtype] if dtype else None) if elements(c) <= FEW]
    kept = [c for c in found if c.seq or c.batch == "drafts" or c.view in (*LAYOUTS, THREADS)]
    return sorted(kept, key=elements)


@pytest.mark.parametrize("defect", FIRST.values(), ids=lambda d: d.key)
def test_one_defect_of_each_kind_is_caught_by_a_sequence(defect: Defect) -> None:
    bench = Bindings(planted(defect))
    assert any(check(case, bench, "standard").verdict.startswith("FAIL") for case in sequences(defect.op, defect.scored[0]))


def test_kinds_and_their_number() -> None:
    assert len(DEFECTS) >= 40 and len({d.op for d in DEFECTS}) >= 15
    assert set(FIRST) == {
        "weights that change", "plans", "operand changed", "pages that change", "drafts", "results held", "layout", "threads",
    }  # fmt: skip


@pytest.mark.parametrize("key", [v.key for v in variants() if v.source == "kept"])
def test_what_is_kept_honestly_passes(key: str) -> None:
    variant = next(v for v in variants() if v.key == key)
    bench = Bindings(variant.make())
    for case in sequences(variant.op, "bfloat16" if contracts()[variant.op].dtypes.get("x") else ""):
        result = check(case, bench, "standard")
        assert not result.failed, result.explain()
