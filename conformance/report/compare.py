"""Chips beside each other, op by op: whose own kernels are right, cover more, with smaller errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from porthal.conformance.report.differences import LETTERS, differences, told_apart
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
    """One op: all sides, and who leads."""

    op: str
    sides: tuple[Side, ...]

    @property
    def leader(self) -> str:
        """The letter of the side that leads, "even" where several do, "" where none has an own kernel without failures."""
        right = [(side.rank, letter) for side, letter in zip(self.sides, LETTERS) if side.right]
        best = [letter for rank, letter in right if rank == max(right)[0]]
        return "" if not best else best[0] if len(best) == 1 else "even"


@dataclass(frozen=True)
class Comparison:
    """Reports of the same suite, contracts and level."""

    reports: tuple[Report, ...]

    @cached_property
    def names(self) -> list[str]:
        """Their names: the backends', with a letter where these are the same."""
        return told_apart([r.backend for r in self.reports])

    @cached_property
    def rows(self) -> list[Line]:
        by_op = [{row.op: row.results for row in r.rows} for r in self.reports]
        ops = dict.fromkeys(op for found in by_op for op in found)
        return [Line(op, tuple(Side.of(r, op, f.get(op, ())) for r, f in zip(self.reports, by_op))) for op in ops]

    @property
    def summary(self) -> str:
        lead = Counter(row.leader for row in self.rows)
        parts = [f"{name} leads in {lead[letter]}" for name, letter in zip(self.names, LETTERS)]
        return f"{', '.join(parts)}, {lead['even']} even, {lead['']} without a right own kernel on any side"

    @property
    def differences(self) -> list[str]:
        """What else than the kernels is not the same."""
        return differences(
            {
                "machine": [r.environment.get("machine", "") for r in self.reports],
                "system": [r.environment.get("system", "") for r in self.reports],
                "device": [r.device for r in self.reports],
                "place": [r.place for r in self.reports],
                "version of porthal": [r.environment.get("porthal", "") for r in self.reports],
                "sources of porthal": [r.sources.get("porthal", "") for r in self.reports],
            }
        )

    def regressions(self, beyond: float) -> list[str]:
        """Ops of which a later report passes fewer of the cases that the first passed with own kernels; `beyond` is the share
        of these that may be lost."""
        return [sentence for n in range(1, len(self.reports)) for sentence in self._lost(n, beyond)]

    def _lost(self, n: int, beyond: float) -> Iterator[str]:
        asked = {r.token: r for r in self.reports[n].results}
        before = [r for r in self.reports[0].results if r.own and r.verdict == "PASS" and r.token in asked]
        lost = [r for r in before if not (asked[r.token].own and asked[r.token].verdict == "PASS")]
        had, gone = Counter(r.op for r in before), Counter(r.op for r in lost)
        for op, count in gone.items():
            if count > beyond * had[op]:
                yield f"{op}: {self.names[n]} does not pass {count} of the {had[op]} cases that {self.names[0]} passes"

    def table(self) -> Group:
        """Per op, all sides: level, cases passed by own kernels and failures, worst |e|/B; who leads. Two fit 80 columns."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        sides = zip(LETTERS, self.names, self.reports)
        head = [f"{side}: {name} ({r.place}), level {r.level}; {r.circumstances}" for side, name, r in sides]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("op", no_wrap=True)
        for side, _ in zip(LETTERS, self.reports):
            table.add_column(f"{side} level", no_wrap=True)
            table.add_column("own passed", justify="right")
            table.add_column("|e|/B", justify="right", no_wrap=True)
        table.add_column("leads")
        for row in self.rows:
            cells = [cell for side in row.sides for cell in _cells(side)]
            table.add_row(row.op, *cells, Text(row.leader, "green" if row.leader in LETTERS else "dim"))
        return Group(*map(Text, [*head, *self.differences]), table, Text(self.summary))

    def html(self) -> str:
        """One page without external resources."""
        return compare_page(self)


def comparison(*reports: Report) -> Comparison:
    """The comparison; UsageError where suite, level or contracts differ."""
    first, *others = reports
    for other in others:
        for what, x, y in (("suite", first.suite, other.suite), ("level", first.level, other.level)):
            if x != y:
                raise UsageError(f"the reports are of {what} {x} and {y}: compare reports of the same {what}")
        common = first.contracts.keys() & other.contracts.keys()
        for op in sorted(common):
            if first.contracts[op] != other.contracts[op]:
                versions = f"{first.contracts[op]} and {other.contracts[op]}"
                raise UsageError(f"the reports are of contract {op} versions {versions}: run the older one again")
        if not common:
            raise UsageError("the reports have no op in common: compare reports of the same ops")
    return Comparison(reports)


def _cells(side: Side) -> list[str]:
    passed = f"{side.passed}/{side.cases}" + (f", {side.failed} failed" if side.failed else "")
    return [side.level, passed, figure(side.worst) if side.worst else ""]
