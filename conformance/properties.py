"""Property-based cases: calls drawn from all that a contract allows, and of those that fail the smallest.

Hypothesis draws a case, never an array: its token is the whole input, so that what it finds is replayed like any other
case. The same seed draws the same cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter
from itertools import pairwise
from typing import Any

from porthal.conformance.cases import (
    FAR,
    LONGEST,
    SHORT,
    THREADS,
    VIEWS,
    Case,
    Request,
    absences,
    combos,
    elements,
    free_symbols,
    options,
    refusal,
    rows_symbol,
    shareable,
)
from porthal.conformance.plan import among
from porthal.conformance.report import Result
from porthal.conformance.values import FLOATING, RELATED
from porthal.hal import Unavailable
from porthal.hal.contract import Contract

try:
    from hypothesis import HealthCheck, Phase, assume, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st
except ImportError:
    raise Unavailable("properties are drawn by hypothesis, which is not here: pip install 'porthal[conformance]'") from None

SIZE = 2**18  # logical elements of a drawn case
SHRINKS = 400  # executed cases after the first that fails
ROWS = (*range(21), 31, 32, 33, 255, 256, 257)
SIZES = range(1, 41)  # besides those that a contract lists, up to
LARGE = 1024
BLOCK_SIZES = (16, 32, 64, 128)
PLAIN = ("zeros", "equal", "ties", "integer", "negative", "small", "denormal")  # values that every op bears
ONE_SIGN = ("equal", "negative", "offset")  # whose sums may overflow where a contract permits rounding to float16
FLOATS = {"eps": (1e-6, 1e-2), "scale": (1.0, 0.125), "theta": (1e4,)}
# Attributes whose values depend on other facts.
DEPENDENT: dict[str, Callable[[dict[str, Any]], Sequence[int]]] = {
    "width": lambda f: range(2, f["D"] + 1, 2),
    "start": lambda f: range(f["D"] - f["width"] + 1),
    "n_group": lambda f: [n for n in range(1, f["E"] + 1) if f["E"] % n == 0],
    "topk_group": lambda f: range(1, f["n_group"] + 1),
}


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
    operands = contract.signature.operands
    rows, facts = rows_symbol(contract), {}
    batch = block_size = None
    if any(o.kind in ("Batch", "Pages") for o in operands):
        block_size = draw(st.sampled_from(BLOCK_SIZES))
    if any(o.kind == "Batch" for o in operands):
        batch = draw(requests(contract, block_size))
        facts["T"] = sum(r.q for r in batch)
    elif rows:
        facts[rows] = draw(st.sampled_from(ROWS))
    for name in free_symbols(contract):
        if name not in facts:
            facts[name] = draw(_size(contract, name))
    for name in sorted(contract.attributes, key=lambda a: a in ("start", "k")):  # what depends on others comes last
        facts[name] = draw(_attribute(contract, name, facts))
    recipes = []
    for operand in operands:
        if operand.kind != "Batch":
            chosen = draw(st.sampled_from(list(_recipes(contract, operand.name))))
            if chosen != options(contract, operand.name)[0]:
                recipes.append((operand.name, chosen))
    attributes = contract.attributes
    case = Case(
        contract.name,
        tuple((n, v) for n, v in facts.items() if n not in attributes),
        tuple((n, facts[n]) for n in attributes if facts[n] != attributes[n].default),
        draw(st.sampled_from(combos(contract))),
        tuple(recipes),
        tuple(name for group in absences(contract) if draw(st.booleans()) for name in group),
        "+".join("/".join(map(str, r if r.shared else r[:2])) for r in batch or ()),
        block_size or 0,
        draw(st.sampled_from(("", *VIEWS, FAR, THREADS))),
    )
    overflows = "float16" in dict(case.dtypes).values() and any(r in ONE_SIGN for _, r in recipes)
    assume(not overflows and not refusal(case) and elements(case) <= SIZE)
    return case


@st.composite
def requests(draw: Any, contract: Contract, block_size: int) -> list[Request]:
    """Requests that decode, prefill, do nothing or only fill a place, with pages of their own or shared."""
    signature = contract.signature
    short = any(o.kind == "Pages" or (o.kind == "Batch" and len(o.dims) > 1) for o in signature.operands)
    before = st.integers(0, 300) if short else st.integers(0, 300) | st.integers(0, LONGEST - 100)
    q_lens = draw(st.lists(st.sampled_from((*range(SHORT + 1), *range(9, 70, 4))), min_size=1, max_size=6))
    found = []
    for q in sorted(q_lens, key=lambda q: q > SHORT):
        padded = draw(st.integers(0, 3)) == 3
        found.append(Request(q, 0 if padded else q + draw(before)))
    if not short:
        return found
    written = bool(signature.mutated)
    most = [0, *(shareable(a, b, block_size, written) for a, b in pairwise(found))]
    return [r._replace(shared=draw(st.integers(0, m))) for r, m in zip(found, most)]


def _size(contract: Contract, name: str) -> Any:
    return st.sampled_from(sorted({*SIZES, *(v for v in contract.cases.get(name, ()) if 0 < v <= LARGE)}))


def _attribute(contract: Contract, name: str, facts: dict[str, Any]) -> Any:
    attribute = contract.attributes[name]
    if name in DEPENDENT and (values := list(DEPENDENT[name](facts))):
        return st.sampled_from(values)
    listed = list(dict.fromkeys((*contract.cases.get(name, ()), *FLOATS.get(name, ()))))
    if attribute.default is not Parameter.empty and attribute.default not in listed:
        listed.insert(0, attribute.default)
    if attribute.type is not int:
        return st.sampled_from([attribute.type(v) for v in listed])
    most = facts["E"] if "n_group" in facts else SIZES[-1]
    return st.sampled_from(sorted({*range(min(*listed, 1), most + 1), *listed}))


def _recipes(contract: Contract, operand: str) -> Iterator[str]:
    own = options(contract, operand)
    yield from own
    domain = PLAIN if own[0] in FLOATING else RELATED.get(own[0], ())
    yield from (r for r in domain if r not in own)
