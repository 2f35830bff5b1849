"""Two chips beside each other, op by op: whose own kernels cover more, with smaller errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from porthal.conformance.report.page import compare_page, figure
from porthal.conformance.report.reached import NONE
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import Result
from porthal.hal import UsageError

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Side:
    """One chip's part in a row: cases, how many own kernels passed and claimed, and these kernels' errors."""

    level: str
    cases: int
    claimed: int
    passed: int
    worst: float
    median: float

    @classmethod
    def of(cls, report: Report, op: str, results: Sequence[Result]) -> Side:
        own = [r for r in results if r.own]
        errors = [r.worst for r in own if r.worst > 0]
        level = report.levels[op].level if op in report.levels else "not run"
        return cls(
            level,
            len(results),
            len(own),
            sum(r.verdict == "PASS" for r in own),
            max(errors, default=0.0),
            median(errors) if errors else 0.0,
        )

    @property
    def fraction(self) -> float:
        """Of all cases, those that own kernels passed."""
        return self.passed / self.cases if self.cases else 0.0

    @property
    def rank(self) -> tuple[bool, float, float, float]:
        """Higher is better: a level reached, cases passed by own kernels, then smaller errors."""
        return self.level not in (NONE, "not run"), self.fraction, -self.worst, -self.median


@dataclass(frozen=True)
class Line:
    """One op: both sides, and who leads."""

    op: str
    a: Side
    b: Side

    @property
    def leader(self) -> str:
        """ "a", "b", "even", or "" where neither passed anything with a kernel of its own."""
        if not self.a.passed and not self.b.passed:
            return ""
        return "even" if self.a.rank == self.b.rank else "a" if self.a.rank > self.b.rank else "b"


@dataclass(frozen=True)
class Comparison:
    """Two reports of the same suite, contracts and level."""

    a: Report
    b: Report

    @cached_property
    def names(self) -> tuple[str, str]:
        """Their names: the backends', with A and B where these are the same."""
        same = self.a.backend == self.b.backend
        return (f"{self.a.backend} A", f"{self.b.backend} B") if same else (self.a.backend, self.b.backend)

    @cached_property
    def rows(self) -> list[Line]:
        by_op = [{row.op: row.results for row in r.rows} for r in (self.a, self.b)]
        ops = dict.fromkeys(op for found in by_op for op in found)
        return [Line(op, *(Side.of(r, op, f.get(op, ())) for r, f in zip((self.a, self.b), by_op))) for op in ops]

    @property
    def summary(self) -> str:
        lead = [row.leader for row in self.rows]
        parts = [f"{name} leads in {lead.count(side)}" for name, side in zip(self.names, "ab")]
        return f"{', '.join(parts)}, {lead.count('even')} even, {lead.count('')} without an own kernel on either side"

    def table(self) -> Group:
        """Per op, both sides: level, cases passed by own kernels, worst and median |e|/B; who leads."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        places = " against ".join(f"{n} ({r.place})" for n, r in zip(self.names, (self.a, self.b)))
        table = Table(title=f"{places}, level {self.a.level}")
        table.add_column("op")
        for name in self.names:
            table.add_column(f"{name}: level", overflow="fold")
            for what in ("own passed", "worst |e|/B", "median"):
                table.add_column(what, justify="right")
        table.add_column("leads")
        for row in self.rows:
            cells = [cell for side in (row.a, row.b) for cell in _cells(side)]
            leads = {"a": self.names[0], "b": self.names[1]}.get(row.leader, row.leader)
            table.add_row(row.op, *cells, Text(leads, style="green" if row.leader in ("a", "b") else "dim"))
        return Group(table, Text(self.summary))

    def html(self) -> str:
        """One page without external resources."""
        return compare_page(self)


def comparison(a: Report, b: Report) -> Comparison:
    """The comparison; UsageError where suite, level or contracts differ."""
    for what, x, y in (("suite", a.suite, b.suite), ("level", a.level, b.level)):
        if x != y:
            raise UsageError(f"the reports are of {what} {x} and {y}: compare reports of the same {what}")
    for op in a.contracts.keys() & b.contracts.keys():
        if a.contracts[op] != b.contracts[op]:
            versions = f"{a.contracts[op]} and {b.contracts[op]}"
            raise UsageError(f"the reports are of contract {op} versions {versions}: run the older one again")
    if not a.contracts.keys() & b.contracts.keys():
        raise UsageError("the reports have no op in common: compare reports of the same ops")
    return Comparison(a, b)


def _cells(side: Side) -> list[str]:
    return [side.level, f"{side.passed}/{side.cases}", *(figure(x) if x else "" for x in (side.worst, side.median))]
