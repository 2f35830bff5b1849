"""Calls of several ranks: each rank's check of its own part, ranks that are threads, and ranks that are processes.

A rank may die or stall, on purpose or not: then its processes are replaced, and nothing waits longer than it should.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.ranked import victim, world
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.outcome import raised
from porthal.conformance.execution.ranked import called, mistaken
from porthal.conformance.judgement.ranked import Simulation, check_alike, judge_fault
from porthal.conformance.level import Level, level_of
from porthal.conformance.report.results import Result
from porthal.conformance.runner.workers import START, Bounds, Pool, Setup, Worker, joined
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import Choice, Communicator, NotClaimed, PeerLost, PorthalError, create, running, simulated

PATIENCE = 30.0  # seconds in which a rank must answer another
SHORT = 2.0  # and where one stalls on purpose
LEAVING = ("killed", "stalled")


# -- of one rank ---------------------------------------------------------------------------------------------------------


def check_rank(
    case: Case, process: int, comm: Communicator, bindings: Bindings, limit: Level, leave: Callable[[], None]
) -> Judgement:
    """The judgement of one process on its own part of a case; `comm` has all processes of the case."""
    rank, group = (process // 2, process % 2) if case.seq else (process, 0)
    if case.seq:
        halves = [comm.group(range(half, world(case), 2)) for half in range(2)]
        comm = next(half for half in halves if half is not None)
    simulation = Simulation(case, group)
    binding = bindings.bound(simulation.inputs[rank]).binding
    try:
        if case.fault:
            judged = _faulted(case, rank, comm, bindings, leave)
            return judged if case.fault in LEAVING else _whole(replace(case, fault=""), rank, comm, bindings, limit)
        return _judged(simulation, rank, called(binding, simulation.inputs[rank], comm, limit.runs), comm, limit)
    except Failed as failed:
        return failed.judgement
    except Exception as error:
        return Judgement("FAIL_ERROR", raised(error))


def _whole(case: Case, rank: int, comm: Communicator, bindings: Bindings, limit: Level) -> Judgement:
    """After a refused call the group is in step: the right call gives the right results."""
    simulation = Simulation(case)
    inputs = simulation.inputs[rank]
    if case.attributes.get("M") == 1 or dict(case.dims).get("M") == 1:  # too little room is its own fault
        comm.agree("after", {})
        return Judgement("PASS")
    return _judged(simulation, rank, called(bindings.bound(inputs).binding, inputs, comm, limit.runs), comm, limit)


def _judged(simulation: Simulation, rank: int, got: Any, comm: Communicator, limit: Level) -> Judgement:
    judged = simulation.judged(rank, got, limit)
    rows = simulation.rows(rank)
    mine = {n: hashlib.sha256(np.ascontiguousarray(value[: rows.get(n)]).tobytes()).hexdigest() for n, value in got.items()}
    check_alike(simulation, mine, [json.loads(each) for each in comm.gather("digests", json.dumps(mine).encode())])
    return judged


def _faulted(case: Case, rank: int, comm: Communicator, bindings: Bindings, leave: Callable[[], None]) -> Judgement:
    error: BaseException | None = None
    binding = bindings.bound(Simulation(replace(case, fault="")).inputs[rank]).binding
    comm.agree("before", {})
    start = time.monotonic()
    try:
        mistaken(binding, case, rank, comm, leave)
    except PorthalError as found:
        error = found
    seconds, patience = time.monotonic() - start, 2 * comm.native.timeout + 2
    if rank == victim(case):  # it was away meanwhile
        patience += 2 * comm.native.timeout
    found_fault: Judgement = judge_fault(case, rank, error, seconds, patience, victim(case))
    return found_fault


def merged(case: Case, judgements: Mapping[int, Judgement]) -> Judgement:
    """The judgement on a case: that of the first rank where it is not PASS, of one that misses another if all do."""
    wrong = [(PeerLost.__name__ in each.message, process) for process, each in judgements.items() if each.verdict != "PASS"]
    if not wrong:
        return max(judgements.values(), key=lambda each: each.worst)
    first = min(wrong)[1]
    return replace(judgements[first], message=f"rank {first}: {judgements[first].message}")


# -- ranks that are threads ----------------------------------------------------------------------------------------------


def in_threads(case: Case, bindings: Bindings, level: str) -> Judgement:
    """The judgement with ranks that are threads of this process and share its backend."""

    def one(wire: Any) -> Judgement | None:
        def leave() -> None:
            if case.fault == "stalled":
                time.sleep(2 * wire.timeout)
            else:
                wire.close()
                raise SystemExit

        try:
            return check_rank(case, wire.rank, Communicator.over(wire), bindings, level_of(level), leave)
        except SystemExit:
            return None

    found = simulated(world(case), one, SHORT if case.fault == "stalled" else PATIENCE)
    wrong = next((each for each in found if isinstance(each, Exception)), None)
    if wrong:
        return Judgement("FAIL_ERROR", raised(wrong))
    return merged(case, {process: each for process, each in enumerate(found) if each is not None})


# -- ranks that are processes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What a process is asked: its part of a case, in a group that meets at `port`."""

    case: Case
    size: int
    port: int
    timeout: float


def serve(descriptor: int, parent: int) -> None:
    """Answer each Call with the chosen kernel and the judgement."""
    pipe = joined(descriptor, parent)
    with suppress(EOFError, BrokenPipeError):
        setup: Setup = pipe.recv()
        os.environ["RANK"] = str(setup.rank)  # by which a backend chooses its device
        backend = create(setup.backend, setup.emulated)
        bindings, comm, port = Bindings(backend), None, 0
        pipe.send(None)
        gc.freeze()
        while True:
            call: Call = pipe.recv()
            try:
                if call.port != port:
                    if comm:
                        comm.close()
                    names = {"RANK": setup.rank, "WORLD_SIZE": call.size, "MASTER_ADDR": "localhost", "MASTER_PORT": call.port}
                    os.environ.update({name: str(value) for name, value in names.items()})
                    with running(backend):
                        comm, port = backend.communicator(call.timeout), call.port
                assert comm is not None
                leave = _leaving(call)
                judged = check_rank(call.case, setup.rank, comm, bindings, level_of(setup.level), leave)
            except NotClaimed as error:
                judged = Judgement("UNCLAIMED", str(error))
            except PorthalError as error:
                judged = Judgement("FAIL_ERROR", raised(error))
            pipe.send((_choice(bindings, call.case), judged))


def _leaving(call: Call) -> Callable[[], None]:
    """How the rank at fault leaves the others."""
    return (lambda: os._exit(9)) if call.case.fault == "killed" else (lambda: time.sleep(2 * call.timeout))


def _choice(bindings: Bindings, case: Case) -> Choice:
    return bindings.bound(Simulation(replace(case, fault="")).inputs[0]).choice


class Ranked:
    """The processes of one run, to be closed."""

    def __init__(self, setup: Setup, bounds: Bounds) -> None:
        self.setup, self.timeout = setup, bounds.timeout
        self.workers: list[Worker] = []
        self.port, self.size, self.asked = 20000 + os.getpid() % 20000, 0, 0

    def judged(self, cases: Sequence[Case]) -> Iterator[Result]:
        """The cases' results, those of few ranks first; of equally many those in which one is lost come last."""
        for case in sorted(cases, key=lambda case: (world(case), case.fault in LEAVING)):
            yield self.one(case)

    def one(self, case: Case) -> Result:
        """One case's result."""
        start, size = time.monotonic(), world(case)
        why = self._grow(size)
        if why:
            return Result.of(case, Judgement("NOT_JUDGED", why), None, 0.0)
        lossy = case.fault in LEAVING
        if lossy or size != self.size:  # a group that has lost a rank is of no more use
            self.port, self.size = self.port + 1, size
        call = Call(case, size, self.port, SHORT if case.fault == "stalled" else PATIENCE)
        for worker in self.workers[:size]:
            worker.send(call)
        answers = self._answers(size, victim(case) if case.fault == "killed" else -1)
        judgements = {rank: a if isinstance(a, Judgement) else a[1] for rank, a in answers.items()}
        choice = next((a[0] for a in answers.values() if not isinstance(a, Judgement)), None)
        judged = merged(case, judgements)
        if lossy or judged.verdict != "PASS":
            self.size = 0
            self._drop([rank for rank, each in judgements.items() if each.verdict in ("CRASH", "TIMEOUT")])
            if case.fault == "killed":
                self._drop([victim(case)])
        return Result.of(case, judged, choice, time.monotonic() - start)

    def _answers(self, size: int, dying: int) -> dict[int, Any]:
        """What each process answers; a Judgement where it has died or does not, unless it is to die."""
        found: dict[int, Any] = {}
        end = time.monotonic() + self.timeout
        while len(found) < size - (dying >= 0):
            waiting = [w.pipe for rank, w in enumerate(self.workers[:size]) if rank not in found and rank != dying]
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(size) if rank not in found and rank != dying]
                return found | dict.fromkeys(missing, Judgement("TIMEOUT", f"no answer within {self.timeout:g} s"))
            for rank, worker in enumerate(self.workers[:size]):
                if worker.pipe in ready:
                    found[rank] = worker.received()
        return found

    def _grow(self, size: int) -> str:
        """Have so many processes; why that is not so, or ""."""
        fresh = []
        for rank in range(size):
            if rank == len(self.workers):
                self.workers.append(Worker(replace(self.setup, rank=rank, ranks=size), __name__, python=self.setup.python))
                fresh.append(self.workers[rank])
        for worker in fresh:
            if not wait([worker.pipe], START) or isinstance(worker.received(), Judgement):
                return f"rank {self.workers.index(worker)} of backend {self.setup.backend!r} does not start"
        return ""

    def _drop(self, ranks: Sequence[int]) -> None:
        """Replace these processes."""
        for rank in ranks:
            self.workers[rank].close()
            self.workers[rank] = Worker(replace(self.setup, rank=rank), __name__, python=self.setup.python)
            if wait([self.workers[rank].pipe], START):
                self.workers[rank].received()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@contextmanager
def everywhere(pool: Pool, bounds: Bounds) -> Iterator[Callable[[Sequence[Case]], Iterator[Result]]]:
    """What judges cases of one device in a pool, and those of several ranks in processes that end with this."""

    def judged(cases: Sequence[Case]) -> Iterator[Result]:
        if alone := [case for case in cases if not case.contract.collective]:
            yield from pool.judged(alone)
        yield from ranked.judged([case for case in cases if case.contract.collective])

    with closing(Ranked(pool.setup, bounds)) as ranked:
        yield judged
