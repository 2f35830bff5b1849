"""Several processes that are the ranks of one model: what starts them, and what each of them is told."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from porthal.cli import text
from porthal.cli.stopping import stoppable
from porthal.hal import UsageError

if TYPE_CHECKING:
    from porthal.hal import Backend
    from porthal.model.layout import Layout

MOST = 64  # ranks
PATIENCE = 20.0  # seconds in which the other ranks end once one has failed
KILLED_WITH_PARENT = 1, signal.SIGKILL  # PR_SET_PDEATHSIG of <linux/prctl.h>

LayoutOption = Annotated[
    str | None,
    typer.Option(
        "--layout", metavar="[ep|dp+ep|tp+ep]", help="of several ranks: what each has, see porthal launch; default: ep"
    ),
]


ExpertsOption = Annotated[
    Path | None,
    typer.Option("--experts", metavar="FILE.json", help="of several ranks: the experts of each, as [[0, 1], [1, 2]]"),
]


def listed(file: Path) -> tuple[tuple[int, ...], ...]:
    """The experts of each rank, as a file lists them; UsageError where it does not."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the table of experts {file}: {error}") from None
    if not (isinstance(found, list) and found and all(isinstance(row, list) for row in found)):
        raise UsageError(f"{file} is no table of experts: expected a list of experts for each rank, as [[0, 1], [1, 2]]")
    for number in (n for row in found for n in row):
        if type(number) is not int:
            raise UsageError(f"{file} lists {number!r} among the experts of a rank: expected numbers, as [[0, 1], [1, 2]]")
    return tuple(map(tuple, found))


@contextmanager
def ranked(backend: Backend, layout: str | None, experts: Path | None = None) -> Iterator[Layout | None]:
    """This rank's part where the environment says that there are ranks (torchrun and `porthal launch` do), else None."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        for name, given in (("--layout", layout), ("--experts", experts)):
            if given:
                raise UsageError(f"{name} {given} is for several ranks: start them with porthal launch or torchrun")
        yield None
        return
    from porthal.model.layout import Layout

    with backend.communicator() as comm:
        yield Layout(comm, layout or "ep", listed(experts) if experts else ())


def launch(
    command: Annotated[list[str], typer.Argument(show_default=False, metavar="COMMAND...", help="generate and its options")],
    ranks: Annotated[int, typer.Option("--ranks", metavar="N", min=1, max=MOST, help="processes of this machine")] = 2,
) -> int:
    """Run a command as several ranks, each of which has a part of the model; rank 0 alone writes its output, and what several
    say is said once.

    Experts lie on ranks in blocks. With --layout ep all else is on every rank; with dp+ep each rank computes requests of its
    own; with tp+ep attention heads and dense layers are shared. The text does not depend on it.
    """
    if command[0] != "generate":
        raise UsageError(
            f"launch runs generate, not {command[0]!r}: porthal conform --profile distributed tests calls of several ranks, "
            "porthal bench --ranks N times them"
        )
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    common = {"OMP_NUM_THREADS": str(threads), **os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(_port())}
    started: list[subprocess.Popen[Any]] = []
    said = Said()
    with stoppable():
        try:
            for rank in range(ranks):
                environment = {**common, "RANK": str(rank), "WORLD_SIZE": str(ranks)}
                arguments = [sys.executable, "-m", "porthal", *command]
                out = text.stdout() if rank == 0 else subprocess.DEVNULL
                pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.PIPE}
                started.append(subprocess.Popen(arguments, env=environment, preexec_fn=_with_parent, **pipes))
                said.listen(started[-1])
            return _ended(started)
        finally:
            for each in started:
                each.kill()
                each.wait()
            said.close()


class Said:
    """What ranks write on stderr, line by line: a line that another rank has written as often is not written again."""

    def __init__(self) -> None:
        self.written: Counter[bytes] = Counter()
        self.turn = threading.Lock()
        self.listeners: list[threading.Thread] = []

    def listen(self, rank: subprocess.Popen[Any]) -> None:
        self.listeners.append(threading.Thread(target=self._listen, args=(rank.stderr,), daemon=True))
        self.listeners[-1].start()

    def _listen(self, pipe: BinaryIO) -> None:
        own: Counter[bytes] = Counter()
        with pipe:
            for line in pipe:
                own[line] += 1
                with self.turn:
                    if own[line] > self.written[line]:
                        self.written[line] += 1
                        text.note(line.decode(errors="replace").removesuffix("\n"))

    def close(self) -> None:
        for each in self.listeners:
            each.join()


def _ended(started: list[subprocess.Popen[Any]]) -> int:
    """The exit code of the first that fails, else 0; the others have a while to say what they miss."""
    failed, end = 0, float("inf")
    while (codes := [each.poll() for each in started]).count(None) and time.monotonic() < end:
        if wrong := next((code for code in codes if code), 0):
            failed, end = failed or wrong, min(end, time.monotonic() + PATIENCE)
        time.sleep(0.02)
    failed = failed or next((code for code in codes if code), 0)
    return 128 - failed if failed < 0 else failed


def _port() -> int:
    """Ranks of one machine meet under a name that has this number, not at a port."""
    return 1024 + os.getpid() % 60000


def _with_parent() -> None:
    ctypes.CDLL(None).prctl(*KILLED_WITH_PARENT)
