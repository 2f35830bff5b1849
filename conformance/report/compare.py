"""Two chips beside each other, op by op: whose own kernels are right, cover more, with smaller errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from porthal.conformance.report.page import compare_page
from porthal.conformance.report.reached import NONE
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import REFUSAL, Result, figure
from porthal.hal import UsageError

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Side:
    """One chip's part in a row: cases that call a kernel, how many own kernels claimed and passed, the op's failures, and
    the errors of own kernels."""

    level: str
    cases: int
    claimed: int
    passed: int
    failed: int
    worst: float
    median: float

    @classmethod
    def of(cls, report: Report, op: str, results: Sequence[Result]) -> Side:
        own = [r for r in results if r.own]
        errors = [r.worst for r in own if r.worst > 0]
        level = report.levels[op].level if op in report.levels else "not run"
        return cls(
            level,
            sum(r.status != REFUSAL for r in results),
            len(own),
            sum(r.verdict == "PASS" for r in own),
            sum(r.failed for r in results),
            max(errors, default=0.0),
            median(errors) if errors else 0.0,
        )

    @property
    def fraction(self) -> float:
        """Of all cases, those that own kernels passed."""
        return self.passed / self.cases if self.cases else 0.0

    @property
    def right(self) -> bool:
        """Whether own kernels passed something and nothing of the op failed: no other side leads."""
        return self.passed > 0 and not self.failed

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
        """ "a", "b", "even", or "" where neither has an own kernel without failures."""
        if not self.a.right or not self.b.right:
            return "a" if self.a.right else "b" if self.b.right else ""
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
        return f"{', '.join(parts)}, {lead.count('even')} even, {lead.count('')} without a right own kernel on either side"

    def table(self) -> Group:
        """Per op, both sides: level, cases passed by own kernels and failures, worst |e|/B; who leads. Fits 80 columns."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        sides = zip("AB", self.names, (self.a, self.b))
        head = [f"{side}: {name} ({r.place}), level {r.level}; {r.circumstances}" for side, name, r in sides]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("op", no_wrap=True)
        for side in "AB":
            table.add_column(f"{side} level", no_wrap=True)
            table.add_column("own passed", justify="right")
            table.add_column("|e|/B", justify="right", no_wrap=True)
        table.add_column("leads")
        for row in self.rows:
            cells = [cell for side in (row.a, row.b) for cell in _cells(side)]
            leader = {"a": Text("A", "green"), "b": Text("B", "green")}.get(row.leader, Text(row.leader, "dim"))
            table.add_row(row.op, *cells, leader)
        return Group(*map(Text, head), table, Text(self.summary))

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
    passed = f"{side.passed}/{side.cases}" + (f", {side.failed} failed" if side.failed else "")
    return [side.level, passed, figure(side.worst) if side.worst else ""]
