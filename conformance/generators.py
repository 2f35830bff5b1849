"""What is varied on every op, whatever it computes: a few kinds of variation that find most of the known discrepancies.

They are read off the plan of the standard level, so that the table in docs/discrepancies.md cannot promise more than runs.
Each function says what an op's plan lacks, or "".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache

from porthal.conformance.cases import THREADS, VIEWS, Case, absences, elements, options, rows_symbol
from porthal.conformance.inputs import build
from porthal.conformance.invariance import disturbed
from porthal.conformance.plan import MANY_ROWS, ROWS, cases
from porthal.conformance.runner import RUNS
from porthal.conformance.values import FLOATING, PLAIN
from porthal.hal import contracts

ROUTING = ("crowded", "deserted", "holes", "away", "repeated", "wild")


@cache
def plan(op: str) -> tuple[Case, ...]:
    return tuple(case for case in cases(contracts()[op], "standard") if not case.fault)


def row_counts(op: str) -> str:
    """0, 1, 2, 7, 16, 17, 255, 256, 257, 65535 and 65536 rows."""
    rows = rows_symbol(contracts()[op])
    met = {dict(case.dims).get(rows) for case in plan(op)}
    return _lacking(n for n in (*ROWS["standard"], MANY_ROWS - 1, MANY_ROWS) if n not in met)


def views(op: str) -> str:
    """Inputs as slices of columns, of rows, transposed, with stride 0; in several threads at once."""
    return _lacking(v for v in (*VIEWS, THREADS) if v not in {case.view for case in plan(op)})


def disturbance(op: str) -> str:
    """The rows in another order, with a poisoned one among them."""
    rows = rows_symbol(contracts()[op])
    some = min((c for c in plan(op) if not c.view and dict(c.dims)[rows] > 0), key=elements)
    return "" if disturbed(build(some)) else "rows refer to one another"


def repetition(op: str) -> str:
    """Fifty runs bit for bit at the strict level, fewer below."""
    return "" if RUNS["strict"] >= 50 and min(RUNS.values()) >= 2 else f"{RUNS}"


def omission(op: str) -> str:
    """Each optional argument left out."""
    met = {case.absent for case in plan(op)}
    return _lacking(group[0] for group in absences(contracts()[op]) if group not in met)


def values(op: str) -> str:
    """Zeros, equal numbers, denormals; infinities, NaN and large ones where a contract lists them."""
    contract = contracts()[op]
    if not any(options(contract, o.name)[0] in FLOATING for o in contract.signature.operands if o.kind != "Batch"):
        return ""
    met = {recipe for case in plan(op) for _, recipe in case.recipes}
    return _lacking(v for v in PLAIN if v not in met)


def routing(op: str) -> str:
    """All to one expert, experts without rows, -1, ids elsewhere, repeated and out of any range."""
    if "routed" not in contracts()[op].values.get("ids", ()):
        return ""
    met = {recipe for case in plan(op) for _, recipe in case.recipes}
    return _lacking(r for r in ROUTING if r not in met)


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
