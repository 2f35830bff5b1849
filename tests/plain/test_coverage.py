"""Boundaries of what a call counts: planned cases on both sides, or a reason that can be checked."""

import json
from pathlib import Path

import pytest

from porthal.cli.app import app
from porthal.conformance.cases.boundaries import (
    ADDRESSES,
    BEYOND,
    GRIDS,
    ILLEGAL,
    REASONS,
    TILES,
    addressed,
    counts,
    sizes_of,
)
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.report.coverage import page, rows
from porthal.hal import Pages, contracts
from porthal.hal.signature import evaluate

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("op", contracts())
def test_every_boundary_is_covered_or_has_a_reason(op):
    found = rows(op)
    known = {(w, n) for w in counts(contracts()[op]) for n in (*TILES, *GRIDS)}
    known |= {(w, n) for w in addressed(contracts()[op]) for n in ADDRESSES}
    assert {(r.boundary.what, r.boundary.at) for r in found} == known
    without = [(r.boundary.what, r.boundary.at) for r in found if not r.level and not r.boundary.reason.startswith(REASONS)]
    assert without == []
    for row in found:
        b = row.boundary
        if row.level and b.at not in ADDRESSES:
            low, high = (evaluate(b.what, sizes_of(Case.from_token(t))) for t in (b.below, b.above))
            assert low <= b.at < high


def test_what_is_served_is_covered():
    """The sizes of the model by which kernels have been wrong."""
    for op, what, numbers in (
        ("sparse_mla", "T*N", (1024, 65536)),
        ("sparse_mla", "S", (65536,)),
        ("indexer_topk", "S", (65536,)),
        ("topk", "S", (65536,)),
        ("argmax", "V", (65536,)),
        ("moe_experts", "E", (16, 128)),
        ("moe_experts", "T*k", (4096,)),
        ("kv_write", "P", (65536,)),
        ("sparse_mla", "requests", (256, 512)),
        ("sparse_mla", "columns", (2048,)),
        ("linear", "N", (65536,)),
    ):
        levels = {r.boundary.at: r.level for r in rows(op) if r.boundary.what == what}
        assert all(levels.get(n, "here") for n in numbers), (op, what, levels)


@pytest.mark.parametrize("op", ["sparse_mla", "kv_write", "indexer_topk", "rope", "page_copy", "moe_layer"])
def test_sizes_are_those_of_the_call(op):
    for case in cases(contracts()[op]):
        if elements(case) > 2**18 or case.fault or case.seq or case.batch == "drafts":  # whose tables are longer
            continue
        inputs, env = build(case), sizes_of(case)
        for name, value in inputs.spec.dims.items():
            if name not in ("P", "R", "S"):
                assert env[name] == value, (case.token, name)
        if inputs.batch:
            assert env["requests"] == inputs.batch.R and env["S"] == inputs.batch.max_kv
        for pages in (v for v in inputs.operands.values() if isinstance(v, Pages)):
            assert abs(env["P"] - pages.spec.n_blocks) <= 4, case.token


def test_reasons():
    reasons = {(r.boundary.what, r.boundary.at): r.boundary.reason for r in rows("sparse_mla")}
    assert reasons["block_size", 2048] == f"{ILLEGAL}: at most 1024" and reasons["N", 128] == f"{BEYOND}: at most 128"
    assert reasons["P*block_size*C", 2**32].startswith("over memory: 8 GiB")


def command(capsys, *args):
    with pytest.raises(SystemExit) as left:
        app(["coverage", *args], "porthal")
    return left.value.code or 0, *capsys.readouterr()


def test_the_command(capsys):
    code, out, _ = command(capsys, "--op", "topk")
    assert code == 0 and "block_size" in out and "illegal by the contract: at most 1024" in out
    code, out, _ = command(capsys, "--op", "topk", "--level", "bring-up", "--json")
    found = json.loads(out)
    assert code == 0 and {f["level"] for f in found} == {"", "bring-up"} and all(f["op"] == "topk" for f in found)
    code, out, err = command(capsys, "--op", "fft")
    assert (code, out) == (2, "") and err.startswith("porthal: unknown op 'fft': known are add, ")
    code, out, err = command(capsys, "--op", "all_reduce")
    assert (code, out) == (2, "") and err.startswith("porthal: all_reduce is a call of several ranks, whose sizes are not ")


def test_the_page_is_what_is_generated():
    assert (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8") == page()
