"""Backends side by side: each call judged on every one of them, then timed in turns, A B C A B C, until that tells enough."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from porthal.bench.call import Judged
from porthal.bench.measured import Journal, Measured
from porthal.bench.roofline import CACHES, needed
from porthal.bench.statistics import LEAST, Summary
from porthal.bench.step import StepTime
from porthal.bench.worker import Backstage, Side
from porthal.bench.workloads import Workload
from porthal.conformance.cases.case import Case
from porthal.conformance.runner.peers import Peers
from porthal.conformance.verdicts import Judgement
from porthal.hal import PorthalError, UsageError, note, probe

HOST = "cpu"  # the backend that knows the limits of the processor, whoever computes on it
SECONDS = 240.0
LONGEST, SHORTEST = 4.0, 0.3  # seconds for the samples of one call, of all backends
SAMPLE, MOST = 2e-3, 1000  # seconds of a sample of warm calls, and how many there are at most
BURSTS = 3  # samples of a peak in one round: each is shorter than most calls
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
    steps: dict[str, dict[int, StepTime]] = field(default_factory=dict)  # as a whole, by number of threads
    late: bool = False  # whether there was no time for some calls
    load: float = field(default_factory=lambda: os.getloadavg()[0] / len(os.sched_getaffinity(0)))  # as it began, per processor

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
    peers: Peers | None = None,
) -> Run:
    """Every call of a workload on every backend, each in a process of its own with so many threads, within about so many
    seconds; what there was no time for is among what was found, without samples.

    `journal` keeps each measurement as it comes, and with `resume` those already there are not taken again.
    Backends that are among `peers` run in their own interpreters.
    Raises UsageError where backends are named twice, and what a backend raises that does not start.
    """
    if twice := [name for name in backends if list(backends).count(name) > 1]:
        raise UsageError(f"backend {twice[0]} is given twice: give each once")
    run = Run(workload, threads)
    with ExitStack() as stack:
        stage = _Stage(run, stack, peers.python if peers else lambda name: "")
        for name in backends:
            stage.start(name)
        stage.find_limits()
        head = {
            "workload": workload.name,
            "dtype": workload.dtype,
            "threads": threads,
            "backends": {n: {"sources": dict(s.facts.sources), "device": s.facts.device} for n, s in run.sides.items()},
        }
        kept = stack.enter_context(closing(Journal(journal, head, resume))) if journal else None
        cases = list(dict.fromkeys(row.case for row in workload.rows))
        known = {(m.token, m.backend) for m in kept.known} if kept else set()
        whole = {c.token for c in cases if all((c.token, name) in known for name in backends)}
        if kept:  # a call that was stopped in its middle is there twice
            run.found += {(m.token, m.backend, m.cache): m for m in kept.known if m.token in whole}.values()
        end = time.monotonic() + seconds
        cases = [c for c in cases if c.token not in whole]
        for n, case in enumerate(cases):
            left = end - time.monotonic()
            started = time.monotonic()
            if left <= 0:
                run.late = True
                run.found += stage.late(case)  # and not kept: there may be time when the run goes on
                continue
            for measured in list(stage.measured(case, left / (len(cases) - n))):  # all of a call, or nothing
                run.found.append(measured)
                if kept:
                    kept.add(measured)
            if progress:
                spent = time.monotonic() - started
                progress(n + 1, len(cases), case.op, min(max(left - spent, 0.0), spent * (len(cases) - n - 1) * 4))
        if workload.whole:
            run.steps = {name: _steps(name, workload, threads, stage.python(name)) for name in backends}
    return run


def _steps(name: str, workload: Workload, most: int, python: str) -> dict[int, StepTime]:
    """The whole step on a backend with 1, 2, 4, ... threads, each in a process of its own."""
    found = {}
    for threads in sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most}):
        with closing(Backstage(name, threads, python)) as worker:
            took = worker.ask("step", workload.whole, workload.dtype)
        if isinstance(took, StepTime):
            found[threads] = took
        else:
            note(f"no whole step on {name} with {threads} threads: {took.message}")
    return found


class _Stage:
    """The workers of a run."""

    def __init__(self, run: Run, stack: ExitStack, python: Callable[[str], str]) -> None:
        self.run, self.stack, self.python = run, stack, python
        self.workers: dict[str, Backstage] = {}
        self.limits: dict[str, str] = {}  # backend -> the worker that knows the limits of its device
        self.gone: dict[str, str] = {}  # backends that do not start any more, and why

    def start(self, name: str) -> Side:
        worker = self.workers[name] = Backstage(name, self.run.threads, self.python(name))
        self.stack.callback(worker.close)
        self.run.sides[name] = worker.side
        return worker.side

    def find_limits(self) -> None:
        """Let the processor's own backend measure the peaks for all that compute on it; the others measure their own."""
        host = self.workers.get(HOST)
        if not host and probe(HOST).state == "available":
            host = Backstage(HOST, self.run.threads)
            self.stack.callback(host.close)
        for name, side in self.run.sides.items():
            self.limits[name] = HOST if host and side.on_host else name
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
            yield Measured(case.token, name, "", why="there was no time left for it: give more --seconds")

    def measured(self, case: Case, seconds: float) -> Iterator[Measured]:
        """The call on all backends in turns, judged and timed within about so many seconds."""
        judged: dict[str, Judged] = {}
        until = time.monotonic() + seconds
        for name, side in self.run.sides.items():
            if why := self.gone.get(name) or (side.facts.place != "hardware" and f"{side.facts.place}: no speed of a chip"):
                yield Measured(case.token, name, "", why=why)
                continue
            opened = self._ask(name, "open", case)
            if opened.verdict == "PASS" and isinstance(opened, Judged):
                judged[name] = opened
            else:
                why = f"{opened.verdict}: {opened.message}"
                yield Measured(case.token, name, "", opened.verdict, why, getattr(opened, "kernel", ""))
        if not judged:
            return
        work = next(iter(judged.values())).work
        assert work
        caches = [COLD]
        if any(work.bytes <= self._holds(name).get(c, 0) for name in judged for c in CACHES):
            caches.append(WARM)
        for cache in caches:
            left = (until - time.monotonic()) / (len(caches) if cache == COLD else 1)
            found = self._in_turns(case, judged, cache, left) if judged else []
            yield from found
            judged = {m.backend: judged[m.backend] for m in found if m.samples}
        for name in judged:
            self.workers[name].ask("close")

    def _ask(self, name: str, method: str, argument: Any) -> Any:
        """A worker's answer; after a Judgement its process is gone or hangs, and another one takes its place."""
        answer = self.workers[name].ask(method, argument)
        if isinstance(answer, Judgement):
            self.workers[name].close()
            try:
                self.start(name)
            except PorthalError as error:  # what has been measured stays
                self.gone[name] = f"it does not start again: {error}"
        return answer

    def _holds(self, name: str) -> Mapping[str, float]:
        return self.workers[self.limits[name]].side.holds

    def _in_turns(self, case: Case, judged: Mapping[str, Judged], cache: str, seconds: float) -> list[Measured]:
        """Rounds of one sample of every backend, and of every peak that may bind the call."""
        work = next(iter(judged.values())).work
        assert work
        peaks = {name: needed(work, self._holds(name), cache == COLD) for name in judged}
        samples: dict[str, list[float]] = {name: [] for name in judged}
        rates: dict[tuple[str, str], list[float]] = {}
        calls = dict.fromkeys(judged, 1)
        failed: dict[str, Judgement] = {}
        until = time.monotonic() + min(max(seconds, SHORTEST), LONGEST)
        while samples and not enough(samples, until):
            for name in list(samples):
                took = self._ask(name, cache, self._largest(name) if cache == COLD else calls[name])
                if not isinstance(took, float):
                    failed[name] = took or Judgement("LEFT_OUT", "its arrays cannot be changed")
                    del samples[name]
                elif cache == WARM and calls[name] == 1 and took < SAMPLE / 2:  # so many calls as a sample takes
                    calls[name] = min(MOST, round(SAMPLE / took))
                else:
                    samples[name].append(took)
            for source, peak in {(self.limits[name], peak) for name in samples for peak in peaks[name]}:
                rates.setdefault((source, peak), []).extend(self._peak(source, peak) for _ in range(BURSTS))
        made = []
        for name, found in judged.items():
            one = Measured(case.token, name, cache, found.verdict, "", found.kernel, found.provider)
            if name in failed:
                why = f"{failed[name].verdict} while it was timed: {failed[name].message}"
                made.append(replace(one, verdict=failed[name].verdict, why=why))
            else:
                near = {peak: tuple(rates[self.limits[name], peak]) for peak in peaks[name]}
                one = replace(one, work=found.work, samples=tuple(samples[name]), rates=near, calls=calls[name])
                made.append(replace(one, holds={c: size for c, size in self._holds(name).items() if c in CACHES}))
        return made

    def _largest(self, name: str) -> float:
        """Bytes of the device's largest cache."""
        return max((h for h in self._holds(name).values() if h < inf), default=0.0)


def enough(samples: Mapping[str, Sequence[float]], until: float) -> bool:
    """Whether every backend's samples tell enough, or the time is over and there are the least that mean something."""
    least = min(map(len, samples.values()))
    if least < ROWS:
        return False
    if time.monotonic() >= until:
        return True
    return least >= LEAST and all(Summary.of(found).settled for found in samples.values())
