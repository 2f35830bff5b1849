"""The score: every planted defect against the cases of its op, every honest variant against as many seeds."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypeVar

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import captured, cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.outcome import BY_SUITE
from porthal.conformance.level import STANDARD
from porthal.conformance.report.results import Result
from porthal.conformance.runner.check import check
from porthal.conformance.runner.workers import ends_with
from porthal.conformance.selftest import compiled
from porthal.conformance.selftest.planting import defects, plantable, planted, unplanted
from porthal.conformance.selftest.variants import Variant, variants
from porthal.hal import UsageError, contracts

if TYPE_CHECKING:
    from rich.console import Group

LEVEL = STANDARD.name
SEEDS = 20
CHEAP = 2**17  # elements of a case that honest variants meet at every eighth seed
COSTLY = 2**20  # and of one that they meet at none: a plain run at this level has them all
QUICK_SEEDS = 2


@dataclass(frozen=True)
class Trial:
    """A defect in one dtype, or a variant at one seed, and what the suite said.

    token    of the case that failed first, "" where none did
    verdict  its verdict; NOT_JUDGED counts as no catch and no pass
    """

    op: str
    name: str
    dtype: str
    seed: int
    token: str
    verdict: str
    message: str
    cases: int
    seconds: float


class OfOp(Protocol):
    """What came of a task: it is about one op."""

    @property
    def op(self) -> str: ...


Todo = TypeVar("Todo")
Done = TypeVar("Done", bound=OfOp)
Progress = Callable[[int, int, str], None]  # tasks done, of how many, and the op of the last
Task = tuple[str, str, str, int]  # "defect" or "variant", its key, dtype, seed


def plan(op: str, dtype: str = "", source: str = "", level: str = LEVEL) -> list[Case]:
    """The cases of an op that run a kernel, the cheapest first; those that are captured where that is what is edited."""
    planned = captured if source == "capture" else cases
    found = [c for c in planned(contracts()[op], level, [dtype] if dtype else None) if not c.fault]
    return sorted(found, key=elements)


def first_failing(
    chosen: Sequence[Case], bindings: Bindings, level: str = LEVEL, unjudged: bool = False, source: str = ""
) -> tuple[Result | None, int]:
    """The first case that fails, and how many ran a kernel up to it; NOT_JUDGED is a failure where `unjudged` says so, and so
    is what was raised in the suite itself, at which no kernel was. Of an edited source in C++ only its own kernels run."""
    tried = 0
    for case in chosen:
        result = check(case, bindings, level)
        if source in compiled.SOURCES and result.status == "composed":
            continue
        tried += result.verdict != "UNCLAIMED"
        if result.failed and (unjudged or not (result.verdict == "NOT_JUDGED" or BY_SUITE in result.message)):
            return result, tried
    return None, tried


def attempt(task: Task) -> Trial:
    """Run one task in this process: up to the first case that fails."""
    kind, key, dtype, seed = task
    started = time.perf_counter()
    op, _, name = key.partition("/")
    if kind == "defect":
        defect = next(d for d in defects() if d.key == key)
        source, bindings = defect.source, Bindings(planted(defect))
        chosen: Sequence[Case] = plan(op, dtype, source)
    else:
        variant = next(v for v in variants() if v.key == key)
        variant.settle()
        source, bindings = variant.source, _bindings(variant)
        chosen = sampled(op, seed, source)
    result, tried = first_failing(chosen, bindings, unjudged=kind == "variant", source=source)
    found = (result.token, result.verdict, result.message) if result else ("", "", "")
    return Trial(op, name, dtype, seed, *found, tried, time.perf_counter() - started)


def sampled(op: str, seed: int, source: str = "") -> list[Case]:
    """A variant's cases at one seed: of the cheap ones every eighth, of others every twentieth: all have their turn."""
    found = [c for c in plan(op, source=source) if elements(c) <= COSTLY]
    if source == "capture":
        return [replace(c, seed=seed) for c in found]
    cheap = [c for c in found if elements(c) <= CHEAP]
    costly = found[len(cheap) :]
    return [replace(c, seed=seed) for c in (*cheap[seed % 8 :: 8], *costly[seed::SEEDS])]


@cache
def _bindings(variant: Variant) -> Bindings:
    return Bindings(variant.make())


# -- the whole ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What came of all trials; `unplanted` says in one sentence what could not be tried."""

    caught: tuple[Trial, ...]
    passed: tuple[Trial, ...]
    equivalent: tuple[str, ...]
    seconds: float
    unplanted: str = ""

    @property
    def escaped(self) -> list[Trial]:
        return [t for t in self.caught if not t.token]

    @property
    def alarms(self) -> list[Trial]:
        return [t for t in self.passed if t.token]

    @property
    def idle(self) -> list[Trial]:
        """Trials that ran no case at all: no evidence of anything."""
        return [t for t in (*self.caught, *self.passed) if not t.cases]

    @property
    def exit_code(self) -> int:
        return int(bool(self.escaped or self.alarms or self.idle))

    @property
    def summary(self) -> str:
        return (
            f"{len(self.caught) - len(self.escaped)} of {len(self.caught)} planted defects caught, "
            f"{len(self.alarms)} false alarms in {len(self.passed)} honest runs "
            f"({sum(t.cases for t in self.passed)} cases), {len(self.equivalent)} equivalent; "
            f"level {LEVEL}, {self.seconds:.0f} s"
        ) + (f"; {self.unplanted}" if self.unplanted else "")

    def table(self) -> Group:
        """Per op: defects caught of planted by dtype, equivalents, honest runs passed."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("op", no_wrap=True)
        for name in ("float32", "bfloat16", "fixed", "equivalent", "honest runs", "cases"):
            table.add_column(name, justify="right")
        for op in dict.fromkeys(t.op for t in (*self.caught, *self.passed)):
            mine = [t for t in self.caught if t.op == op]
            honest = [t for t in self.passed if t.op == op]
            cells = [share([bool(t.token) for t in mine if t.dtype == d]) for d in ("float32", "bfloat16", "")]
            same = sum(k.startswith(f"{op}/") for k in self.equivalent)
            figures = share([not t.token for t in honest]), str(sum(t.cases for t in honest))
            table.add_row(op, *cells, str(same or ""), *figures)
        said = [Text(f"ESCAPED {t.op}/{t.name} {t.dtype} after {t.cases} cases") for t in self.escaped]
        said += [Text(f"FALSE ALARM {t.op}/{t.name}: {t.verdict} {t.message}\n  {t.token}") for t in self.alarms]
        said += [Text(f"NOTHING TESTED {t.op}/{t.name} {t.dtype}") for t in self.idle]
        return Group(Text(f"planted defects and honest variants, level {LEVEL}"), table, *said, Text(self.summary))

    @classmethod
    def from_json(cls, text: str) -> Score:
        """The score that `json` wrote."""
        data = json.loads(text)
        caught, passed = (tuple(Trial(**t) for t in data[name]) for name in ("caught", "passed"))
        return cls(caught, passed, tuple(data["equivalent"]), data["seconds"], data["unplanted"])

    def json(self) -> str:
        """Every trial: each defect with the case that caught it first."""
        return json.dumps(asdict(self) | {"level": LEVEL, "summary": self.summary, "exit_code": self.exit_code}, indent=1)


def share(good: Sequence[bool]) -> str:
    return f"{sum(good)}/{len(good)}" if good else ""


def check_ops(ops: Sequence[str]) -> None:
    """UsageError where one is not an op."""
    if unknown := [op for op in ops if op not in contracts()]:
        raise UsageError(f"unknown op {unknown[0]!r}: known are {', '.join(contracts())}")


def tasks(ops: Sequence[str] = (), quick: bool = False) -> list[Task]:
    """What there is to try; `quick` takes one defect of each op and class, and two seeds."""
    check_ops(ops)
    chosen = [d for d in plantable(ops) if not d.equivalent]
    if quick:
        chosen = list({(d.op, d.kind): d for d in reversed(chosen)}.values())
    found: list[Task] = [("defect", d.key, dtype, 0) for d in chosen for dtype in d.scored]
    honest = [v for v in variants() if not ops or v.op in ops]
    seeds = QUICK_SEEDS if quick else SEEDS
    return found + [("variant", v.key, "", seed) for seed in range(seeds) for v in honest]


def self_test(
    ops: Sequence[str] = (),
    quick: bool = False,
    progress: Progress | None = None,
    workers: int = 0,
) -> Score:
    """Try everything in as many processes as there are processors (`workers` of them)."""
    started = time.perf_counter()
    todo = tasks(ops, quick)
    done = [(task[0], trial) for task, trial in zip(todo, spread(attempt, todo, progress, workers))]
    return Score(
        tuple(trial for kind, trial in done if kind == "defect"),
        tuple(trial for kind, trial in done if kind == "variant"),
        tuple(d.key for d in plantable(ops) if d.equivalent),
        time.perf_counter() - started,
        unplanted(ops),
    )


def spread(
    run: Callable[[Todo], Done], todo: Sequence[Todo], progress: Progress | None, workers: int
) -> list[Done]:
    """What `run` makes of each task, in as many processes as there are processors (`workers` of them)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), context, _alone, (os.getpid(),)) as pool:
        running = [pool.submit(run, task) for task in todo]
        try:
            for count, future in enumerate(as_completed(running), 1):
                if progress:
                    progress(count, len(todo), future.result().op)
        except BaseException:  # what a worker is at may take minutes
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
    return [future.result() for future in running]


def _alone(parent: int) -> None:
    ends_with(parent)
    import torch

    torch.set_num_threads(1)
