"""The covering design: which pairs of classes a plan meets, that it is the same everywhere, and what it finds."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.classes import ENDS, FORMS, batch_of, form_of, points, size_class
from porthal.conformance.cases.compositions import LONGEST, requests
from porthal.conformance.cases.pairs import Design
from porthal.conformance.cases.plan import cases
from porthal.conformance.cases.profiles import MODEL, profile_of
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.level import level_of
from porthal.conformance.runner.check import check
from porthal.hal import contracts, create


@given(st.integers(0, LONGEST))
def test_a_size_has_one_class_and_its_points_are_of_it(v):
    label = size_class(v)
    assert points(label) and all(size_class(p) == label for p in points(label))
    low, high = ENDS[label // 2 - 1] if label > 1 else -1, ENDS[label // 2]
    assert low < v <= high and (v < 8 or (v % 8 > 0) == bool(label % 2))


@given(st.sampled_from(FORMS), st.integers(1, 3000), st.integers(1, 5000), st.integers(1, 1024))
def test_a_batch_is_legal_and_of_its_form(form, rows, keys, size):
    batch = batch_of(form, rows, keys, size, written=False)
    case = Case.from_token(f"rope,T={rows},N=1,D=8,theta=10.0,layout=half,start=0,width=8,batch={batch},block_size={size},0")
    if 3 < rows <= 16 and keys > 2 * size:
        assert form_of(case.batch) == form


def test_the_plan_is_the_same_in_every_process():
    script = (
        "from porthal.conformance.cases.plan import cases\nfrom porthal.hal import contracts\n"
        "print([c.token for op in ('linear', 'topk', 'head_linear') for c in cases(contracts()[op])])"
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


def pairs(op, level):
    """How many pairs of classes a plan meets, of how many: with few rows and with many."""
    design = Design(contracts()[op], level_of(level), profile_of(MODEL), [])
    before = np.count_nonzero(design.open) // 2
    for case in cases(contracts()[op], level):
        if not (case.fault or case.seq):
            design.meet(design.classes_of(case))
    return before - np.count_nonzero(design.open) // 2, before


@pytest.mark.parametrize(
    ("op", "bring_up", "standard"),
    [
        *[("rms_norm", 185, 650), ("linear", 550, 1240), ("topk", 425, 1400), ("rope", 1450, 3900)],
        *[("sparse_mla", 925, 4000), ("mla_prolog", 1000, 6800)],
    ],
)
def test_a_plan_meets_pairs(op, bring_up, standard):
    """Of what is legal, and no dearer than a level allows; one at a time these were half as many."""
    assert pairs(op, "bring-up")[0] >= bring_up and pairs(op, "standard")[0] >= standard


def test_what_excludes_each_other_is_known_before_a_case_is_made():
    """Else such a pair stays open, is thought the most worth, and spoils every case: of 300 in the first plan 35 were made."""
    design = Design(contracts()["mla_prolog"], level_of("standard"), profile_of(MODEL), [(("h", "special"),)])
    rows, forms, recipes = (design.places[name] for name in ("T", "form", "recipes"))
    assert not design.together[rows[size_class(1)], forms["mixed"]] and design.together[rows[size_class(7)], forms["mixed"]]
    coded = [place for schemes, place in design.places["schemes"].items() if schemes]
    assert coded and not design.together[recipes[(("h", "special"),)], coded].any()
    assert all(any(p % 2 == 0 for p in points(label)) for label in design.places["R"])  # an odd R is no call of it
    assert len(design.pool(60)) == 60


def test_no_class_is_left_out():
    """Each class that a legal call has is in the plan, whatever it meets there."""
    design = Design(contracts()["rope"], level_of("standard"), profile_of(MODEL), [])
    for case in cases(contracts()["rope"], "standard"):
        if not (case.fault or case.seq):
            design.meet(design.classes_of(case))
    lacking = {f.name: [c for c, n in design.places[f.name].items() if not design.seen[n]] for f in design.factors}
    one = [size_class(1)]
    assert {name: found for name, found in lacking.items() if found} == {"D": one, "width": one}


def test_calls_under_schemes_are_met_by_themselves():
    """A pair that a plain call has met is still open under a scheme: kernels of codes are others."""
    design = Design(contracts()["linear"], level_of("standard"), profile_of(MODEL), [])
    plain, coded = map(Case.from_token, ("linear,T=33,K=96,N=96,x:bf16,0", "linear,T=33,K=96,N=96,x:bf16,w%int8_channel,0"))
    assert design.gain(design.classes_of(coded)) > 0
    design.meet(design.classes_of(plain))
    assert design.gain(design.classes_of(plain)) == 0 < design.gain(design.classes_of(coded))
    design.meet(design.classes_of(coded))
    assert design.gain(design.classes_of(coded)) == 0
    places = design.places["schemes"]
    assert not design.open[:2, [p for schemes, p in places.items() if schemes]].any() and not design.open[2:, places[()]].any()


def test_counts_that_a_model_does_without_are_met():
    """GLM-5 has one group of experts, DeepSeek eight; a kernel's mask of eight bits shows with more."""
    found = [c.attributes for c in cases(contracts()["moe_route"]) if c.attributes.get("n_group", 1) > 8]
    assert sum(a["topk_group"] < a["n_group"] for a in found) > 3


@given(st.integers(9, 500).map(lambda n: 2 * n))
def test_drafts_of_an_even_number_of_rows_could_be_uniform(rows):
    """Requests of different lengths, in all as many rows as if all were alike."""
    q_lens = [r.q for r in requests(batch_of("drafts", rows, 5000, 64, written=False))]
    assert sum(q_lens) == rows and rows % len(q_lens) == 0 and len(set(q_lens)) > 1


# -- what it finds -----------------------------------------------------------------------------------------------------


def failing(op, kernel):
    """Of the standard cases of few rows those that fail on a kernel of the reference's own arrays."""
    made = Bindings(type("Made", (Reference,), {"name": "made", op: kernel})())
    few = [c for c in cases(contracts()[op], "standard") if dict(c.dims)["T"] <= 4 and not (c.fault or c.seq or c.view)]
    return [case for case in few if check(case, made).failed]


def test_few_wide_rows_are_met():
    """A split of a long sum that only few rows take, and that forgets what is left of a wide row."""
    right = create("reference").derive(contracts()["rms_norm"])

    def rms_norm(self, x, weight, *, eps=1e-5):
        y = right(x, weight, eps=eps)
        if len(x) <= 4 and x.shape[-1] >= 512 and x.shape[-1] % 8:
            y[..., -(x.shape[-1] % 8) :] = 0
        return y

    assert failing("rms_norm", lambda self, x, weight, *, eps=1e-5: right(x, weight, eps=eps)) == []
    found = failing("rms_norm", rms_norm)
    assert found and all(dict(c.dims)["H"] > 512 for c in found)
