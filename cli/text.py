"""Printing: tables, numbers, JSON, progress. Colour and width fitting only on a terminal; plain lines otherwise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from porthal.hal import UsageError

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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on stdout; a terminal gets them coloured and folded to its width."""
    if not sys.stdout.isatty():
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
    Console().print(drawn)


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def si(value: float, unit: str) -> str:
    """1234567 bytes -> "1.23 MB"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            break
        value /= 1000
    else:
        prefix = "P"
    return f"{value:.3g} {prefix}{unit}"


def note(line: str) -> None:
    print(line, file=sys.stderr)


def write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr fed by (done, total, what); None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
