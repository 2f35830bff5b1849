"""Isolation: a backend in processes of its own, each judging one case at a time.

Whatever a kernel does to its process (a segmentation fault, abort, kill, hang, exit, all the memory) costs the case in
flight and nothing else: that case is CRASH or TIMEOUT, and a fresh worker goes on with the next. A pool that queues
cases inside its workers could not say which of them was in flight; here each worker holds one, over a pipe of its own.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porthal.conformance.cases import BEYOND, FAR, Case
from porthal.conformance.plan import Level
from porthal.conformance.report import Facts, Result
from porthal.conformance.verdicts import Judgement
from porthal.hal import PorthalError, Unavailable, UsageError, create
from porthal.hal.binding import Choice
from porthal.hal.limits import NO_LIMITS

if TYPE_CHECKING:
    from porthal.conformance.inputs import Inputs
    from porthal.conformance.runner import Returned

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
START = 120.0  # seconds in which a backend must be ready
GIB = 2**30
ADDRESSES = 16  # further GiB for views whose addresses are far apart and hardly touched


@dataclass(frozen=True)
class Bounds:
    """What a case may take: seconds, and GiB of memory above what its worker has after its start."""

    workers: int = min(2, os.cpu_count() or 1)
    timeout: float = 300.0
    memory: float = 3.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"{name} is {value}: expected more than 0")


@dataclass(frozen=True)
class Setup:
    """What a worker serves."""

    backend: str
    level: Level
    emulated: bool
    memory: float


def machine(backend: str, emulated: bool = False) -> Any:
    """The backend of this name, on an emulated device where that is asked for."""
    if emulated:
        try:
            importlib.import_module(f"porthal.conformance.emulated.{backend.partition(':')[0]}").install()
        except RuntimeError as error:  # the vendor's real package is loaded
            raise Unavailable(str(error)) from None
    return create(backend)


# -- in the worker -------------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Send Facts, then for every case received the chosen kernel, its results if they are wanted, and the Result."""
    from porthal.conformance.runner import Bench, check

    os.set_inheritable(descriptor, False)  # a kernel's own processes must not keep the pipe open
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # one that hangs must not outlive the run
    faulthandler.enable()
    pipe = Connection(descriptor)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        setup: Setup = pipe.recv()
        try:
            bench = Bench(machine(setup.backend, setup.emulated))
            facts = Facts.of(bench.machine)
        except PorthalError as error:
            return pipe.send(error)
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[5]) * resource.getpagesize() / GIB
        pipe.send(facts)
        while True:
            case, inputs, wanted = pipe.recv()
            _limit_memory(held + setup.memory + ADDRESSES * (case.view in (BEYOND, FAR)))
            chosen = lambda c: pipe.send(replace(c, limits=NO_LIMITS))  # noqa: E731
            pipe.send(check(case, bench, setup.level, chosen, inputs, pipe.send if wanted else None))


def _limit_memory(gib: float) -> None:
    """Private memory, not addresses: drivers reserve far more of these than they use."""
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


# -- in the parent -------------------------------------------------------------------------------------------------------


class Worker:
    """A process and the case it holds; `case` is None while it starts."""

    def __init__(self, setup: Setup) -> None:
        self.case: Case | None = None
        self.choice: Choice | None = None
        self.returned: Returned | None = None
        self.began = time.monotonic()
        self.patience = START
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.pipe, theirs = Pipe()
        program = (
            "import sys; sys.path[:] = sys.argv[2:]; "
            "from porthal.conformance.workers import serve; serve(int(sys.argv[1]))"
        )
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,  # an interrupt is the parent's business, and a kill takes its children along
            )
        with suppress(BrokenPipeError):  # its death is seen when it is waited for
            self.pipe.send(setup)

    @property
    def deadline(self) -> float:
        return self.began + self.patience

    def give(
        self, case: Case, patience: float, inputs: Inputs | None = None, returned: Returned | None = None
    ) -> None:
        self.case, self.choice, self.returned, self.patience = case, None, returned, patience
        self.began = time.monotonic()
        self.log.seek(0)
        self.log.truncate()
        with suppress(BrokenPipeError):
            self.pipe.send((case, inputs, returned is not None))

    def answer(self) -> Facts | Result | Judgement | PorthalError | None:
        """What has come in: a Judgement where the process is dead or out of time, None while there is nothing yet."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, Choice):
                    self.choice = message
                elif self.returned and isinstance(message, dict):
                    self.returned(message)
                else:
                    return message
        except (EOFError, OSError):
            return Judgement("CRASH", self._end())
        if time.monotonic() >= self.deadline:
            self.close()
            return Judgement("TIMEOUT", f"no answer within {self.patience:g} s")
        return None

    def result(self, judged: Judgement) -> Result:
        """The verdict on the case in flight."""
        assert self.case is not None
        return Result.of(self.case, judged, self.choice, time.monotonic() - self.began)

    def _end(self) -> str:
        """How the process ended, and the last that it said."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe"
        names = {-s.value: s.name for s in signal.Signals}
        how = f"killed by {names.get(code, f'signal {-code}')}" if code < 0 else f"exited with code {code}"
        if code == -signal.SIGKILL:
            how += ", which is also how a system out of memory ends a process"
        self.log.seek(0)
        said = self.log.read()[-10000:].decode(errors="replace")
        if frames := re.findall(r'File "(.+)", line (\d+) in (\S+)', said)[:3]:  # faulthandler's, innermost first
            return f"{how} in " + ", called by ".join(f"{name} ({Path(f).name}:{line})" for f, line, name in frames)
        lines = said.strip().splitlines()
        return how + (f": {lines[-1].strip()}" if lines else "")

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in its driver: the system will end it
            self.process.wait(5)
        self.pipe.close()
        self.log.close()


class Pool:
    """The workers of one run, to be closed. Raises Unavailable where the backend does not start, and what it raises there."""

    def __init__(self, backend: str, level: Level, emulated: bool, bounds: Bounds, cases: int) -> None:
        self.setup = Setup(backend, level, emulated, bounds.memory)
        self.timeout = bounds.timeout
        self.workers = [Worker(self.setup) for _ in range(max(1, min(bounds.workers, cases)))]
        first = self.workers[0]
        try:
            wait([first.pipe], START)
            message = first.answer()
            if isinstance(message, PorthalError):
                raise message
            if not isinstance(message, Facts):
                raise Unavailable(self._does_not_start(message))
        except BaseException:
            self.close()
            raise
        self.facts = message

    def judged(self, cases: Sequence[Case]) -> Iterator[Result]:
        """The cases' results as they come; NOT_JUDGED what is left when no worker starts any more."""
        waiting, why = deque(cases), ""
        if waiting:
            self.workers[0].give(waiting.popleft(), self.timeout)
        while self.workers:
            for worker in [w for w in self.workers if not w.case and not waiting]:
                self._drop(worker)
            patience = min((w.deadline for w in self.workers), default=0.0) - time.monotonic()
            wait([w.pipe for w in self.workers], max(patience, 0.0))
            for worker in list(self.workers):
                message = worker.answer()
                if message is None:
                    continue
                if worker.case:
                    result = message if isinstance(message, Result) else worker.result(message)
                    yield result
                    if result.verdict in ("CRASH", "TIMEOUT"):
                        self._drop(worker)
                        self.workers += [Worker(self.setup)] if waiting else []
                        continue
                elif not isinstance(message, Facts):
                    why = self._does_not_start(message)
                    self._drop(worker)
                    continue
                worker.case = None
                if waiting:
                    worker.give(waiting.popleft(), self.timeout)
        for case in waiting:
            yield Result.of(case, Judgement("NOT_JUDGED", why), None, 0.0)

    def one(self, case: Case, inputs: Inputs | None = None, returned: Returned | None = None) -> Result:
        """One case's result, from a worker that stays for the next; NOT_JUDGED where none starts. See `runner.check`."""
        if not self.workers:
            self.workers.append(Worker(self.setup))
            if not isinstance(message := _awaited(self.workers[0]), Facts):
                self._drop(self.workers[0])
                return Result.of(case, Judgement("NOT_JUDGED", self._does_not_start(message)), None, 0.0)
        worker = self.workers[0]
        worker.give(case, self.timeout, inputs, returned)
        message = _awaited(worker)
        result = message if isinstance(message, Result) else worker.result(message)
        worker.case = None
        if result.verdict in ("CRASH", "TIMEOUT"):
            self._drop(worker)
        return result

    def _does_not_start(self, message: Any) -> str:
        return f"backend {self.setup.backend!r} does not start: {getattr(message, 'message', message)}"

    def _drop(self, worker: Worker) -> None:
        worker.close()
        self.workers.remove(worker)

    def close(self) -> None:
        for worker in list(self.workers):
            self._drop(worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _awaited(worker: Worker) -> Any:
    """A worker's next answer."""
    while (message := worker.answer()) is None:
        wait([worker.pipe], max(worker.deadline - time.monotonic(), 0.0))
    return message
