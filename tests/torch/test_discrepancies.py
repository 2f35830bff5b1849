"""Every known discrepancy is accounted for, and what is said to find it does."""

import inspect
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from porthal.backends.cpu.backend import Cpu
from porthal.backends.torch.backend import Torch
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.discrepancies import COLLECTIVES, DISCREPANCIES, named_for
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import captured, cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.level import LEVELS
from porthal.conformance.runner.check import check
from porthal.conformance.runner.runs import replay
from porthal.conformance.selftest.discrepancies import DEFECTS, findings
from porthal.conformance.selftest.fused import Fused
from porthal.conformance.selftest.generators import GENERATORS, lacking
from porthal.conformance.selftest.page import discrepancies
from porthal.hal import contracts, create
from tests import inner

ROOT = Path(__file__).parents[2]
COVERED = [d for d in DISCREPANCIES if d.status == "covered"]
QUICK = 2**22  # elements of a case that this file runs


@cache
def plan(op, level="standard"):
    return {c.token for planned in (cases, captured) for c in planned(contracts()[op], level)}


def test_all_are_listed_once():
    assert [d.number for d in DISCREPANCIES] == list(range(1, 75))
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+( \(.+\))?", s) for d in DISCREPANCIES for s in d.sources.split(", "))


@pytest.mark.parametrize("known", DISCREPANCIES, ids=lambda d: str(d.number))
def test_each_is_covered_or_says_what_it_waits_for(known):
    if known.status == "covered":
        assert known.cases and not known.by
    elif known.status == "open":
        assert known.by == COLLECTIVES and not known.cases
    else:
        file, _, test = known.by.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text() and not known.cases


def test_each_covered_one_has_one_defect():
    assert [d.discrepancy for d in DEFECTS] == [d.number for d in COVERED]
    assert [d.op for d in DEFECTS] == [d.op for d in COVERED]


@pytest.mark.parametrize("level", LEVELS)
def test_named_cases_stand_in_the_plan(level):
    for known in COVERED:
        for token in known.cases:
            case = Case.from_token(token)
            far = level == "bring-up" and case.view in ("far", "beyond")
            planned = token in plan(case.op, level)
            assert case.token == token
            assert planned or far or elements(case) > LEVELS[level].named_elements, (known.number, token)
        standard = [t for t in known.own if elements(Case.from_token(t)) <= LEVELS["standard"].named_elements]
        assert standard or known.number == 20, known.number


def test_patterns_describe_cases_that_exist():
    for known in COVERED:
        tokens = plan(known.op)
        for pattern in known.family:
            alone = type(known)(0, "", "", family=(pattern,))
            assert any(alone.belongs(t) for t in tokens), (known.number, pattern)


@pytest.mark.parametrize("known", COVERED, ids=lambda d: str(d.number))
def test_a_right_backend_passes_the_named_cases(known):
    quick = [case for case in map(Case.from_token, known.cases) if elements(case) <= QUICK]
    right = {captures: Bindings(create("torch:capture" if captures else "torch")) for captures in {c.capture for c in quick}}
    assert {check(case, right[case.capture], "standard").verdict for case in quick} <= {"PASS"}


@pytest.mark.parametrize("known", COVERED, ids=lambda d: str(d.number))
def test_named_cases_find_the_defect(known):
    quick = [t for t in known.own if elements(Case.from_token(t)) <= QUICK]
    assert quick or known.number in (2, 20)  # 65,536 rows, and 4 GiB of weights: by `python -m` only
    found = [r.verdict for r in findings(known.number, quick).values() if r.failed]
    assert bool(found) == bool(quick) and "NOT_JUDGED" not in found


def test_the_page_is_what_is_generated():
    assert (ROOT / "docs" / "discrepancies.md").read_text() == discrepancies()


def test_a_report_says_what_a_case_is_named_for():
    token = DISCREPANCIES[3].cases[0]
    assert [d.number for d in named_for(token)] == [4]
    assert "Named for discrepancy 4: A fused expert router" in replay(token, "torch", isolate=False).explain()


def test_pytest_chooses_the_cases_of_one_number(tmp_path):
    options = inner.options("--porthal-backend=reference", "-m", "discrepancy(number=6)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.search(r"^1 passed, \d+ deselected", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_caches_beyond_31_bits_take_no_memory_and_are_for_real_kernels():
    tokens = [t for d in DISCREPANCIES for t in d.cases if "view=beyond" in t and not t.startswith("grouped_gemm")]
    assert len(tokens) == 3
    assert {replay(t, "torch", isolate=False).verdict for t in tokens} == {"PASS"}
    assert {replay(t, "reference", isolate=False).verdict for t in tokens} == {"UNCLAIMED"}


# -- 55: the interface of a shipped backend --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [Torch, Fused, Cpu])
def test_kernels_have_the_signatures_of_their_contracts(backend):
    kernels = {op: f for op in contracts() if (f := getattr(backend, op, None)) is not None}
    assert len(kernels) > 20
    for op, kernel in kernels.items():
        given = list(inspect.signature(kernel).parameters.values())[1:]
        wanted = list(inspect.signature(contracts()[op].reference).parameters.values())
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted], op


# -- what is varied on every op --------------------------------------------------------------------------------------

# Row counts: larger than a case of the standard level may be. Permute and pad: rows refer to one another.
EXEMPT = {
    "speculative_verify": {"row counts"},
    "select_rows": {"row counts"},
    "page_copy": {"permute and pad"},
    "grouped_gemm": {"permute and pad"},
    "moe_permute": {"permute and pad"},
    "moe_unpermute": {"permute and pad"},
}


@pytest.mark.parametrize("op", contracts())
def test_every_variation_is_made_on_every_op(op):
    assert set(lacking(op)) == EXEMPT.get(op, set())
    assert len(GENERATORS) == 7
