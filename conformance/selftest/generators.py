"""What is varied on every op, whatever it computes: a few kinds of variation that find most of the known discrepancies.

They are read off the plan of the standard level, so that the table in docs/discrepancies.md cannot promise more than runs.
Each function says what an op's plan lacks, or "".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.domain import absences, options
from porthal.conformance.cases.legal import THREADS, VIEWS, elements
from porthal.conformance.cases.plan import MANY_ROWS, cases
from porthal.conformance.cases.values import ANY_OP, FLOATING
from porthal.conformance.execution.invariance import disturbed
from porthal.conformance.level import LEVELS, STANDARD, STRICT
from porthal.hal import contracts

ROUTING = ("crowded", "deserted", "holes", "away", "repeated", "wild")


@cache
def plan(op: str) -> tuple[Case, ...]:
    return tuple(case for case in cases(contracts()[op], STANDARD.name) if not case.fault)


def row_counts(op: str) -> str:
    """No row, one, a few, and both sides of 16, 256 and 65536."""
    rows = contracts()[op].rows
    seen = {dict(case.dims).get(rows, 1) for case in plan(op)}
    spans = [range(1), range(1, 2), range(2, 8)]
    spans += [range(a + 1, b + 1) for n in (16, 256, MANY_ROWS) for a, b in ((n // 2, n), (n, 2 * n))]
    return _lacking(f"{r[0]} to {r[-1]}" for r in spans if not seen & set(r))


def views(op: str) -> str:
    """Inputs as slices of columns, of rows, transposed, with stride 0; in several threads at once."""
    return _lacking(v for v in (*VIEWS, THREADS) if v not in {case.view for case in plan(op)})


def disturbance(op: str) -> str:
    """The rows in another order, with a poisoned one among them."""
    rows = contracts()[op].rows
    some = min((c for c in plan(op) if not c.view and dict(c.dims)[rows] > 0), key=elements)
    return "" if disturbed(build(some)) else "rows refer to one another"


def repetition(op: str) -> str:
    """Fifty runs bit for bit at the strict level, fewer below."""
    runs = {level.name: level.runs for level in LEVELS.values()}
    return "" if STRICT.runs >= 50 and min(runs.values()) >= 2 else f"{runs}"


def omission(op: str) -> str:
    """Each optional argument left out."""
    seen = {case.absent for case in plan(op)}
    return _lacking(group[0] for group in absences(contracts()[op]) if group not in seen)


def values(op: str) -> str:
    """Zeros, equal numbers, denormals; infinities, NaN and large ones where a contract lists them."""
    contract = contracts()[op]
    if not any(options(contract, o.name)[0] in FLOATING for o in contract.signature.operands if o.kind != "Batch"):
        return ""
    seen = {recipe for case in plan(op) for _, recipe in case.recipes}
    return _lacking(v for v in ANY_OP if v not in seen)


def routing(op: str) -> str:
    """All to one expert, experts without rows, -1, ids elsewhere, repeated and out of any range."""
    contract = contracts()[op]
    if not any(options(contract, o.name)[0] == "routed" for o in contract.signature.operands if o.kind != "Batch"):
        return ""
    seen = {recipe for case in plan(op) for _, recipe in case.recipes}
    return _lacking(r for r in ROUTING if r not in seen)


GENERATORS: Mapping[str, Callable[[str], str]] = {
    "row counts": row_counts,
    "views": views,
    "permute and pad": disturbance,
    "repeat": repetition,
    "omit": omission,
    "values": values,
    "routing": routing,
}


def lacking(op: str) -> dict[str, str]:
    """What an op's plan leaves out of the variations that are made on every op."""
    return {name: why for name, generator in GENERATORS.items() if (why := generator(op))}


def _lacking(found: Iterable[object]) -> str:
    return ", ".join(map(str, found))
