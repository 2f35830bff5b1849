"""One backend in a process of its own, which judges a call and then takes samples of its time when it is asked to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from multiprocessing.connection import wait
from typing import Any

from porthal.bench.call import Call, Judged, evicting
from porthal.bench.step import StepTime, Whole, whole_step
from porthal.conformance.cases.case import Case
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.report.facts import Facts
from porthal.conformance.runner.workers import START, Worker, joined
from porthal.conformance.verdicts import Judgement
from porthal.hal import Backend, PorthalError, Unavailable, create, running

EMPTY = 200  # times that nothing is timed, for what timing itself takes
PASSES = 4  # over what a cache holds
SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PORTHAL_THREADS")


@dataclass(frozen=True)
class Setup:
    backend: str
    threads: int


@dataclass(frozen=True)
class Side:
    """What a worker says of its backend: the facts of a report, its clock, whether it computes on the host's processor, and the
    bytes that each of its memories holds."""

    facts: Facts
    clock: str
    threads: int
    on_host: bool
    holds: Mapping[str, float] = field(default_factory=dict)


# -- in the worker -------------------------------------------------------------------------------------------------------


def serve(descriptor: int, parent: int) -> None:
    """Send a Side, then the answer to each message: the name of a method and its arguments."""
    pipe = joined(descriptor, parent)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        setup: Setup = pipe.recv()
        try:
            bench = Bench(setup)
        except PorthalError as error:
            return pipe.send(error)
        pipe.send(bench.side)
        while True:
            method, *args = pipe.recv()
            try:
                pipe.send(getattr(bench, method)(*args))
            except PorthalError as error:
                pipe.send(error)


class Bench:
    """A backend on so many threads, and the call that is being timed."""

    def __init__(self, setup: Setup) -> None:
        cores = processors(setup.threads)
        os.sched_setaffinity(0, cores)  # before anything counts them
        self.backend = create(setup.backend)
        with running(self.backend):
            self.bindings = Bindings(self.backend)
            self.peaks = self.backend.peaks()
            self.clock, clock = (time.process_time, "CPU time") if setup.threads == 1 else (time.perf_counter, "wall clock")
            if not self._reads_our_clock():
                clock = "device events"
            holds = {name: peak.holds for name, peak in self.peaks.items()}
            facts = Facts.of(self.backend)
        on_host = facts.device.startswith(Backend.describe(self.backend))
        self.side = Side(facts, clock, setup.threads, on_host, holds)
        self.cores = cores if on_host and len(cores) > 1 else []
        self.overhead = min(self._timed(lambda: None) for _ in range(EMPTY))
        self.call: Call | None = None
        self.evict: Callable[[], None] | None = None

    def _reads_our_clock(self) -> bool:
        read: list[float] = []

        def clock() -> float:
            read.append(time.perf_counter())
            return read[-1]

        self.backend.timed(lambda: None, clock)
        return bool(read)

    def _timed(self, run: Callable[[], Any]) -> float:
        return self.backend.timed(run, self.clock)

    def open(self, case: Case) -> Judged:
        """Judge a call, and keep it to be timed."""
        self.call = None  # its memory first
        self.call = Call(case, self.bindings)
        return self.call.judged

    def warm(self, calls: int) -> float:
        """Seconds of one call of so many in a row, after one that is not timed."""
        assert self.call
        self.call.run()
        return max(self._timed(self.call.repeat(calls)) - self.overhead, 1e-9) / calls

    def cold(self, holds: float) -> float | None:
        """Seconds of a call after the caches, which hold so many bytes, have been filled with something else, and its code has
        run on other memory; None where that cannot be done."""
        assert self.call
        self.evict = self.evict or evicting(self.backend, holds, self.cores)
        if self.evict is None:
            return None
        self.evict()
        if self.call.other:
            self.call.other()
        return max(self._timed(self.call.run) - self.overhead, 1e-9)

    def peak(self, name: str) -> float:
        """Operations or bytes per second; of a cache, when it has been filled."""
        work, holds = self.peaks[name]
        done: list[float] = []

        def again() -> None:
            done.extend(work() for _ in range(PASSES if holds < inf else 1))

        if holds < inf:
            work()
        seconds = self._timed(again)
        return sum(done) / seconds if seconds > 0 else 0.0

    def step(self, whole: Whole, dtype: str) -> StepTime:
        """A step as a whole."""
        with running(self.backend):
            return whole_step(self.backend, whole, dtype, self.clock if self.side.on_host else time.perf_counter)

    def close(self) -> None:
        self.call = None


def processors(threads: int) -> list[int]:
    """The last of those that this process may use."""
    return sorted(os.sched_getaffinity(0))[-threads:]


# -- in the parent -------------------------------------------------------------------------------------------------------


class Backstage:
    """A worker's end in the parent, to be closed. Raises what the backend raises where it does not start."""

    def __init__(self, backend: str, threads: int, python: str = "") -> None:
        self.name = backend
        self.worker = Worker(Setup(backend, threads), __name__, dict.fromkeys(SETTINGS, str(threads)), python)
        try:
            side = self._answer(START)
            if isinstance(side, PorthalError):
                raise side
            if isinstance(side, Judgement):
                raise Unavailable(f"{backend} does not start: {side.message}")
        except BaseException:
            self.close()
            raise
        self.side: Side = side

    def ask(self, method: str, *args: Any, patience: float = 600.0) -> Any:
        """What the worker answers; a Judgement where it died, did not answer or was refused."""
        self.worker.send((method, *args))
        answer = self._answer(patience)
        return Judgement("NOT_JUDGED", str(answer)) if isinstance(answer, PorthalError) else answer

    def _answer(self, patience: float) -> Any:
        if wait([self.worker.pipe], patience):
            return self.worker.received()
        return Judgement("TIMEOUT", f"no answer within {patience:g} s")

    def close(self) -> None:
        self.worker.close()
