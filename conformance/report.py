"""What a run found: JSON and JUnit for machines, a table for the terminal, one page for people.

docs/report-schema.md describes the JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from porthal.conformance.cases import Case
from porthal.conformance.discrepancies import named_for
from porthal.conformance.levels import Reached, overall, reached
from porthal.conformance.verdicts import Judgement
from porthal.conformance.waivers import Waiver, verify, waive, waivers
from porthal.hal import Backend, UsageError, contracts
from porthal.hal.binding import Choice

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

SCHEMA = 2  # of the JSON
SUITE = 2  # of the plan of cases and the rules of judgement
MOST = 1e300  # stands for an infinite figure
NEUTRAL = ("PASS", "WAIVED", "UNCLAIMED")
STATUSES = ("own", "inherited", "composed", "fallback", "missing")


@dataclass(frozen=True)
class Result:
    """One case's verdict, and whose kernel it speaks of.

    foreign  of a composition: the ops in it that are not the chip's own
    tie      the kernel's declared order of ties
    waived   what the verdict was before a waiver with this `reason` made it WAIVED
    """

    token: str
    op: str
    dtype: str
    verdict: str
    message: str
    status: str
    owner: str
    provider: str
    worst: float
    at: str
    ratio: float
    z: float
    note: str
    seconds: float
    foreign: tuple[str, ...] = ()
    tie: str = "lowest"
    waived: str = ""
    reason: str = ""

    @classmethod
    def of(
        cls, case: Case, judged: Judgement, choice: Choice | None, seconds: float, foreign: tuple[str, ...] = ()
    ) -> Result:
        return cls(
            case.token,
            case.op,
            next((d for _, d in case.dtypes), "fixed"),
            judged.verdict,
            judged.message,
            choice.status if choice else "missing",
            choice.owner if choice else "",
            choice.provider if choice else "",
            _finite(judged.worst),
            judged.at,
            _finite(judged.ratio),
            _finite(judged.z),
            judged.note,
            round(seconds, 4),
            foreign,
            choice.tie if choice else "lowest",
        )

    @property
    def failed(self) -> bool:
        return self.verdict not in NEUTRAL

    @property
    def tested(self) -> bool:
        return self.verdict not in ("UNCLAIMED", "WAIVED", "NOT_JUDGED")

    @property
    def own(self) -> bool:
        """Whether it speaks of the chip alone: its own kernel, or a composition of nothing but these."""
        return self.status == "own" or (self.status == "composed" and not self.foreign)

    def explain(self) -> str:
        """The verdict in words."""
        whose = {
            "own": f"{self.owner}'s own kernel",
            "inherited": f"the kernel inherited from {self.owner}",
            "composed": "the default composition of other ops",
        }.get(self.status, "no kernel")
        lines = [f"{self.verdict}: {self.op} by {whose}" + (f" ({self.provider})" if self.provider else "")]
        if self.message:
            lines.append(self.message)
        if self.worst:
            lines.append(
                f"The largest error is {self.worst:.3g} of its budget, at {self.at}; "
                f"all together it is {self.ratio:.3g} times an ideal machine's."
            )
        if self.note:
            lines.append(self.note)
        lines += [f"Named for discrepancy {d.number}: {d.what} ({d.sources})" for d in named_for(self.token)]
        if self.waived:
            lines.append(f"Waived was {self.waived}: {self.reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """One op's line of the summary."""

    op: str
    results: Sequence[Result]

    @cached_property
    def verdicts(self) -> Counter[str]:
        return Counter(r.verdict for r in self.results)

    @property
    def failed(self) -> int:
        return sum(r.failed for r in self.results)

    @property
    def passed(self) -> int:
        return self.verdicts["PASS"]

    @property
    def unclaimed(self) -> int:
        return self.verdicts["UNCLAIMED"]

    @property
    def waived(self) -> int:
        return self.verdicts["WAIVED"]

    @property
    def whose(self) -> str:
        """Own first: "12 own, 8 inherited"."""
        count = Counter(r.status for r in self.results if r.tested)
        return ", ".join(f"{count[s]} {s}" for s in STATUSES if count[s])

    @property
    def worst(self) -> Result:
        return max(self.results, key=lambda r: r.worst)

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.results)


@dataclass(frozen=True)
class Facts:
    """What a report says of a backend, which may live in another process."""

    backend: str
    place: str
    environment: Mapping[str, str]
    waivers: tuple[Waiver, ...]

    @classmethod
    def of(cls, backend: Backend) -> Facts:
        return cls(str(backend), backend.place, environment(backend), waivers(backend))


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
        """The report of a run, after the waivers of the backend's own package."""
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
        """The report that `json` wrote; UsageError where the text is none of this schema."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"no JSON: {error}") from None
        if not isinstance(data, dict) or "schema" not in data or "results" not in data:
            raise UsageError("no conformance report: it lacks schema and results")
        if data["schema"] != SCHEMA:
            raise UsageError(
                f"a report of schema {data['schema']}, expected {SCHEMA}: write it again with this porthal"
            )
        try:
            results = tuple(Result(**r | {"foreign": tuple(r["foreign"])}) for r in data["results"])
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
            raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
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
        failed = [Text(f"{r.verdict} {r.message}\n  {self.replay(r)}") for r in self.failures]
        reasons = Counter(r.reason for r in self.waived)
        said = [Text(f"{n} waived: {reason}") for reason, n in reasons.items()]
        said += [Text(f"{op}: the kernel declares its own order of ties") for op in self.deviations]
        return Group(table, *failed, *said, Text(f"{self.profile}: {self.overall}"), Text(self.summary))

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
        from porthal.conformance.page import report_page

        return report_page(self)


def _finite(x: float) -> float:
    """JSON knows neither infinity nor NaN."""
    return float(np.nan_to_num(x, nan=0.0, posinf=MOST, neginf=-MOST))


def _printable(text: str) -> str:
    """Without the characters that XML 1.0 forbids."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def replay_command(token: str, backend: str, level: str = "bring-up", place: str = "hardware") -> str:
    """The command that repeats a case: same backend, same strictness, same device."""
    options = f" --level {level}" * (level != "bring-up") + " --emulated" * (place == "emulated device")
    return f"porthal replay '{token}' --backend {backend}{options}"


def environment(backend: Backend) -> dict[str, str]:
    """Versions of what took part, the packages that the backend needs among them."""
    package = sys.modules.get(type(backend).__module__.rpartition(".")[0])
    needed = {}
    for name in getattr(package, "requires", ()):
        with suppress(importlib.metadata.PackageNotFoundError):  # a module whose package has another name
            needed[name] = importlib.metadata.version(name)
    return needed | {
        "porthal": sys.modules["porthal"].__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }
