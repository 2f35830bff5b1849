"""Printing: tables, numbers, JSON, progress. Colour and width fitting only on a terminal; plain lines otherwise.

Stdout is porthal's alone, so that it is JSON, or compares with `diff`, whatever a vendor's package prints: that goes to
stderr.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from porthal.hal import UsageError
from porthal.hal.errors import NoReader

if TYPE_CHECKING:
    from rich.console import Group

EVERY = 10.0  # seconds between two lines on progress, and before the time left is told
STYLES = {
    "available": "green",
    "broken": "red",
    "not here": "dim",
    "own": "green",
    "inherited": "dim",
    "composed": "cyan",
    "fallback": "yellow",
    "missing": "red",
}

_ours: TextIO | None = None  # while sys.stdout is that of others


def keep_stdout() -> None:
    """Give this process a stdout of its own, and everything that writes to descriptor 1, as C does, stderr."""
    with suppress(OSError, AttributeError):  # one of the two is closed
        ours = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
        os.dup2(2, 1)
        sys.stdout = ours


@contextmanager
def alone() -> Iterator[None]:
    """Within, what others print from Python goes to stderr too."""
    global _ours
    _ours = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _ours = None


def stdout() -> TextIO:
    return _ours or sys.stdout


def print(line: str = "") -> None:
    with written():
        builtins.print(line, file=stdout())


@contextmanager
def written() -> Iterator[None]:
    """Around what is written to stdout: a disk that is full is no fault of a backend."""
    try:
        yield
    except BrokenPipeError as error:  # whoever read it has enough
        raise NoReader(*error.args) from None
    except OSError as error:
        raise UsageError(f"cannot write to stdout: {error.strerror}") from None


def finish(code: object) -> object:
    """The exit code after all is written: 141, as of a signal, where nobody reads any more, 2 where it cannot be written."""
    try:
        sys.stdout.flush()
        return code
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python does not try again at its end
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        if not code:  # else it has been said
            note(f"porthal: cannot write to stdout: {error.strerror}")
        return 2


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on stdout; a terminal gets them coloured and folded to its width."""
    if not stdout().isatty():
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in head:
        drawn.add_column(name, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row))
    Console(file=stdout()).print(drawn)


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def si(value: float, unit: str) -> str:
    """1234567 bytes -> "1.23 MB"."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(value) >= 1000:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}{unit}"


def note(line: str) -> None:
    with suppress(OSError):  # a terminal that has gone
        builtins.print(line, file=sys.stderr, flush=True)


def save(file: Path, content: str) -> None:
    """Write a file that people asked for: whole, or as it was. UsageError where that is not possible."""
    beside = file.with_name(f"{file.name}.part")
    try:
        if not file.exists() or file.is_file():
            beside.write_text(content, encoding="utf-8")
            beside.replace(file.resolve())
        else:  # a pipe, or a device
            file.write_text(content, encoding="utf-8")
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UsageError(f"cannot write {file}: {error.strerror}; what it was to hold is printed above") from None


def check_writable(**files: Path | None) -> None:
    """Raise UsageError before long work if a file cannot be written after it, or if two of them are one; leaves none behind.

    The keywords are the options that name the files.
    """
    seen: dict[str, str] = {}
    for option, file in files.items():
        if not file:
            continue
        if str(file) in ("/dev/stdout", "/dev/fd/1"):  # which is stderr by now
            raise UsageError(f"--{option} is {file}, where the table is printed: expected the name of a file")
        if other := seen.get(real := os.path.realpath(file)):
            raise UsageError(f"--{other} and --{option} are both {file}: give each a file of its own")
        seen[real] = option
        try:
            new = not file.exists()
            if not file.is_fifo():  # whose reader would take the check for the end
                file.open("ab").close()
            if new:
                os.unlink(real)
        except OSError as error:
            expected = "expected a file name in a folder that exists and is writable"
            raise UsageError(f"cannot write {file}: {error.strerror}, {expected}") from None


def drawn(parts: Group) -> None:
    """A rich group on stdout: tables fitted to a terminal, all other lines whole, so that they can be copied."""
    from rich.console import Console
    from rich.table import Table

    if stdout().isatty():
        console = Console(file=stdout())
        for part in parts.renderables:
            console.print(part, soft_wrap=not isinstance(part, Table))
        return
    console = Console(width=1000, file=stdout())
    with console.capture() as captured:
        for part in parts.renderables:
            console.print(part, soft_wrap=not isinstance(part, Table))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """A bar on stderr fed by (done, total, what, seconds left); None takes the pace so far for that of the rest. Where
    stderr is not a terminal, a line now and then."""
    began, shown = time.monotonic(), 0.0

    def remaining(done: int, total: int, left: float | None) -> str:
        ran = time.monotonic() - began
        minutes, seconds = divmod(round(ran * (total - done) / done if left is None else left), 60)
        return f"{minutes}:{seconds:02} left" if ran > EVERY else ""

    if not sys.stderr.isatty():

        def line(done: int, total: int, what: str, left: float | None = None) -> None:
            nonlocal shown
            if not shown or time.monotonic() - shown > EVERY:
                shown = time.monotonic()
                note(f"{done}/{total} {what} {remaining(done, total, left)}".rstrip())

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    what = TextColumn("{task.fields[left]} {task.description}", markup=False)
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), what, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=None, left="")

        def advance(done: int, total: int, name: str, left: float | None = None) -> None:
            bar.update(task, completed=done, total=total, description=name, left=remaining(done, total, left))

        yield advance


def note_saved(file: Path, returned: bool) -> None:
    """Say how a saved call is used."""
    lacks = "" if returned else " without results, because none came back"
    note(f"saved{lacks}: `python {file.with_suffix('.py')}` measures it, `porthal replay {file}` judges it again")
