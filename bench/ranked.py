"""Calls of several ranks, timed: each judged right first, then in turns on every backend, beside the copies that all ranks can
make of the same bytes at once.

Two times are told, as CollectiveX tells them: *chained*, of calls one after the other, which is what a decode loop pays, and
*drained*, of a call before which all ranks have met. A sample is that of the slowest rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import wait
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from porthal.bench.call import Judged
from porthal.bench.measured import Measured
from porthal.bench.roofline import Work
from porthal.bench.run import LONGEST, SHORTEST, Progress, Run, enough
from porthal.bench.step import Random
from porthal.bench.worker import SETTINGS, Side
from porthal.bench.workloads import Row, Workload
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.domain import first_float
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.judgement.ranked import Simulation
from porthal.conformance.level import BRING_UP
from porthal.conformance.report.facts import Facts
from porthal.conformance.runner.workers import START, Worker, joined
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import (
    Communicator,
    PorthalError,
    Unavailable,
    UsageError,
    bind,
    collectives,
    contracts,
    create,
    running,
)
from porthal.hal.dtypes import itemsize
from porthal.model.config import Config
from porthal.model.generate import step
from porthal.model.glm5 import Glm5
from porthal.model.layout import Layout
from porthal.model.load import profile, stepped

CHAINED, DRAINED = "chained", "drained"
BYTES = tuple(4**n << 10 for n in range(9))  # that a rank gives: 1 KB to 64 MB
WIDEST = 4096  # columns of a row
TOKENS = (8, 64, 512)  # of each rank, where experts are called
EXPERTS = {"H": 6144, "k": 8, "E": 256}  # GLM-5's
LEAST = 16  # rows of a rank, where ranks may have different numbers
DRAINS = 20  # calls of a sample before which all ranks meet, at most
_STARTED = count()  # groups of this process: none meets under the number of one before
SAMPLE, MOST = 4e-3, 500  # seconds of a sample of short calls, and how many there are at most
PATIENCE = 60.0  # seconds in which a rank must answer another


class Sample(NamedTuple):
    """Seconds of one call, on one rank."""

    chained: float
    drained: float
    copy: float


@dataclass(frozen=True)
class Setup:
    backend: str
    rank: int
    ranks: int
    port: int


# -- which calls ---------------------------------------------------------------------------------------------------------


def collective(ranks: int, ops: Sequence[str]) -> Workload:
    """The calls of so many ranks, each of which gives 1 KB to 64 MB; of experts, as many tokens as a decode step has."""
    known = collectives()
    for op in ops:
        if op not in known:
            raise UsageError(f"unknown op {op!r} of several ranks: known are {', '.join(known)}")
    rows = [Row("ranked", f"{op} on {ranks} ranks", case, 1.0) for op in ops or known for case in _cases(op, ranks)]
    return Workload("collectives", "float32, of experts bfloat16", tuple(rows), {"ranks": ranks}, part=True)


def _cases(op: str, ranks: int) -> Iterator[Case]:
    contract = collectives()[op]
    first, symbols = first_float(contract), contract.signature.symbols()
    if "k" in symbols:
        for tokens in TOKENS:
            sizes = {**EXPERTS, "ranks": ranks, "N": tokens, "M": ranks * tokens * EXPERTS["k"]}
            yield of_sizes(op, sizes, ((first, "bfloat16"),))
    elif not first:
        yield of_sizes(op, {"ranks": ranks}, ())
    else:
        for size in BYTES:
            parts = ranks if "n" in symbols else LEAST if contract.uneven else 1
            width = min(WIDEST, max(1, size // 4 // parts))
            rows = max(1, size // 4 // width)
            yield of_sizes(op, {"ranks": ranks, "H": width, "n": rows // ranks, "T": rows, "N": rows, "M": ranks * rows})


def of_sizes(op: str, sizes: Mapping[str, int], dtypes: tuple[tuple[str, str], ...] = ()) -> Case:
    """Sums are of whole numbers, of which there is one right answer."""
    contract = collectives()[op]
    attrs = tuple((name, sizes[name]) for name in sorted(contract.attributes) if name in sizes)
    dims = sorted((contract.signature.symbols() - {"ranks"}) - contract.attributes.keys())
    first = first_float(contract)
    recipes = ((first, "integer"),) if first and not contract.exact else ()
    return Case(op, (("ranks", sizes["ranks"]), *((s, sizes[s]) for s in dims)), attrs, dtypes, recipes)


# -- in the worker of a rank ---------------------------------------------------------------------------------------------


def serve(descriptor: int, parent: int) -> None:
    """Send a Side, then the answer to each message: the name of a method and its arguments."""
    pipe = joined(descriptor, parent)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        setup: Setup = pipe.recv()
        names = {"RANK": setup.rank, "WORLD_SIZE": setup.ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": setup.port}
        os.environ.update({name: str(value) for name, value in names.items()})
        try:
            backend = create(setup.backend)
            with running(backend), backend.communicator(PATIENCE) as comm:
                bench = OneRank(setup, backend, comm)
                pipe.send(Side(Facts.of(backend), "wall clock", 1, True))
                while True:
                    method, *args = pipe.recv()
                    pipe.send(getattr(bench, method)(*args))
        except PorthalError as error:
            pipe.send(error)


class OneRank:
    """A rank, and its part of the call that is being timed."""

    def __init__(self, setup: Setup, backend: Any, comm: Communicator) -> None:
        self.setup, self.backend, self.comm, self.bindings = setup, backend, comm, Bindings(backend)
        self.run: Callable[[], Any] = lambda: None
        self.memory = np.empty((2, 0), np.uint8)  # from where and to where it copies

    def open(self, case: Case) -> Judged:
        """Judge this rank's part of a call, and keep it to be timed."""
        simulation, rank = Simulation(case), self.setup.rank
        inputs = simulation.inputs[rank]
        bound = self.bindings.bound(inputs)
        kernel, contract, attrs = getattr(bound.binding, case.op), inputs.contract, inputs.attrs
        operands = [self._placed(value) for value in inputs.operands.values()]
        self.run = lambda: kernel(*operands, **attrs)
        got = {name: self.backend.to_numpy(value) for name, value in contract.named(self.run()).items()}
        try:
            judged = simulation.judged(rank, got, BRING_UP)
        except Failed as failed:
            judged = failed.judgement
        work = _work(inputs, simulation.rows(rank))
        self.memory = np.ones((2, int(work.bytes) // 2), np.uint8)
        return Judged(judged.verdict, judged.message, bound.choice.status, bound.choice.provider, work)

    def _placed(self, value: Any) -> Any:
        """An operand in memory from which others can read, where the backend has such."""
        if isinstance(value, Communicator):
            return self.comm
        lent = self.comm.native.empty(value.shape, str(value.dtype))
        lent[...] = value
        return self.backend.from_numpy(lent)

    def sample(self, calls: int) -> Sample:
        """Seconds of one of so many calls, of one once all ranks have met, and of a copy of the bytes that a call moves while
        the other ranks make theirs."""
        self._meet()
        chained = self._timed(self.run, calls)
        drained = []
        for _ in range(min(calls, DRAINS)):
            self._meet()
            drained.append(self._timed(self.run))
        self._meet()
        copy = self._timed(lambda: np.copyto(*self.memory), calls)
        return Sample(chained, fmean(drained), copy)

    def model(self, config: Config, kind: str, dtype: str, requests: Sequence[tuple[int, int]]) -> int:
        """Keep a decode step of a model of random weights, of which this rank has its part, to be timed; how many ops of one
        device it calls."""
        layout = Layout(self.comm, kind)
        calls = stepped(config, requests, dtype, layout=layout.recorded())
        bound = bind(profile=profile(config, dtype, layout=layout.recorded()), backend=self.backend)
        made = Glm5(config, Random(), bound, dtype, layout=layout)
        made.config = replace(config, eos_token_id=())
        self.run = step(made, requests)
        self.run()
        return sum(op in contracts() for op, _ in calls)

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Seconds of each of so many calls by the clock, and of this rank's processor."""
        found = []
        for _ in range(count):
            self._meet()
            start = time.process_time()
            found.append((self._timed(self.run), time.process_time() - start))
        return found

    def _meet(self) -> None:
        self.comm.gather("bench", b"")

    def _timed(self, run: Callable[[], Any], calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return max(time.perf_counter() - start, 1e-9) / calls


def _work(inputs: Inputs, rows: Mapping[str, int]) -> Work:
    """What a rank reads and writes at least; of results with rows that are not specified, those that are."""
    contract, sizes = inputs.contract, {**inputs.spec.dims, **inputs.spec.attrs, **inputs.attrs}
    sizes |= {d: rows[r.name] for r in contract.signature.results if r.name in rows for d in r.dims[:1]}
    width = {name: itemsize(kind) for name, kind in inputs.spec.dtypes.items()}
    width |= {result.name: itemsize(kind) for result, _, kind in contract.results(inputs.spec)}
    flops, moved = contract.cost(SimpleNamespace(**sizes), SimpleNamespace(**width))
    return Work(flops, moved, moved / 2, next(iter(inputs.spec.dtypes.values()), "int32"))


# -- in the parent -------------------------------------------------------------------------------------------------------


class Group:
    """The ranks of one backend, to be closed. Raises what the backend raises where one does not start."""

    def __init__(self, backend: str, ranks: int) -> None:
        settings, port = dict.fromkeys(SETTINGS, "1"), 20000 + (os.getpid() + next(_STARTED)) % 20000
        self.workers = [Worker(Setup(backend, rank, ranks, port), __name__, settings) for rank in range(ranks)]
        found = self._answers(START)
        for each in found:
            if not isinstance(each, Side):
                self.close()
                raise each if isinstance(each, PorthalError) else Unavailable(f"{backend} does not start: {each.message}")
        self.side: Side = found[0]

    def ask(self, method: str, *args: Any) -> list[Any]:
        """What each rank answers; a Judgement where it died, did not answer or was refused."""
        for worker in self.workers:
            worker.send((method, *args))
        found = self._answers(10 * PATIENCE)
        return [Judgement("FAIL_ERROR", str(each)) if isinstance(each, PorthalError) else each for each in found]

    def _answers(self, patience: float) -> list[Any]:
        end, found = time.monotonic() + patience, []
        for worker in self.workers:
            there = wait([worker.pipe], max(0.0, end - time.monotonic()))
            found.append(worker.received() if there else Judgement("TIMEOUT", f"no answer within {patience:g} s"))
        return found

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def bench(workload: Workload, backends: Sequence[str], ranks: int, seconds: float, progress: Progress | None = None) -> Run:
    """Every call of a workload on every backend, each with so many processes of one thread, within about so many seconds.

    Raises UsageError where backends are named twice, and what a backend raises that does not start.
    """
    if twice := [name for name in backends if list(backends).count(name) > 1]:
        raise UsageError(f"backend {twice[0]} is given twice: give each once")
    run = Run(workload, 1)
    with ExitStack() as stack:
        groups = {}
        for name in backends:
            groups[name] = group = Group(name, ranks)
            stack.callback(group.close)
            run.sides[name] = group.side
        end = time.monotonic() + seconds
        for n, row in enumerate(workload.rows):
            left = end - time.monotonic()
            if left <= 0:
                run.late = True
                late = "there was no time left for it: give more --seconds"
                run.found += [Measured(row.case.token, name, "", why=late) for name in backends]
                continue
            run.found += _measured(row.case, groups, left / (len(workload.rows) - n))
            if progress:
                progress(n + 1, len(workload.rows), row.case.op, max(end - time.monotonic(), 0.0))
    return run


def _measured(case: Case, groups: Mapping[str, Group], seconds: float) -> Iterator[Measured]:
    """A call on all backends in turns."""
    judged: dict[str, Judged] = {}
    for name, group in groups.items():
        opened = group.ask("open", case)
        if wrong := next((each for each in opened if each.verdict != "PASS"), None):
            yield Measured(case.token, name, "", wrong.verdict, f"{wrong.verdict}: {wrong.message}")
        else:
            judged[name] = max(opened, key=lambda each: each.work.bytes)
    samples: dict[str, list[list[Sample]]] = {name: [] for name in judged}
    calls, until = dict.fromkeys(judged, 1), time.monotonic() + min(max(seconds, SHORTEST), LONGEST)
    while judged and not enough({name: _slowest(found, CHAINED) for name, found in samples.items()}, until):
        for name in judged:
            ranks = groups[name].ask("sample", calls[name])
            if lost := next((each for each in ranks if isinstance(each, Judgement)), None):
                raise Unavailable(f"{name} failed while {case.token} was timed: {lost.message}")
            if calls[name] == 1 and (most := max(_of(ranks, CHAINED))) < SAMPLE / 2:  # as many as a sample takes
                calls[name] = min(MOST, round(SAMPLE / most))
            else:
                samples[name].append(ranks)
    for name, found in judged.items():
        assert found.work
        copies = {"copy": tuple(found.work.bytes / seconds for seconds in _slowest(samples[name], "copy"))}
        for kind in (CHAINED, DRAINED):
            times = tuple(_slowest(samples[name], kind))
            one = Measured(case.token, name, kind, found.verdict, "", found.kernel, found.provider, found.work, times)
            apart = fmean(1 - min(_of(s, kind)) / max(_of(s, kind)) for s in samples[name])
            yield replace(one, rates=copies, calls=calls[name] if kind == CHAINED else 1, apart=apart)


def _of(ranks: Sequence[Sample], kind: str) -> list[float]:
    return [float(getattr(each, kind)) for each in ranks]


def _slowest(samples: Sequence[Sequence[Sample]], kind: str) -> list[float]:
    """Of each sample that of the slowest rank."""
    return [max(_of(ranks, kind)) for ranks in samples]
