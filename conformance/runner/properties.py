"""Property-based cases: calls drawn from all that a contract allows, and of those that fail the smallest.

Hypothesis draws a case, never an array: its token is the whole input, so that what it finds is replayed like any other
case. The same seed draws the same cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter
from itertools import pairwise
from math import log2
from types import SimpleNamespace
from typing import Any

from porthal.conformance.cases.boundaries import values
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import DECODING, LONG, Request, shareable, spelled
from porthal.conformance.cases.domain import absences, combos, free_symbols, options
from porthal.conformance.cases.legal import FAR, LAYOUTS, THREADS, VIEWS, elements, refusal
from porthal.conformance.cases.plan import among
from porthal.conformance.cases.values import FLOATING, RELATED
from porthal.conformance.report.results import Result
from porthal.hal import Unavailable
from porthal.hal.contract import PAGE_SIZES, Contract
from porthal.hal.spans import Reals

try:
    from hypothesis import HealthCheck, Phase, assume, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st
except ImportError:
    raise Unavailable("properties need the Python package hypothesis: pip install 'porthal[conformance]'") from None

SIZE = 2**18  # logical elements of a drawn case
SHRINKS = 400  # executed cases after the first that fails
ROWS = (*range(21), 31, 32, 33, 255, 256, 257)
LARGE = 1024  # most of a drawn size
FEW = 40  # numbers from the low end that are drawn as often as all others
ROOM = 2**14  # of all sizes multiplied, besides small ones
SMALL = 12
MILD = ("zeros", "equal", "ties", "integer", "negative", "small", "denormal")  # values that every op takes, in any operand
ONE_SIGN = ("equal", "negative", "offset")  # whose sums may overflow where a contract permits rounding to float16


def search(
    contract: Contract, n: int, check: Callable[[Case], Result], seed: int = 0, dtypes: Sequence[str] | None = None
) -> list[Result]:
    """Up to n drawn cases, each once: the results of all that passed, and of the smallest that failed, if one did."""
    known: dict[str, Result] = {}
    tried = 0

    @seeded(seed)
    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(calls(contract).filter(lambda case: among(case, dtypes)))
    def holds(case: Case) -> None:
        nonlocal tried
        if case.token not in known:
            if tried >= SHRINKS:
                return
            known[case.token] = check(case)
            tried += any(r.failed for r in known.values())
        if known[case.token].failed:
            raise _Found(case.token)

    smallest: list[Result] = []
    try:
        holds()
    except _Found as found:
        smallest = [known[str(found)]]
    return [r for r in known.values() if not r.failed] + smallest


class _Found(Exception):
    pass


@st.composite
def calls(draw: Any, contract: Contract) -> Case:
    """Any legal call of an op, of moderate size; shrinks to few rows, sizes of 1, default values, no view."""
    signature, facts = contract.signature, {}
    batch, block_size = None, 0
    if signature.of_kind("Batch") or signature.of_kind("Pages"):
        block_size = draw(whole(PAGE_SIZES))
    if signature.of_kind("Batch"):
        batch = draw(requests(contract, block_size))
        facts[contract.rows] = sum(r.q for r in batch)
    elif contract.rows:
        facts[contract.rows] = draw(st.sampled_from(ROWS))
    room = ROOM
    for name in draw(st.permutations([s for s in free_symbols(contract) if s not in facts])):
        facts[name] = draw(whole(range(1, max(SMALL, min(LARGE, room)) + 1)))
        room //= facts[name]
    for name in (name for name in contract.legal if name in contract.attributes):
        facts[name] = draw(_attribute(contract, name, facts))
    recipes = []
    for operand in signature.operands:
        if operand.kind != "Batch":
            chosen = draw(st.sampled_from(list(_recipes(contract, operand.name))))
            if chosen != options(contract, operand.name)[0]:
                recipes.append((operand.name, chosen))
    attributes = contract.attributes
    case = Case(
        contract.name,
        tuple((n, facts[n]) for n in dict.fromkeys((contract.rows, *free_symbols(contract))) if n in facts),
        tuple((n, facts[n]) for n in attributes if facts[n] != attributes[n].default),
        draw(st.sampled_from(combos(contract))),
        tuple(recipes),
        tuple(name for group in absences(contract) if draw(st.booleans()) for name in group),
        spelled(batch or ()),
        block_size,
        view=draw(st.sampled_from(("", *VIEWS, *LAYOUTS, FAR, THREADS))),
    )
    overflows = "float16" in dict(case.dtypes).values() and any(r in ONE_SIGN for _, r in recipes)
    assume(not overflows and not refusal(case) and elements(case) <= SIZE)
    return case


@st.composite
def requests(draw: Any, contract: Contract, block_size: int) -> list[Request]:
    """Requests that decode, prefill, do nothing or only fill a place, with pages of their own or shared."""
    signature = contract.signature
    short = bool(signature.of_kind("Pages")) or any(len(o.dims) > 1 for o in signature.of_kind("Batch"))
    before = st.integers(0, 300) if short else st.integers(0, 300) | st.integers(0, LONG - 100)
    q_lens = draw(st.lists(st.sampled_from((*range(DECODING + 1), *range(9, 70, 4))), min_size=1, max_size=6))
    found = []
    for q in sorted(q_lens, key=lambda q: q > DECODING):
        padded = draw(st.integers(0, 3)) == 3
        found.append(Request(q, 0 if padded else q + draw(before)))
    if not short:
        return found
    written = bool(signature.mutated)
    most = [0, *(shareable(a, b, block_size, written) for a, b in pairwise(found))]
    return [r._replace(shared=draw(st.integers(0, m))) for r, m in zip(found, most)]


def whole(span: Sequence[int]) -> Any:
    """Whole numbers of a span: few, one beside a boundary, or any."""
    return st.sampled_from(span[:FEW]) | st.sampled_from(values(span)) | st.sampled_from(span)


def _attribute(contract: Contract, name: str, facts: dict[str, Any]) -> Any:
    """Any legal value, the default or the first listed one most often."""
    attribute = contract.attributes[name]
    span = contract.allowed(name, SimpleNamespace(**facts))
    assume(isinstance(span, Reals) or len(span))  # one number cannot be rotated
    given = () if attribute.default is Parameter.empty else (attribute.default,)
    listed = [attribute.type(v) for v in (*given, *contract.cases.get(name, ())) if v in span]
    usual = st.sampled_from(listed) if listed else st.nothing()
    if isinstance(span, Reals):
        any_size = st.floats(log2(span.low), log2(span.high)).map(lambda e: float(f"{2**e:.3g}"))
        return usual | st.sampled_from(values(span)) | any_size.filter(span.__contains__)
    return usual | (whole(span) if attribute.type is int else st.sampled_from(span))


def _recipes(contract: Contract, operand: str) -> Iterator[str]:
    own = options(contract, operand)
    yield from own
    domain = MILD if own[0] in FLOATING else RELATED.get(own[0], ())
    yield from (r for r in domain if r not in own)
