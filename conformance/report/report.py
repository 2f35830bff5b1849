"""What a run found: JSON and JUnit for machines, a table for the terminal, one page for people.

docs/report-schema.md describes the JSON.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, get_args, get_origin, get_type_hints
from xml.etree import ElementTree

from porthal.conformance.level import SUITE
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.page import REPEATED, report_page
from porthal.conformance.report.reached import Reached, overall, reached
from porthal.conformance.report.results import NOT_RUN, STATUSES, Result, Row, replay_command
from porthal.conformance.report.waivers import Waiver, verify, waive
from porthal.conformance.verdicts import Verdict
from porthal.hal import Backend, UsageError, contracts
from porthal.hal.backend import NOT_TAKEN

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

SCHEMA = 2  # of the JSON
_NUMBERS = re.compile(r"-?\b(?:\d[\d.]*(?:e[+-]?\d+)?|nan|inf)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Report:
    """A run's results with all that is needed to understand them later."""

    backend: str
    place: str
    level: str
    results: tuple[Result, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    contracts: Mapping[str, int] = field(default_factory=dict)
    levels: Mapping[str, Reached] = field(default_factory=dict)
    waivers: tuple[Waiver, ...] = ()
    profile: str = "inference"
    schema: int = SCHEMA
    suite: int = SUITE

    @classmethod
    def of(cls, backend: Backend | Facts, level: str, results: Sequence[Result], profile: str = "inference") -> Report:
        """The report of a run, with the waivers of the backend's own package applied."""
        facts = backend if isinstance(backend, Facts) else Facts.of(backend)
        results = tuple(waive(result, facts.waivers) for result in results)
        ops = dict.fromkeys(r.op for r in results)
        versions = {op: contracts()[op].version for op in ops}
        levels = {op: reached(op, level, results) for op in ops}
        return cls(
            facts.backend, facts.place, level, results, facts.environment, versions, levels, facts.waivers, profile
        )

    @cached_property
    def rows(self) -> list[Row]:
        grouped: dict[str, list[Result]] = {}
        for result in self.results:
            grouped.setdefault(result.op, []).append(result)
        return [Row(op, results) for op, results in grouped.items()]

    @property
    def failures(self) -> list[Result]:
        return [r for r in self.results if r.failed]

    @property
    def causes(self) -> list[list[Result]]:
        """The failures, grouped by op and by message without its numbers."""
        found: dict[tuple[str, str, str], list[Result]] = {}
        for r in self.failures:
            found.setdefault((r.op, r.verdict, _NUMBERS.sub("#", r.message)), []).append(r)
        return list(found.values())

    @property
    def waived(self) -> list[Result]:
        return [r for r in self.results if r.verdict == "WAIVED"]

    def wrong_waivers(self) -> list[str]:
        """What is wrong with the plugin's waivers, as this run shows."""
        return verify(self.waivers, self.results)

    @property
    def deviations(self) -> list[str]:
        """Ops whose kernel declares an order of ties other than the contract's."""
        return list(dict.fromkeys(r.op for r in self.results if r.tie == "any"))

    @property
    def not_run(self) -> list[str]:
        """Which inherited cases were not run again, and why."""
        notes = Counter(r.note.partition(": ")[2] for r in self.results if r.note.startswith(NOT_RUN))
        how = "set PORTHAL_CACHE to an empty folder to run them"
        return [f"{n} cases were {NOT_RUN}: {why.replace('passed it', 'passed them')}; {how}" for why, n in notes.items()]

    @property
    def untaken(self) -> list[str]:
        """Which data own kernels say that they do not take."""
        messages = [r.message for r in self.results if r.verdict == "UNCLAIMED" and NOT_TAKEN in r.message]
        said = Counter((m.partition(" on ")[0], m.partition("the kernel takes ")[2]) for m in messages)
        return [f"{n} unclaimed for their data: {op} takes {what}" for (op, what), n in said.items()]

    @property
    def exit_code(self) -> int:
        """0 all good, 1 something failed, 2 nothing was tested."""
        if self.failures:
            return 1
        return 0 if any(r.tested for r in self.results) else 2

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def summary(self) -> str:
        """One line: counts by verdict, and of those that passed, by whose kernel."""
        verdicts = Counter(r.verdict for r in self.results)
        passed = self.passed
        whose = ", ".join(f"{passed[s]} {s}" for s in STATUSES if passed[s])
        others = ", ".join(f"{n} {v}" for v, n in sorted(verdicts.items()) if v != "PASS")
        if not any(r.tested for r in self.results):
            return f"nothing was tested on {self.backend}" + (f": {others}" if others else "")
        return f"{verdicts['PASS']} of {len(self.results)} cases passed ({whose})" + (f"; {others}" if others else "")

    @property
    def passed(self) -> Counter[str]:
        """Passed cases by whose kernel ran."""
        return Counter(r.status for r in self.results if r.verdict == "PASS")

    @property
    def overall(self) -> str:
        """The worst level over the profile, and the place unless that is hardware."""
        return overall(self.levels, self.level, self.profile) + ("" if self.on_hardware else f" ({self.place})")

    @property
    def on_hardware(self) -> bool:
        return self.place == "hardware"

    def replay(self, result: Result) -> str:
        """The command that repeats exactly this case."""
        return replay_command(result.token, self.backend, self.level, self.place)

    # -- forms -------------------------------------------------------------------------------------------------------

    def json(self) -> str:
        derived = {"overall": self.overall, "summary": self.summary, "exit_code": self.exit_code}
        return json.dumps(asdict(self) | derived, indent=1, default=str, allow_nan=False)  # str: a waiver's day

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `json` wrote; UsageError where the text is not of this schema."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"not JSON: {error}") from None
        if not isinstance(data, dict) or "schema" not in data or "results" not in data:
            raise UsageError("not a conformance report: it lacks schema and results")
        if data["schema"] != SCHEMA:
            raise UsageError(
                f"a report of schema {data['schema']}, expected {SCHEMA}: write it again with this porthal"
            )
        try:
            results = tuple(Result(**r | {"foreign": tuple(r["foreign"])}) for r in data["results"])
            _check(results)
            levels = {op: Reached(**r) for op, r in data["levels"].items()}
            known = tuple(
                Waiver(**w | {"expires": w["expires"] and date.fromisoformat(w["expires"])}) for w in data["waivers"]
            )
            read = {"results": results, "levels": levels, "waivers": known}
            return cls(**{f.name: data[f.name] for f in fields(cls)} | read)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"a damaged report ({type(error).__name__}: {error}): write it again") from None

    @classmethod
    def read(cls, file: Path) -> Report:
        """A report from its file; UsageError names what is wrong with it."""
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
        except UsageError as error:
            raise UsageError(f"{file} is {error}") from None

    def table(self) -> RenderableType:
        """Per op: cases, verdicts, level, whose kernels, the worst error with its token; then the failures."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.backend} ({self.place}), level {self.level}")
        counted: dict[str, Callable[[Row], int]] = {
            "cases": lambda row: len(row.results),
            "passed": lambda row: row.passed,
            "failed": lambda row: row.failed,
            "unclaimed": lambda row: row.unclaimed,
        }
        if self.waived:
            counted["waived"] = lambda row: row.waived
        table.add_column("op", overflow="fold")
        for name in counted:
            table.add_column(name, justify="right")
        for name in ("level", "kernels", "worst |e|/B", "worst case"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            worst, level = row.worst, self.levels[row.op]
            table.add_row(
                Text(row.op, style="red" if row.failed else ""),
                *(str(count(row)) for count in counted.values()),
                Text(f"{level} {level.fraction}", style="" if level.why else "green"),
                row.whose,
                f"{worst.worst:.2f}" if worst.worst else "",
                worst.token if worst.worst else "",
            )
        failed = [Text(text) for text in self._failed()]
        reasons = Counter(r.reason for r in self.waived)
        said = [Text(f"{n} waived: {reason}") for reason, n in reasons.items()]
        said += [Text(f"{op}: the kernel declares its own order of ties") for op in self.deviations]
        said += [Text(line) for line in (*self.untaken, *self.not_run)]
        return Group(table, *failed, *said, Text(f"{self.profile}: {self.overall}"), Text(self.summary))

    def _failed(self) -> Iterator[str]:
        for alike in self.causes:
            yield from (f"{r.verdict} {r.message}\n  {self.replay(r)}" for r in alike[:REPEATED])
            if len(alike) > REPEATED:
                yield f"  and {len(alike) - REPEATED} more of {alike[0].op} like these, all of them in --json and --html"

    def junit(self) -> str:
        """JUnit XML: a suite per op, a testcase per case; a failure carries the command that repeats it."""
        name = f"porthal conform {self.backend} ({self.place}), level {self.level}"
        root = ElementTree.Element("testsuites", name=name)
        for row in self.rows:
            suite = ElementTree.SubElement(root, "testsuite", name=row.op, tests=str(len(row.results)))
            kinds = Counter[str]()
            for r in row.results:
                case = ElementTree.SubElement(suite, "testcase", classname=f"{self.backend}.{r.op}", name=r.token)
                case.set("time", f"{r.seconds:.4f}")
                if r.verdict == "PASS":
                    continue
                kind = "skipped" if not r.failed else "failure" if r.verdict.startswith("FAIL") else "error"
                kinds[kind] += 1
                said = ElementTree.SubElement(case, kind, message=_printable(f"{r.verdict}: {r.reason or r.message}"))
                if r.failed:
                    said.set("type", r.verdict)
                    said.text = _printable(f"{r.explain()}\n{self.replay(r)}")
            suite.set("failures", str(kinds["failure"]))
            suite.set("errors", str(kinds["error"]))
            suite.set("skipped", str(kinds["skipped"]))
            suite.set("time", f"{row.seconds:.4f}")
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"

    def html(self) -> str:
        """One page without external resources."""
        return report_page(self)


def _check(results: Sequence[Result]) -> None:
    """Raise TypeError or ValueError where a run writes no such results."""
    if not results:
        raise ValueError("it has no results")
    kinds = {n: get_origin(kind) or kind for n, kind in get_type_hints(Result).items()}
    words = {str: "text", float: "a number", tuple: "a list of text"}
    closed = {"verdict": get_args(Verdict), "status": STATUSES}
    for i, result in enumerate(results, 1):
        for name, kind in kinds.items():
            value = getattr(result, name)
            items = value if kind is tuple else ()
            if (type(value) is not kind and (kind, type(value)) != (float, int)) or any(type(v) is not str for v in items):
                raise TypeError(f"{name} of result {i} is {value!r}, expected {words[kind]}")
            if value not in closed.get(name, (value,)):
                raise ValueError(f"{name} of result {i} is {value!r}, expected one of {', '.join(closed[name])}")


def _printable(text: str) -> str:
    """Without the characters that XML 1.0 forbids."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
