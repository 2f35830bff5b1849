"""What a run found: JSON for machines, a table for the terminal, one page for people."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from porthal.conformance.cases import Case
from porthal.conformance.verdicts import Judgement
from porthal.hal import Backend, contracts
from porthal.hal.binding import Choice

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = 1  # of the JSON
SUITE = 1  # of the plan of cases and the rules of judgement
NEUTRAL = ("PASS", "WAIVED", "UNCLAIMED")
STATUSES = ("own", "inherited", "composed", "fallback", "missing")


@dataclass(frozen=True)
class Result:
    """One case's verdict, and whose kernel it speaks of."""

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

    @classmethod
    def of(cls, case: Case, judged: Judgement, choice: Choice | None, seconds: float) -> Result:
        return cls(
            case.token,
            case.op,
            next((d for _, d in case.dtypes), "fixed"),
            judged.verdict,
            judged.message,
            choice.status if choice else "missing",
            choice.owner if choice else "",
            choice.provider if choice else "",
            float(judged.worst),
            judged.at,
            float(judged.ratio),
            float(judged.z),
            judged.note,
            round(seconds, 4),
        )

    @property
    def failed(self) -> bool:
        return self.verdict not in NEUTRAL

    @property
    def tested(self) -> bool:
        return self.verdict not in ("UNCLAIMED", "WAIVED", "NOT_JUDGED")

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
class Report:
    """A run's results with all that is needed to understand them later."""

    backend: str
    place: str
    level: str
    results: tuple[Result, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    contracts: Mapping[str, int] = field(default_factory=dict)
    schema: int = SCHEMA
    suite: int = SUITE

    @classmethod
    def of(cls, backend: Backend, level: str, results: Sequence[Result]) -> Report:
        ops = dict.fromkeys(r.op for r in results)
        versions = {op: contracts()[op].version for op in ops}
        return cls(str(backend), backend.place, level, tuple(results), environment(backend), versions)

    @property
    def rows(self) -> list[Row]:
        ops = dict.fromkeys(r.op for r in self.results)
        return [Row(op, [r for r in self.results if r.op == op]) for op in ops]

    @property
    def failures(self) -> list[Result]:
        return [r for r in self.results if r.failed]

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
        passed = Counter(r.status for r in self.results if r.verdict == "PASS")
        whose = ", ".join(f"{passed[s]} {s}" for s in STATUSES if passed[s])
        others = ", ".join(f"{n} {v}" for v, n in sorted(verdicts.items()) if v != "PASS")
        if not any(r.tested for r in self.results):
            return f"nothing was tested on {self.backend}" + (f": {others}" if others else "")
        return f"{verdicts['PASS']} of {len(self.results)} cases passed ({whose})" + (f"; {others}" if others else "")

    def replay(self, result: Result) -> str:
        """The command that repeats exactly this case."""
        return replay_command(result, self.backend)

    # -- forms -------------------------------------------------------------------------------------------------------

    def json(self) -> str:
        return json.dumps(asdict(self) | {"exit_code": self.exit_code}, indent=1, default=str)

    @classmethod
    def from_json(cls, text: str) -> Report:
        data = json.loads(text)
        data.pop("exit_code")
        return cls(**data | {"results": tuple(Result(**r) for r in data["results"])})

    def table(self) -> RenderableType:
        """Per op: cases, verdicts, whose kernels, the worst error with its token; then the failures."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.backend} ({self.place}), level {self.level}")
        for name in ("op", "cases", "passed", "failed", "unclaimed", "kernels", "worst |e|/B", "worst case"):
            table.add_column(name, justify="right" if name in ("cases", "passed", "failed", "unclaimed") else "left",
                             overflow="fold")  # fmt: skip
        for row in self.rows:
            worst = row.worst
            table.add_row(
                Text(row.op, style="red" if row.failed else ""),
                *(str(n) for n in (len(row.results), row.passed, row.failed, row.unclaimed)),
                row.whose,
                f"{worst.worst:.2f}" if worst.worst else "",
                worst.token if worst.worst else "",
            )
        failed = [Text(f"{r.verdict} {r.message}\n  {self.replay(r)}") for r in self.failures]
        return Group(table, *failed, Text(self.summary))

    def html(self) -> str:
        """One page without external resources."""
        from jinja2 import Environment

        text = (Path(__file__).parent / "templates" / "report.html").read_text(encoding="utf-8")
        template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
        columns = list(dict.fromkeys(r.dtype for r in self.results))
        return template.render(report=self, columns=columns, cells={c: dict(self._cells(c)) for c in columns})

    def _cells(self, dtype: str) -> Iterator[tuple[str, Row]]:
        for row in self.rows:
            chosen = [r for r in row.results if r.dtype == dtype]
            if chosen:
                yield row.op, Row(row.op, chosen)


def replay_command(result: Result, backend: str) -> str:
    return f"porthal replay '{result.token}' --backend {backend}"


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
