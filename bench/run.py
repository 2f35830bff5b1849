"""Backends side by side: each call judged on every one of them, then timed in turns, A B C A B C, until that tells enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from porthal.bench.call import Judged
from porthal.bench.measured import Kept, Measured
from porthal.bench.roofline import CACHES, needed
from porthal.bench.statistics import LEAST, Summary
from porthal.bench.step import StepTime
from porthal.bench.worker import Backstage, Side
from porthal.bench.workloads import Workload
from porthal.conformance.cases.case import Case
from porthal.conformance.verdicts import Judgement
from porthal.hal import UsageError, probe

HOST = "cpu"  # the backend that knows the limits of the processor, whoever computes on it
SECONDS = 240.0
LONGEST, SHORTEST = 4.0, 0.3  # seconds for the samples of one call, of all backends
SAMPLE = 2e-3  # seconds of a sample of warm calls
ROWS = 3  # samples of a call that is slower than all that
FIRST = 5  # samples of every peak before anything else
COLD, WARM = "cold", "warm"

Progress = Callable[[int, int, str, float], None]


@dataclass
class Run:
    """What a run found: of each call, backend and state of the caches."""

    workload: Workload
    threads: int
    sides: dict[str, Side] = field(default_factory=dict)
    found: list[Measured] = field(default_factory=list)
    peaks: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    steps: dict[str, dict[int, StepTime]] = field(default_factory=dict)  # of the demo checkpoint, by number of threads

    @property
    def timed(self) -> list[Measured]:
        return [m for m in self.found if m.samples]


def bench(
    workload: Workload,
    backends: Sequence[str],
    threads: int,
    seconds: float = SECONDS,
    journal: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Every call of a workload on every backend, each in a process of its own with so many threads, within about so many
    seconds; what there was no time for is among what was found, without samples.

    `journal` keeps each measurement as it comes, and with `resume` those already there are not taken again.
    Raises UsageError where backends are named twice, and what a backend raises that does not start.
    """
    if twice := [name for name in backends if list(backends).count(name) > 1]:
        raise UsageError(f"backend {twice[0]} is given twice: give each once")
    run = Run(workload, threads)
    with ExitStack() as stack:
        stage = _Stage(run, stack)
        for name in backends:
            stage.start(name)
        stage.find_limits()
        head = {
            "workload": workload.name,
            "dtype": workload.dtype,
            "threads": threads,
            "backends": {n: {"sources": dict(s.facts.sources), "device": s.facts.device} for n, s in run.sides.items()},
        }
        kept = stack.enter_context(closing(Kept(journal, head, resume))) if journal else None
        cases = list(dict.fromkeys(row.case for row in workload.rows))
        run.found += kept.known if kept else []
        end = time.monotonic() + seconds
        known = {(m.token, m.backend) for m in run.found}
        cases = [c for c in cases if any((c.token, name) not in known for name in backends)]
        for n, case in enumerate(cases):
            left = end - time.monotonic()
            started = time.monotonic()
            for measured in stage.measured(case, left / (len(cases) - n)) if left > 0 else stage.late(case):
                run.found.append(measured)
                if kept:
                    kept.add(measured)
            if progress:
                spent = time.monotonic() - started
                progress(n + 1, len(cases), case.op, min(max(left - spent, 0.0), spent * (len(cases) - n - 1) * 4))
        if workload.whole:
            run.steps = {name: _steps(name, workload, threads) for name in backends}
    return run


def _steps(name: str, workload: Workload, most: int) -> dict[int, StepTime]:
    """The whole step on a backend with 1, 2, 4, ... threads, each in a process of its own."""
    found = {}
    for threads in sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most}):
        with closing(Backstage(name, threads)) as worker:
            took = worker.ask("step", workload.whole, workload.dtype)
        if isinstance(took, StepTime):
            found[threads] = took
    return found


class _Stage:
    """The workers of a run."""

    def __init__(self, run: Run, stack: ExitStack) -> None:
        self.run, self.stack = run, stack
        self.workers: dict[str, Backstage] = {}
        self.limits: dict[str, str] = {}  # backend -> the worker that knows the limits of its device

    def start(self, name: str) -> Side:
        worker = self.workers[name] = Backstage(name, self.run.threads)
        self.stack.callback(lambda: worker.close())
        self.run.sides[name] = worker.side
        return worker.side

    def find_limits(self) -> None:
        """Let the processor's own backend measure the peaks for all that compute on it; the others measure their own."""
        host = self.workers.get(HOST)
        if not host and probe(HOST).state == "available":
            host = Backstage(HOST, self.run.threads)
            self.stack.callback(host.close)
        for name, side in self.run.sides.items():
            on_host = host and host.side.facts.device == side.facts.device
            self.limits[name] = HOST if on_host else name
        if host:
            self.workers.setdefault(HOST, host)
        for source in dict.fromkeys(self.limits.values()):
            for peak in self.workers[source].side.holds:
                for _ in range(FIRST):
                    self._peak(source, peak)

    def _peak(self, source: str, name: str) -> float:
        rate = self.workers[source].ask("peak", name)
        if isinstance(rate, Judgement):
            raise UsageError(f"{source} cannot measure its limit {name!r}: {rate.message}")
        for backend, whose in self.limits.items():
            if whose == source:
                found = self.run.peaks.setdefault(backend, {})
                found[name] = (*found.get(name, ()), rate)
        return float(rate)

    # -- one call ----------------------------------------------------------------------------------------------------

    def late(self, case: Case) -> Iterator[Measured]:
        for name in self.run.sides:
            yield Measured(case.token, name, "", why="there was no time left for it: give more --seconds, or --resume")

    def measured(self, case: Case, seconds: float) -> Iterator[Measured]:
        """The call on all backends in turns."""
        judged: dict[str, Judged] = {}
        for name, side in self.run.sides.items():
            if side.facts.place != "hardware":
                yield Measured(case.token, name, "", why=f"{side.facts.place}: its speed says nothing about a chip")
                continue
            found = self._open(name, case)
            if found.verdict == "PASS" and isinstance(found, Judged):
                judged[name] = found
            else:
                why = f"{found.verdict}: {found.message}"
                yield Measured(case.token, name, "", found.verdict, why, getattr(found, "kernel", ""))
        if not judged:
            return
        work = next(iter(judged.values())).work
        assert work
        caches = [COLD]
        if any(work.bytes <= self._holds(name).get(c, 0) for name in judged for c in CACHES):
            caches.append(WARM)
        for cache in caches:
            yield from self._in_turns(case, judged, cache, seconds / len(caches))
        for name in judged:
            self.workers[name].ask("close")

    def _open(self, name: str, case: Case) -> Judged | Judgement:
        found: Judged | Judgement = self.workers[name].ask("open", case)
        if isinstance(found, Judgement):  # the process is gone, or hangs
            self._replace(name)
        return found

    def _replace(self, name: str) -> None:
        self.workers[name].close()
        shared = name in self.limits.values() and name not in self.run.sides
        self.workers[name] = worker = Backstage(name, self.run.threads)
        self.stack.callback(worker.close)
        if not shared:
            self.run.sides[name] = worker.side

    def _holds(self, name: str) -> Mapping[str, float]:
        return self.workers[self.limits[name]].side.holds

    def _in_turns(self, case: Case, judged: Mapping[str, Judged], cache: str, seconds: float) -> Iterator[Measured]:
        """Rounds of one sample of every backend, and of every peak that may bind the call."""
        work = next(iter(judged.values())).work
        assert work
        peaks = {name: needed(work, self._holds(name), cache == COLD) for name in judged}
        samples: dict[str, list[float]] = {name: [] for name in judged}
        rates: dict[tuple[str, str], list[float]] = {}
        calls = {name: self._calls(name) if cache == WARM else 1 for name in judged}
        failed: dict[str, Judgement] = {}
        until = time.monotonic() + min(max(seconds, SHORTEST), LONGEST)
        while samples and not _enough(samples, until):
            for name in list(samples):
                took = self._sample(name, cache, calls[name])
                if isinstance(took, float):
                    samples[name].append(took)
                    continue
                failed[name] = took if isinstance(took, Judgement) else Judgement("LEFT_OUT", "its arrays cannot be changed")
                del samples[name]
            for source, peak in {(self.limits[name], peak) for name in samples for peak in peaks[name]}:
                rates.setdefault((source, peak), []).append(self._peak(source, peak))
        for name, found in judged.items():
            facts = (case.token, name, cache, found.verdict)
            if name in failed:
                why = f"{failed[name].verdict} while it was timed: {failed[name].message}"
                yield Measured(*facts, why=why, kernel=found.kernel)
                continue
            near = {peak: tuple(rates[self.limits[name], peak]) for peak in peaks[name]}
            yield Measured(*facts, "", found.kernel, found.provider, found.work, tuple(samples[name]), near, calls[name])

    def _sample(self, name: str, cache: str, calls: int) -> Any:
        largest = max((h for h in self._holds(name).values() if h < inf), default=0.0)
        took = self.workers[name].ask(cache, largest if cache == COLD else calls)
        if isinstance(took, Judgement):
            self._replace(name)
        return took

    def _calls(self, name: str) -> int:
        """As many warm calls as one sample takes."""
        took = self._sample(name, WARM, 1)
        return max(1, min(1000, round(SAMPLE / took))) if isinstance(took, float) else 1


def _enough(samples: Mapping[str, Sequence[float]], until: float) -> bool:
    """Whether every backend's samples tell enough, or the time is over and there are the least that mean something."""
    least = min(map(len, samples.values()))
    if least < ROWS:
        return False
    if time.monotonic() >= until:
        return True
    return least >= LEAST and all(Summary.of(found).settled for found in samples.values())
