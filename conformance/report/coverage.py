"""Which boundaries planned cases cover, at which level, and why not the others: `porthal coverage` and docs/coverage.md.

The page is made by `python -m porthal.conformance.report.coverage`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from porthal.conformance.cases.boundaries import REASONS, REQUESTS, Boundary, coverage
from porthal.conformance.cases.plan import cases
from porthal.conformance.cases.profiles import MODEL, profile_of
from porthal.conformance.level import LEVELS, STANDARD, STRICT
from porthal.hal import UsageError, collectives, contracts

HEAD = """# Coverage

Kernels break where tiles, counters and grids end. For everything that a call of one device counts this page says which of these
numbers have planned cases on both sides, and at which level first; and for the rest why not. It is made by
`python -m porthal.conformance.report.coverage`; `porthal coverage --op OP --json` names the cases.

A product such as `T*k` counts rows of a grid; `columns` are those of a block table, `P` pages; 2^31 and 2^32 are elements of
an operand. "Beyond the model" is more than any call of GLM-5 has, with {requests} requests at once; "over memory" and "over
time" say what the smallest call above would take, where a level allows one call less.
"""


@dataclass(frozen=True)
class Row:
    """A boundary, and the level that covers it first, "" where none does."""

    boundary: Boundary
    level: str


def rows(op: str, level: str = STANDARD.name, model: str = MODEL) -> list[Row]:
    """Every boundary of an op; UsageError for an unknown one, and for one of several ranks."""
    if op in collectives():
        raise UsageError(f"{op} is a call of several ranks, whose sizes are not counted: expected an op of one device")
    if op not in contracts():
        raise UsageError(f"unknown op {op!r}: known are {', '.join(contracts())}")
    contract, profile = contracts()[op], profile_of(model)
    names = list(LEVELS)
    found: dict[tuple[str, int], Row] = {}
    for name in names[: names.index(level) + 1]:
        for b in coverage(contract, LEVELS[name], cases(contract, name, model=model), profile):
            before = found.get((b.what, b.at))
            if before is None or not before.level:
                found[b.what, b.at] = Row(b, name if b.covered else "")
    return list(found.values())


def as_json(found: Iterable[Row]) -> list[dict[str, Any]]:
    """One object per boundary: the first cases on both sides, the level, or the reason."""
    return [asdict(row.boundary) | {"level": row.level} for row in found]


def _levels(found: Sequence[Row]) -> list[str]:
    return [name for name in LEVELS if name != STRICT.name or any(row.level == name for row in found)]


def table(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Per thing that an op counts: the numbers by the level that covers them first, and those left with their reasons."""
    made, levels = [], _levels(found)
    for (op, what), group in groupby(found, lambda row: (row.boundary.op, row.boundary.what)):
        mine = list(group)
        by = [" ".join(str(r.boundary.at) for r in mine if r.level == name) for name in levels]
        left = [r.boundary for r in mine if not r.level]
        why = [f"{' '.join(str(b.at) for b in same)} {reason}" for reason, same in groupby(left, lambda b: b.reason)]
        made.append([op, what, *by, "; ".join(why)])
    return ["op", "counted", *levels, "not covered"], made


def summary(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Per op: how many boundaries there are, how many are covered, and how many are left for each reason."""
    made, levels = [], _levels(found)
    for op, group in groupby(found, lambda row: row.boundary.op):
        mine = list(group)
        reasons = Counter(r.boundary.reason.partition(":")[0] for r in mine if not r.level)
        by = [str(sum(r.level == name for r in mine)) for name in levels]
        made.append([op, str(len(mine)), *by, *(str(reasons[reason] or "") for reason in REASONS)])
    return ["op", "boundaries", *levels, *REASONS], made


def page() -> str:
    """docs/coverage.md."""
    found = [row for op in contracts() for row in rows(op)]
    lines = [HEAD.format(requests=REQUESTS), *_markdown(*summary(found))]
    for op, group in groupby(found, lambda row: row.boundary.op):
        head, made = table(list(group))
        lines += ["", f"## {op}", "", *_markdown(head[1:], [[f"`{what}`", *cells] for _, what, *cells in made])]
    return "\n".join(lines) + "\n"


def _markdown(head: Sequence[str], made: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *made)]


if __name__ == "__main__":
    print(page(), end="")
