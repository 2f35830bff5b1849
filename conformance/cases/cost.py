"""What a case costs: the operations of its call, and about how long it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import log2, prod
from types import SimpleNamespace
from typing import Any

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request, lengths, requests
from porthal.conformance.cases.domain import first_float, per_expert
from porthal.conformance.cases.legal import elements
from porthal.hal.dtypes import itemsize
from porthal.hal.signature import evaluate

FLOPS, BYTES, GOLDEN = 4e10, 4e9, 1.5e10  # a second of a core: what a kernel does, what memory gives, what float64 does
SORTED = 5e-9  # seconds to sort a number among others, for each doubling of these
WIDENED = 2e-9  # and to read one in float64
CALLS = 3  # a kernel's calls in one case
PASSES = 18  # over the reference's products for one golden
ROW, DRAWN = 1.5e-7, 3e-5  # and to look at a row, or at one whose choice is drawn
ENTRY = 1.5e-7  # and at an entry of a block table
INNER = 400.0  # operations that take as long as a number between the products of an expert
PICKED = 2e-8  # and to put one key of a row in an order, of which its selection takes the first
COPY = 20.0  # operations that take as long as to write a number


def operations(case: Case) -> float:
    """The float operations of a case, of all rows as many as of the one that sees most."""
    contract, dims = case.contract, dict(case.dims)
    if not contract.signature.of_kind("Batch"):
        return _operations(case, _facts(case, dims, ()))
    rows = dims[contract.rows]
    found = map(Request, *lengths(case.batch, rows, case.attributes.get("k", 0), case.block_size, case.stream))
    return _operations(case, _facts(case, dims, list(found)))


def seconds(case: Case) -> float:
    """About how long a case takes one core: the kernel's calls, the memory that is filled and compared, the golden, which
    is that of the distinct rows. Of a batch that is a name only what does not depend on its requests counts."""
    contract, dims, found = case.contract, dict(case.dims), requests(case.batch) or ()
    few = case.distinct or max((*dims.values(), *(r.q for r in found)), default=1)
    small = {s: min(n, few) if s in contract.independent else n for s, n in dims.items()}
    if per_expert(contract):
        small[contract.rows] = min(dims[contract.rows], 2 * dims.get("E", 1))
    kept = [r._replace(q=min(r.q * n, few)) for r, n in Counter(found).items()] if case.distinct else found
    whole, part = _facts(case, dims, found), _facts(case, small, kept)
    work, reference = (_operations(case, facts) + COPY * _numbers(case, facts) for facts in (whole, part))
    ranked = CALLS * _ranked(case, whole) + _ranked(case, part)
    moved = elements(case) * itemsize(dict(case.dtypes).get(first_float(contract), "float32"))
    weights = contract.signature.of_kind("Weight")
    read = sum(prod(evaluate(d, {**case.attributes, **small}) for d in o.dims) for o in weights)
    kernel = CALLS * (work / FLOPS + 3 * moved / BYTES)
    rows = dims.get(contract.rows, 1) * (DRAWN if contract.admits else ROW)
    picked = PICKED * sum(r.q * r.kv for r in found) if contract.signature.of_kind("Selection") else 0.0
    entries = len(found) * max((r.kv for r in found), default=0) / (case.block_size or 1)
    least = 0.01 + rows + picked + ENTRY * entries
    return least + kernel + PASSES * (reference / GOLDEN + read * WIDENED) + SORTED * ranked


def _facts(case: Case, dims: Mapping[str, int], step: Sequence[Request]) -> dict[str, Any]:
    """Dims and attributes of the case's call in these sizes, with these requests."""
    contract, facts = case.contract, {**case.attributes, **dims, "block_size": case.block_size}
    for batch in contract.signature.of_kind("Batch"):
        rows, longest = sum(r.q for r in step), max((r.kv for r in step), default=0)
        facts |= dict(zip((contract.rows, "R", "S"), (rows, len(step), longest))) if batch.dims[1:] else {contract.rows: rows}
    return facts


def _operations(case: Case, facts: Mapping[str, Any]) -> float:
    signature = case.contract.signature
    width = SimpleNamespace(**{o.name: 4 for o in (*signature.operands, *signature.results)})
    experts = [o for o in signature.of_kind("Weight") if o.dims[0] == "E" and "k" in facts]
    inner = sum(facts[case.contract.rows] * facts["k"] * evaluate(o.dims[1], facts) for o in experts)
    return float(case.contract.cost(SimpleNamespace(**facts), width)[0]) + INNER * inner


def _numbers(case: Case, facts: Mapping[str, Any]) -> int:
    """Numbers of the results."""
    return sum(prod(evaluate(d, facts) for d in o.dims) for o in case.contract.signature.results if o.dims)


def _ranked(case: Case, facts: Mapping[str, Any]) -> float:
    """Numbers that are ranked, each as often as it is compared: of the first operand, or all that its rows see."""
    contract = case.contract
    if not (contract.admits or (contract.choice and "k" in facts)):
        return 0
    *rows, width = (evaluate(d, facts) for d in contract.signature.operands[0].dims)
    seen = facts.get("S", 0)
    return max(prod((*rows, width)) * log2(width + 1), facts[contract.rows] * seen * log2(seen + 1))
