"""What a run found: JSON and JUnit for machines, a table for the terminal, one page for people.

docs/report-schema.md describes the JSON.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints
from xml.etree import ElementTree

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.profiles import MODEL
from porthal.conformance.judgement.measures import FEW
from porthal.conformance.level import SUITE
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.files import parsed, why
from porthal.conformance.report.page import report_page
from porthal.conformance.report.reached import Reached, overall, parts_of, reached
from porthal.conformance.report.receipt import Reproduced, check_receipt, origin, receipt
from porthal.conformance.report.results import (
    NOT_RUN,
    Result,
    Row,
    counted,
    figure,
    replay_command,
    untried,
    verify_results,
)
from porthal.conformance.report.waivers import Waiver, expired, verify, waive
from porthal.conformance.verdicts import NOT_READ
from porthal.hal import Backend, UsageError, operators
from porthal.hal.backend import NOT_TAKEN

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = 6  # of the JSON
LEGEND = (
    "GLM-5: passed by own kernels, of the cases in its dims and bfloat16; a level needs all, and no failure of the op anywhere"
)
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
    device: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    unasked: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()
    date: str = ""
    command: str = ""
    bounds: str = ""
    model: str = MODEL
    reproduced: Reproduced | None = None
    schema: int = SCHEMA
    suite: int = SUITE

    @classmethod
    def of(
        cls,
        backend: Backend | Facts,
        level: str,
        results: Sequence[Result],
        profile: str = "inference",
        bounds: str = "",
        model: str = MODEL,
    ) -> Report:
        """The report of a run, with the waivers of the backend's own package applied."""
        facts = backend if isinstance(backend, Facts) else Facts.of(backend)
        results = tuple(waive(result, facts.waivers) for result in results)
        ops = dict.fromkeys(r.op for r in results)
        versions = {op: operators()[op].version for op in ops}
        levels = {op: reached(op, level, results, model) for op in ops}
        return cls(
            backend=facts.backend,
            place=facts.place,
            level=level,
            results=results,
            environment=facts.environment,
            contracts=versions,
            levels=levels,
            waivers=facts.waivers,
            profile=profile,
            device=facts.device,
            sources=facts.sources,
            unasked=facts.unasked,
            untried=tuple(untried(facts.kernels, results)),
            bounds=bounds,
            model=model,
            date=datetime.now().astimezone().isoformat(timespec="seconds"),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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

    @cached_property
    def causes(self) -> list[list[Result]]:
        """The failures, grouped by op, verdict and message without its numbers; the smallest case of each group first."""
        found: dict[tuple[str, str, str], list[Result]] = {}
        for r in self.failures:
            found.setdefault((r.op, r.verdict, _NUMBERS.sub("#", r.message)), []).append(r)
        return [sorted(alike, key=_size) for alike in found.values()]

    def parts_at_fault(self, op: str) -> list[str]:
        """The ops that a composite is made of and that have failures of their own."""
        failed = {r.op for r in self.failures} - {op}
        return [part for part in parts_of(op) if part in failed]

    @property
    def waived(self) -> list[Result]:
        return [r for r in self.results if r.verdict == "WAIVED"]

    def expired_waivers(self) -> list[str]:
        """The plugin's waivers that hold no more."""
        return expired(self.waivers)

    def wrong_waivers(self) -> list[str]:
        """What is wrong with the plugin's waivers, as this run shows."""
        return verify(self.waivers, self.results)

    @property
    def deviations(self) -> list[str]:
        """Ops whose kernel declares an order of ties other than the contract's."""
        return list(dict.fromkeys(r.op for r in self.results if r.tie == "any"))

    @property
    def unpromised(self) -> list[str]:
        """Of which ops it is promised that a row's bits do not depend on the other rows, and that the others may."""
        ran = [row for row in self.rows if row.determinism]
        promised = [row.op for row in ran if row.determinism == "any batch"]
        if not promised:
            return ["not promised by any kernel: that the bits of a row do not depend on the other rows"] if ran else []
        return [
            f"the bits of a row do not depend on the other rows: promised by {', '.join(promised)}"
            + (f", not by {len(ran) - len(promised)} other ops" if len(promised) < len(ran) else "")
        ]

    @property
    def not_run(self) -> list[str]:
        """Which inherited cases were not run again, and why."""
        notes = Counter(r.note.partition(": ")[2] for r in self.results if r.note.startswith(NOT_RUN))
        how = "set PORTHAL_CACHE to an empty folder to run them"
        return [f"{n} cases were {NOT_RUN}: {why.replace('passed it', 'passed them')}; {how}" for why, n in notes.items()]

    @property
    def too_few(self) -> list[str]:
        """Which statistics were not judged in cases that passed, because their results have too few numbers for them."""
        counts = Counter(test for r in self.results if r.verdict == "PASS" for test in r.few)
        found = [f"{words} in {counts[test]}" for test, words in FEW.items() if counts[test]]
        return [f"not judged in passed cases, of too few numbers: {', '.join(found)}"] if found else []

    @property
    def left_out(self) -> list[str]:
        """What the backend's arrays make meaningless: cases, and what no case is asked."""
        reasons = Counter(r.message for r in self.results if r.verdict == "LEFT_OUT")
        return [*(f"{n} left out: {why}" for why, n in reasons.items()), *(f"not asked: {what}" for what in self.unasked)]

    @property
    def unread(self) -> list[str]:
        """What of operands no case could read back before and after a call."""
        kinds = Counter((r.op, r.note.partition(f"{NOT_READ}: ")[2]) for r in self.results if NOT_READ in r.note)
        what = f"with what is {NOT_READ} beyond its logical form, so that nobody knows whether it changed"
        return [f"{n} cases of {op} {what}: {kind}" for (op, kind), n in kinds.items()]

    @property
    def untaken(self) -> list[str]:
        """Which data own kernels say that they do not take."""
        messages = [r.message for r in self.results if r.verdict == "UNCLAIMED" and NOT_TAKEN in r.message]
        said = Counter((m.partition(" on ")[0], m.partition("the kernel takes ")[2]) for m in messages)
        return [f"{n} unclaimed for their data: {op} takes {what}" for (op, what), n in said.items()]

    @property
    def unclaimed(self) -> list[str]:
        """Calls that no kernel takes, for another reason than their data: of each op how many, the first and why."""
        found: dict[str, list[Result]] = {}
        for r in self.results:
            if r.verdict == "UNCLAIMED" and NOT_TAKEN not in r.message:
                found.setdefault(r.op, []).append(r)
        return [f"{len(rs)} of {op} unclaimed, {rs[0].token} for one: {rs[0].message}" for op, rs in found.items()]

    @property
    def never_ran(self) -> list[str]:
        """Own kernels that the backend states, and of which this run says nothing."""
        few = len(self.untried) == 1
        words = "1 own kernel that no case ran" if few else f"{len(self.untried)} own kernels that no case ran"
        return [f"{words}: {', '.join(self.untried)}"] if self.untried else []

    @property
    def remarks(self) -> list[str]:
        """What the figures do not say."""
        untested = *self.unread, *self.untaken, *self.unclaimed, *self.never_ran, *self.not_run
        return [*self.unpromised, *self.too_few, *self.left_out, *untested]

    @property
    def exit_code(self) -> int:
        """0 all good, 1 something failed, 2 nothing of the chip's own was tested."""
        if self.failures:
            return 1
        return 0 if any(r.tested and r.own for r in self.results) else 2

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def summary(self) -> str:
        """One line: counts by verdict, and of those that passed, by whose kernel."""
        verdicts = Counter(r.verdict for r in self.results)
        whose = counted(self.passed)
        others = ", ".join(f"{n} {v}" for v, n in sorted(verdicts.items()) if v != "PASS")
        said = f"{verdicts['PASS']} of {len(self.results)} cases passed" + (f" ({whose})" if whose else "")
        said += f"; {others}" if others else ""
        return f"nothing of {self.backend} was tested yet: {said}" if self.exit_code == 2 else said

    @property
    def passed(self) -> Counter[str]:
        """Passed cases by whose kernel ran."""
        return Counter(r.status for r in self.results if r.verdict == "PASS")

    @property
    def overall(self) -> str:
        """The worst level over the profile, and the place unless that is hardware."""
        return overall(self.levels, self.level, self.profile) + ("" if self.on_hardware else f" ({self.place})")

    @property
    def circumstances(self) -> str:
        """When, on which device, with which versions and sources, in one line."""
        made = (f"{name} {self.environment.get(name, '')}".strip() + f" ({digest})" for name, digest in self.sources.items())
        return "; ".join(part for part in (self.date, self.device, ", ".join(made), f"receipt {self.receipt}") if part)

    @property
    def on_hardware(self) -> bool:
        return self.place == "hardware"

    def replay(self, result: Result) -> str:
        """The command that repeats exactly this case."""
        return replay_command(result.token, self.backend, self.level, self.place, self.bounds)

    # -- forms -------------------------------------------------------------------------------------------------------

    def json(self) -> str:
        return json.dumps(self._object | {"receipt": self.receipt}, indent=1)

    @cached_property
    def _object(self) -> dict[str, Any]:
        derived = {"overall": self.overall, "summary": self.summary, "exit_code": self.exit_code}
        text = json.dumps(asdict(self) | derived, default=str, allow_nan=False)  # str: a waiver's day
        return dict(json.loads(text))

    @cached_property
    def receipt(self) -> str:
        """A digest of all that the JSON says."""
        return receipt(self._object)

    @property
    def origin(self) -> str:
        """Who stands for it: self-reported, or reproduced by whom."""
        return origin(self.reproduced)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `json` wrote; UsageError where the text is not of this schema."""
        return cls.of_object(parsed(text))

    @classmethod
    def of_object(cls, data: Mapping[str, Any]) -> Report:
        """The same of what the text holds."""
        if "schema" not in data or "results" not in data:
            raise UsageError("not a conformance report: it lacks schema and results")
        if data["schema"] != SCHEMA:
            raise UsageError(
                f"a report of schema {data['schema']}, expected {SCHEMA}: write it again with this porthal"
            )
        try:
            results = tuple(Result.read(r) for r in data["results"])
            verify_results(results)
            levels = {op: Reached(**r) for op, r in data["levels"].items()}
            known = tuple(
                Waiver(**w | {"expires": w["expires"] and date.fromisoformat(w["expires"])}) for w in data["waivers"]
            )
            read = {"results": results, "levels": levels, "waivers": known}
            read |= {name: tuple(data[name]) for name in ("unasked", "untried")}
            seen = Reproduced.read(data["reproduced"])
            report = cls(**{f.name: data[f.name] for f in fields(cls)} | read | {"reproduced": seen})
            for name, hint in get_type_hints(cls).items():
                if name == "reproduced":
                    continue
                kind, value = get_origin(hint) or hint, getattr(report, name)
                if type(value) is not (dict if kind is Mapping else kind):
                    raise TypeError(f"{name} is {value!r}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"a damaged report ({why(error)}): write it again") from None
        check_receipt(data)
        return report

    def table(self) -> Group:
        """Per op: what passed and failed, the level, whose kernels, the worst error; then the failures. Fits 80 columns."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("op", no_wrap=True)
        for name in ("passed", "failed"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("level", overflow="fold")
        table.add_column("GLM-5", justify="right", no_wrap=True)
        table.add_column("cases", overflow="fold")
        table.add_column("|e|/B", justify="right", no_wrap=True)
        for row in self.rows:
            worst, level = row.worst.worst, self.levels[row.op]
            table.add_row(
                Text(row.op, style="red" if row.failed else ""),
                f"{row.passed}/{len(row.results)}",
                str(row.failed or ""),
                Text(str(level), style="" if level.why else "green"),
                level.fraction,
                row.whose,
                figure(worst) if worst else "",
            )
        head = f"{self.backend} ({self.place}), level {self.level}", self.circumstances
        lines = [LEGEND, *self._failed(), *self._nearest()]
        lines += [f"{n} waived: {reason}" for reason, n in Counter(r.reason for r in self.waived).items()]
        lines += [f"waivers.toml: {sentence}" for sentence in self.expired_waivers()]
        lines += [f"{op}: the kernel declares its own order of ties" for op in self.deviations]
        lines += self.remarks
        lines += [f"{self.profile}: {self.overall}", self.summary]
        return Group(*map(Text, head), table, *map(Text, lines))

    def _failed(self) -> Iterator[str]:
        for first, *others in self.causes:
            cases = f"{len(others) + 1} cases" if others else "1 case"
            yield f"{first.verdict} in {cases} of {first.op}: {first.message}"
            if first.status == "composed" and (parts := self.parts_at_fault(first.op)):
                yield f"  {first.op} is composed of {', '.join(parts)}, which failed as well: begin there"
            yield f"  {self.replay(first)}"

    def _nearest(self) -> Iterator[str]:
        """The case of an own kernel that passed with the largest error."""
        passed = [r for r in self.results if r.own and r.verdict == "PASS" and r.worst]
        if passed and not self.failures:
            nearest = max(passed, key=lambda r: r.worst)
            yield f"nearest to its error budget B, at {figure(nearest.worst)} of it:"
            yield f"  {self.replay(nearest)}"

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


def _size(result: Result) -> tuple[int, int]:
    """By which cases are ordered: their elements, and then the length of their tokens."""
    return elements(Case.from_token(result.token)), len(result.token)


def _printable(text: str) -> str:
    """Without the characters that XML 1.0 forbids."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
