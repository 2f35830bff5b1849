"""The covering design: which pairs of classes a plan meets, that it is the same everywhere, and what it finds."""

import os
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.classes import ENDS, FORMS, batch_of, form_of, points, size_class
from porthal.conformance.cases.compositions import LONGEST
from porthal.conformance.cases.legal import refusal
from porthal.conformance.cases.pairs import design_of
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.hal import contracts, create


@given(st.integers(0, LONGEST))
def test_a_size_has_one_class_and_its_points_are_of_it(v):
    label = size_class(v)
    assert points(label) and all(size_class(p) == label for p in points(label))
    low, high = ENDS[label // 2 - 1] if label > 1 else -1, ENDS[label // 2]
    assert low < v <= high and (v % 8 > 0) == bool(label % 2) or v < 8


@given(
    st.sampled_from(FORMS), st.integers(1, 3000), st.integers(1, LONGEST), st.integers(1, 1024), st.sampled_from(["topk", "rope"])
)
def test_a_batch_is_legal_and_mostly_of_its_form(form, rows, keys, size, op):
    batch = batch_of(form, rows, keys, size, written=False)
    attrs = "k=7" if op == "topk" else "N=1,D=8,theta=10.0,layout=half,start=0,width=8"
    token = f"{op},T={rows},{attrs},batch={batch},block_size={size},0"
    case = Case.from_token(token) if rows * max(keys, rows) < 2**24 else None
    if case is None:
        return
    assert not refusal(case)
    if 3 < rows <= 16 and keys > 2 * size:
        assert form_of(case) == form


def test_the_plan_is_the_same_in_every_process():
    script = (
        "from porthal.conformance.cases.plan import cases\nfrom porthal.hal import contracts\n"
        "print([c.token for op in ('linear', 'topk') for c in cases(contracts()[op])])"
    )
    found = set()
    for seed in "12":
        env = {**os.environ, "PYTHONHASHSEED": seed}
        found.add(subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True).stdout)
    assert len(found) == 1 and len(found.pop()) > 1000


@pytest.mark.parametrize("op", ["linear", "topk", "kv_write", "moe_experts"])
def test_tokens_of_the_standard_plan_are_calls(op):
    planned = cases(contracts()[op], "standard")
    assert [Case.from_token(c.token) for c in planned] == planned
