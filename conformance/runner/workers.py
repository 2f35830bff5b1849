"""Isolation: a backend in processes of its own, each judging one case at a time.

Whatever a kernel does to its process (a segmentation fault, abort, kill, hang, exit, all the memory) costs the case in
flight and nothing else: that case is CRASH or TIMEOUT, and a fresh worker continues with the next. A pool that queues
cases inside its workers could not say which of them was in flight; here each worker holds one, over a pipe of its own.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.cases.legal import FAR, PAST_2G
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.judgement.golden_cache import folder
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.results import Result
from porthal.conformance.runner.check import Returned, check
from porthal.conformance.runner.proven import Proven
from porthal.conformance.verdicts import Judgement
from porthal.hal import Choice, PorthalError, Unavailable, UsageError, create, running

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
START = 120.0  # seconds in which a backend must be ready
GIB = 2**30
ALONE = "passes when run alone: the kernel keeps state between calls"
# Of a worker, which has one thread; what it frees it uses again, where glibc would give it back and fault it in anew.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": f"{2**25}", "MALLOC_TRIM_THRESHOLD_": f"{2**26}"}
ADDRESSES = 16  # further GiB for views whose addresses are far apart and hardly touched


@dataclass(frozen=True)
class Bounds:
    """What a case may take: seconds, and GiB of memory above what its worker holds; one that has grown by as much since
    its first case is replaced."""

    workers: int = min(2, os.cpu_count() or 1)
    timeout: float = 300.0
    memory: float = 3.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 1e6:
                raise UsageError(f"{name} is {value}: expected more than 0 and less than a million")

    @property
    def options(self) -> str:
        """The options that give a replay the same bounds; "" where they are the defaults."""
        usual, mine = vars(Bounds()), vars(self)
        return "".join(f" --{name} {mine[name]:g}" for name in ("timeout", "memory") if mine[name] != usual[name])


@dataclass(frozen=True)
class Setup:
    """What a worker is to run: a backend at a level, with `reuse` of what its bases have passed.

    In a group of `ranks` workers it is the one of this rank. `python` is a peer's interpreter; "" is this one.
    """

    backend: str
    level: str
    emulated: bool
    memory: float
    reuse: bool = False
    rank: int = 0
    ranks: int = 1
    python: str = ""


# -- in the worker -------------------------------------------------------------------------------------------------------


def ends_with(parent: int) -> None:
    """Let this process be killed when its parent dies, whatever it is at then; at once where that has happened already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def joined(descriptor: int, parent: int) -> Connection:
    """The pipe to the parent, with whose death this process ends; a crash says where it was."""
    os.set_inheritable(descriptor, False)  # a kernel's own processes must not keep the pipe open
    ends_with(parent)
    faulthandler.enable()
    return Connection(descriptor)


def serve(descriptor: int, parent: int) -> None:
    """Send Facts, then for every case received the chosen kernel, its results if they are wanted, and the Result."""
    pipe = joined(descriptor, parent)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        setup: Setup = pipe.recv()
        try:
            folder()  # refuses a wrong PORTHAL_CACHE before the first case
            backend = create(setup.backend, setup.emulated)
            with running(backend):
                bindings = Bindings(backend)
                facts = Facts.of(backend)
                proven = Proven(backend, setup.level) if setup.reuse else None
        except PorthalError as error:
            return pipe.send(error)
        pipe.send(facts)
        gc.freeze()  # what was imported stays
        while True:
            case, inputs, wanted = pipe.recv()
            _limit_memory(held("self") + setup.memory + ADDRESSES * (case.view in (PAST_2G, FAR)))
            returned = pipe.send if wanted else lambda results: None
            pipe.send(check(case, bindings, setup.level, inputs, pipe.send, returned, proven))


def held(process: int | str) -> float:
    """GiB of private memory; 0 of a process that has ended."""
    with suppress(OSError), open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize() / GIB
    return 0.0


def _limit_memory(gib: float) -> None:
    """Private memory, not addresses: drivers reserve far more addresses than they use."""
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


# -- in the parent -------------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs `serve` of a module, and answers one message at a time; `python` is a peer's interpreter"""

    def __init__(
        self, setup: Any, module: str = __name__, environment: Mapping[str, str] = MappingProxyType({}), python: str = ""
    ) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.first = 0.0
        self.pipe, theirs = Pipe()
        path = [] if python else sys.path  # a peer's interpreter has packages of its own
        program = (
            "import sys; sys.path[:] = sys.argv[3:] or sys.path; "
            f"from {module} import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
        )
        with theirs:
            self.process = subprocess.Popen(
                [python or sys.executable, "-c", program, str(theirs.fileno()), str(os.getpid()), *path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                env={**ENVIRONMENT, **os.environ, **environment},
                start_new_session=True,  # the parent handles interrupts, and a kill ends its children too
            )
        self.send(setup)

    def grown(self) -> float:
        """GiB that it holds more than when this was asked first."""
        now = held(self.process.pid)
        self.first = self.first or now
        return now - self.first

    def send(self, message: Any) -> None:
        self.log.seek(0)
        self.log.truncate()
        with suppress(BrokenPipeError):  # its end is seen when it is waited for
            self.pipe.send(message)

    def received(self) -> Any:
        """The message that has arrived; a Judgement where the process is dead."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return Judgement("CRASH", self._end())

    def _end(self) -> str:
        """How the process ended, and its last output."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "the worker closed its pipe"
        names = {-s.value: s.name for s in signal.Signals}
        how = f"killed by {names.get(code, f'signal {-code}')}" if code < 0 else f"exited with code {code}"
        if code == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
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


class Group:
    """The workers that run a case together, one per rank, and the case they hold; `case` is None while they start.

    The answer is that of rank 0, unless another rank's process ends or does not answer. Today every case has one rank.
    """

    def __init__(self, setup: Setup) -> None:
        self.workers = [Worker(replace(setup, rank=rank), python=setup.python) for rank in range(setup.ranks)]
        self.case: Case | None = None
        self.ran = 0  # cases
        self._await(START)

    def _await(self, patience: float, returned: Returned | None = None) -> None:
        self.began, self.patience, self.returned = time.monotonic(), patience, returned
        self.choice: Choice | None = None
        self.answers: dict[int, Any] = {}

    @property
    def pipes(self) -> list[Connection]:
        """Those of the workers that have not answered yet."""
        return [worker.pipe for rank, worker in enumerate(self.workers) if rank not in self.answers]

    @property
    def deadline(self) -> float:
        return self.began + self.patience

    def give(
        self, case: Case, patience: float, inputs: Inputs | None = None, returned: Returned | None = None
    ) -> None:
        self.case = case
        self._await(patience, returned)
        for rank, worker in enumerate(self.workers):
            worker.send((case, inputs, returned is not None and rank == 0))

    def answer(self, ready: Collection[Any]) -> Facts | Result | Judgement | PorthalError | None:
        """The answer, with a message from each of the pipes that are `ready`: a Judgement where a process is dead or out of
        time, None while there is nothing yet."""
        for rank, worker in enumerate(self.workers):
            if rank in self.answers or worker.pipe not in ready:
                continue
            message = worker.received()
            if isinstance(message, Choice):
                self.choice = message if rank == 0 else self.choice or message
            elif isinstance(message, dict):
                if self.returned:
                    self.returned(message)
            elif isinstance(message, Judgement):
                where = f"rank {rank} " if len(self.workers) > 1 else ""
                return replace(message, message=where + message.message)
            else:
                self.answers[rank] = message
        if len(self.answers) == len(self.workers):
            answer: Facts | Result | PorthalError = self.answers[0]
            return answer
        if time.monotonic() >= self.deadline:
            self.close()
            return Judgement("TIMEOUT", f"no answer within {self.patience:g} s")
        return None

    def awaited(self) -> Any:
        """The next answer."""
        while True:
            ready = wait(self.pipes, max(self.deadline - time.monotonic(), 0.0))
            if (message := self.answer(ready)) is not None:
                return message

    def result(self, judged: Facts | Judgement | PorthalError) -> Result:
        """The verdict on the case in flight."""
        assert self.case is not None and isinstance(judged, Judgement)  # the others come while they start
        return Result.of(self.case, judged, self.choice, time.monotonic() - self.began)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


class Pool:
    """The workers of one run, to be closed. Raises Unavailable where the backend does not start, and what it raises there."""

    def __init__(
        self,
        backend: str,
        level: str,
        emulated: bool,
        bounds: Bounds,
        cases: int,
        reuse: bool = False,
        python: str = "",
    ) -> None:
        self.setup = Setup(backend, level, emulated, bounds.memory, reuse, python=python)
        self.timeout = bounds.timeout
        self.alone: set[tuple[str, str]] = set()
        self.groups = [Group(self.setup) for _ in range(max(1, min(bounds.workers, cases)))]
        try:
            message = self.groups[0].awaited()
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
        if waiting and self.groups:
            self.groups[0].give(waiting.popleft(), self.timeout)
        elif waiting:  # those of an earlier call are gone
            self.groups.append(Group(self.setup))
        while self.groups:
            for group in [g for g in self.groups if not g.case and not waiting]:
                self._drop(group)
            patience = min((g.deadline for g in self.groups), default=0.0) - time.monotonic()
            ready = wait([pipe for g in self.groups for pipe in g.pipes], max(patience, 0.0))
            for group in list(self.groups):
                message = group.answer(ready)
                if message is None:
                    continue
                if group.case:
                    result = message if isinstance(message, Result) else group.result(message)
                    group.ran += 1
                    yield self._told_alone(group.case, result) if group.ran > 1 else result
                    if self._spent(group, result):
                        self._drop(group)
                        self.groups += [Group(self.setup)] if waiting else []
                        continue
                elif not isinstance(message, Facts):
                    why = self._does_not_start(message)
                    self._drop(group)
                    continue
                group.case = None
                if waiting:
                    group.give(waiting.popleft(), self.timeout)
        for case in waiting:
            yield Result.of(case, Judgement("NOT_JUDGED", why), None, 0.0)

    def _told_alone(self, case: Case, result: Result) -> Result:
        """A failure after other cases is tried once more in fresh workers, the first of its kind of an op: whether it is the
        kernel's on this call, or what the kernel has kept from others."""
        kind = case.op, result.verdict
        if not result.verdict.startswith("FAIL") or kind in self.alone:
            return result
        self.alone.add(kind)
        group = Group(self.setup)
        try:
            if not isinstance(group.awaited(), Facts):
                return result
            group.give(case, self.timeout)
            message = group.awaited()
        finally:
            group.close()
        passes = isinstance(message, Result) and message.verdict == "PASS"
        return replace(result, message=f"{result.message}; {ALONE}") if passes else result

    def one(self, case: Case, inputs: Inputs | None = None, returned: Returned | None = None) -> Result:
        """One case's result, from workers that stay for the next; NOT_JUDGED where none start. See `check`."""
        if not self.groups:
            self.groups.append(Group(self.setup))
            if not isinstance(message := self.groups[0].awaited(), Facts):
                self._drop(self.groups[0])
                return Result.of(case, Judgement("NOT_JUDGED", self._does_not_start(message)), None, 0.0)
        group = self.groups[0]
        group.give(case, self.timeout, inputs, returned)
        message = group.awaited()
        result = message if isinstance(message, Result) else group.result(message)
        group.case = None
        if self._spent(group, result):
            self._drop(group)
        return result

    def _spent(self, group: Group, result: Result) -> bool:
        """Whether the next case needs fresh workers."""
        grown = max(worker.grown() for worker in group.workers)
        return result.verdict in ("CRASH", "TIMEOUT") or grown > self.setup.memory

    def _does_not_start(self, message: Any) -> str:
        return f"backend {self.setup.backend!r} does not start: {getattr(message, 'message', message)}"

    def _drop(self, group: Group) -> None:
        group.close()
        self.groups.remove(group)

    def close(self) -> None:
        for group in list(self.groups):
            self._drop(group)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
