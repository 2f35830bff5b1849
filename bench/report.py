"""What came out: pytest-benchmark's JSON, in which what it has no place for is extra, and a table for the terminal.

docs/benchmarks.md describes both.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porthal.bench.compare import Ratio
from porthal.bench.measured import SCHEMA, Measured, sustained
from porthal.bench.run import COLD, Run
from porthal.bench.speeds import Timed, machine
from porthal.bench.text import rate_text, time_text
from porthal.bench.workloads import Row
from porthal.conformance.report.receipt import receipt
from porthal.hal import Unavailable

if TYPE_CHECKING:
    from rich.console import Group


class Report:
    """A run in words and numbers."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.by_token: dict[str, list[Measured]] = {}
        for measured in run.found:
            self.by_token.setdefault(measured.token, []).append(measured)

    # -- what is wrong -----------------------------------------------------------------------------------------------

    @cached_property
    def impossible(self) -> list[Measured]:
        """What was faster than the device can be."""
        return [m for m in self.run.timed if m.impossible]

    @cached_property
    def wrong(self) -> list[Measured]:
        """Calls that were not timed because they are not right."""
        return [m for m in self.run.found if m.verdict.startswith(("FAIL", "CRASH", "TIMEOUT"))]

    @property
    def exit_code(self) -> int:
        """0 where everything is right and possible, 1 where something is not, else 2 where nothing was timed."""
        return 1 if self.impossible or self.wrong else 2 * (not self.run.timed)

    # -- JSON --------------------------------------------------------------------------------------------------------

    @cached_property
    def document(self) -> dict[str, Any]:
        """The report in pytest-benchmark's format, with what is ours under "porthal" and in each extra_info."""
        from pytest_benchmark import __version__
        from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info as machine_info
        from pytest_benchmark.utils import get_commit_info

        made = {
            "machine_info": machine_info(),
            "commit_info": get_commit_info(),
            "benchmarks": list(self._benchmarks()),
            "datetime": datetime.now(timezone.utc).isoformat(),
            "version": __version__,
            "porthal": self.facts(),
        }
        made["porthal"]["receipt"] = receipt(made)
        return made

    def json(self) -> str:
        return json.dumps(self.document, indent=1)

    def facts(self) -> dict[str, Any]:
        """What the numbers mean: where they were taken, of what, against which limits; and what was not measured."""
        run, sides = self.run, self.run.sides
        backends = {
            name: {
                "version": side.facts.environment.get(side.facts.backend.partition(":")[0], side.facts.environment["porthal"]),
                "digest": dict(side.facts.sources),
                "device": side.facts.device,
                "place": side.facts.place,
                "environment": dict(side.facts.environment),
                "threads": side.threads,
                "clock": side.clock,
            }
            for name, side in sides.items()
        }
        places = list(dict.fromkeys(side.facts.place for side in sides.values()))
        return {
            "schema": SCHEMA,
            "limits": {name: {p: sustained(r) for p, r in found.items()} for name, found in run.peaks.items()},
            "place": places[0] if len(places) == 1 else places,
            "backends": backends,
            "steps": {
                name: {str(n): {"seconds": s.seconds, "host_s": s.host, "calls": s.calls} for n, s in steps.items()}
                for name, steps in run.steps.items()
            },
            "workload": {"name": run.workload.name, "part": run.workload.part, "scale": self._scales(), **run.workload.facts},
            "unmeasured": [
                {"op": row.case.op, "token": m.token, "backend": m.backend, "why": m.why, "group": row.group}
                for row in run.workload.rows
                for m in self.by_token.get(row.case.token, ())
                if not m.samples
            ],
            "load": round(run.load, 2),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }

    def _scales(self) -> dict[str, str]:
        return {row.case.token: row.scaled for row in self.run.workload.rows if row.scaled}

    def _benchmarks(self) -> Iterator[dict[str, Any]]:
        from pytest_benchmark.stats import Stats

        for row in self.run.workload.rows:
            for m in self.by_token.get(row.case.token, ()):
                if not m.samples:
                    continue
                stats = Stats()
                for seconds in m.samples:
                    stats.update(seconds)
                name = f"{row.case.op}[{m.token}] {m.backend}"
                yield {
                    "group": row.group,
                    "name": name,
                    "fullname": f"{row.group}::{name}::{m.cache}",
                    "params": {"cache": m.cache},
                    "param": m.cache,
                    "extra_info": extra(row, m),
                    "options": {"timer": self.run.sides[m.backend].clock},
                    "stats": {**stats.as_dict(), "iterations": m.calls},
                }

    # -- for people --------------------------------------------------------------------------------------------------

    def table(self) -> Group:
        """What was measured, each call once; then the steps that these calls make up."""
        from rich.console import Group

        return Group(*self._head(), self._calls(), "", *self._steps(), *self.said())

    def _head(self) -> Iterator[str]:
        run = self.run
        for name, side in run.sides.items():
            versions = ", ".join(f"{n} {v}" for n, v in side.facts.environment.items() if n in (name, "porthal", "torch"))
            threads = f"{side.threads} thread{'s' * (side.threads > 1)}"
            yield f"{name} ({side.facts.place}, {side.facts.device}): {threads}, {side.clock}, {versions}"
        seen: set[tuple[tuple[str, float], ...]] = set()
        for found in run.peaks.values():
            limits = tuple((peak, sustained(rates)) for peak, rates in found.items())
            if limits and limits not in seen:
                seen.add(limits)
                whose = ", ".join(n for n, f in run.peaks.items() if f == found)
                yield f"limits of {whose}: " + ", ".join(f"{p} {_rate(p, r)}" for p, r in limits)
        yield from machine(run.load, [{p: sustained(r) for p, r in found.items()} for found in run.peaks.values()])
        yield f"{run.workload.name} in {run.workload.dtype}, times are medians, % is of what the named limit permits"
        yield ""

    def _calls(self) -> Any:
        from rich.table import Table

        names = list(self.run.sides)
        table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
        for head in ("op", "call", "caches", "limit"):
            table.add_column(head)
        for name in names:
            table.add_column(name, justify="right")
        for name in names[1:]:
            table.add_column(f"{name}: times as fast", justify="right")
        for token, found in self.by_token.items():
            for cache in dict.fromkeys(m.cache for m in found if m.samples):
                at = {m.backend: m for m in found if m.cache == cache and m.samples}
                first = next(iter(at.values()))
                op, _, rest = token.partition(",")
                cells = [cell(at.get(name)) for name in names]
                ratios = [compared(at.get(name), at.get(names[0])) for name in names[1:]]
                table.add_row(op, shortened(rest), cache, first.limit.bound or "-", *cells, *ratios)
        return table

    def _steps(self) -> Iterator[str]:
        """The time of a step on each backend, as far as all of its calls were measured cold."""
        groups: dict[str, list[Row]] = {}
        for row in self.run.workload.rows:
            groups.setdefault(row.group, []).append(row)
        for group, rows in groups.items():
            told = []
            for name in self.run.sides:
                cold = {m.token: m for m in self.run.timed if m.backend == name and m.cache == COLD}
                known = [row for row in rows if row.case.token in cold]
                if not known:
                    continue
                seconds = sum(row.calls * cold[row.case.token].summary.median for row in known)
                least = sum(row.calls * cold[row.case.token].limit.seconds for row in known)
                part = "" if len(known) == len(rows) else f", {len(known)} of {len(rows)} calls"
                told.append(f"{name} {time_text(seconds)} (limit {time_text(least)}{part})")
            if told and rows[0].step != "alone":
                what = "these calls of one step take" if self.run.workload.part else "one step takes"
                yield f"{group}: {what} {', '.join(told)}"
        for name, steps in self.run.steps.items():
            if (whole := self.run.workload.whole) and steps:
                best = min(steps, key=lambda threads: steps[threads].seconds)
                times = ", ".join(f"{n} thread{'s' * (n > 1)} {time_text(s.seconds)}" for n, s in steps.items())
                alone = steps[min(steps)]
                yield (
                    f"{name}: a whole step, {whole.group}, takes {times}, best with "
                    f"{best}; between its {alone.calls} ops are {time_text(alone.host)} of the host's work"
                )

    def said(self) -> Iterator[str]:
        """What the table does not show: what was scaled, what is too noisy, wrong, impossible or missing."""
        scales = self._scales()
        if scales:
            yield f"{len(scales)} of {len(self.by_token)} calls were scaled to memory and time, and count for more than one:"
            yield from (f"  {shortened(token)}: {text}" for token, text in scales.items() if token in self.by_token)
        noisy = [m for m in self.run.timed if m.summary.noisy]
        if noisy:
            yield f"{len(noisy)} of {len(self.run.timed)} times are noisy: quartiles more than 30 % of the median apart"
        for m in self.impossible:
            reached = f"reaches {m.share:.0%} of its limit {m.limit.bound}"
            yield f"impossible: {m.token} on {m.backend}, {m.cache}, {reached}: the limit or the time is wrong"
        for m in self.wrong:
            yield f"not timed: {m.token} on {m.backend}: {m.why}"
        others = [m for m in self.run.found if not m.samples and m not in self.wrong]
        for why in dict.fromkeys(m.why for m in others):
            alike = [m for m in others if m.why == why]
            yield f"not timed: {len(alike)} calls on {', '.join(dict.fromkeys(m.backend for m in alike))}: {why}"


def extra(row: Row, m: Measured) -> dict[str, Any]:
    """What pytest-benchmark's format has no place for, of one row."""
    found, limit, work = m.summary, m.limit, m.work
    assert work
    return {
        "op": row.case.op,
        "backend": m.backend,
        "token": m.token,
        "step": row.step,
        "calls": row.calls,
        "dtype": work.dtype,
        "flops": work.flops,
        "bytes": work.bytes,
        "cache": m.cache,
        "bound": limit.bound,
        "limit_s": limit.seconds,
        "share": m.share,
        "p10": found.p10,
        "ci95": list(found.ci95),
        "noise": found.noise,
        "ranks_apart": m.apart,
        "limit_noise": m.limit_noise,
        "verdict": m.verdict,
        "scaled": row.scaled,
        "kernel": m.kernel,
        "provider": m.provider,
    }


def check_format() -> None:
    """Raise Unavailable, before long work, where the package is not here whose format the JSON has."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise Unavailable("--json needs the Python package pytest-benchmark: pip install 'porthal[bench]'")


# -- how numbers are written ---------------------------------------------------------------------------------------------


def cell(m: Measured | None) -> str:
    """"12.3 µs 45 %", "12.3 µs noisy"."""
    if not m:
        return "-"
    found = m.summary
    share = "noisy" if found.noisy else f"{m.share:.0%}{'!' * m.impossible}" if m.limit.bound and not m.noisy else ""
    kernel = "" if m.kernel == "own" else f" {m.kernel}"
    return f"{time_text(found.median)} {share:>5}{kernel}".rstrip()


def compared(a: Measured | None, b: Measured | None) -> str:
    """How many times as fast the first is: "1.52x (1.48 to 1.57)"; "" where one is too noisy, or impossible."""
    if not a or not b or a.summary.noisy or b.summary.noisy or a.impossible or b.impossible:
        return ""
    first, second = (Timed(m.summary.median, *m.summary.ci95) for m in (a, b))
    return str(Ratio.of(first, second))


def shortened(rest: str) -> str:
    """A token's sizes, without what a reader of times does not ask for."""
    hidden = ("theta=", "eps=", "scale=", "block_size=", "distinct=", "n_group=", "topk_group=", "-")
    parts = [p for p in rest.split(",")[:-1] if not p.startswith(hidden)]
    return " ".join(p.removeprefix("batch=") for p in parts)


def _rate(peak: str, rate: float) -> str:
    return rate_text(rate, "B/s" if peak in ("dram", "l3", "l2", "copy") else "OP/s")
