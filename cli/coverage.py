"""`porthal coverage`: which sizes are tested."""

from __future__ import annotations

from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import HIGHER, JsonFlag, LevelOption


def coverage(
    op: Annotated[list[str] | None, typer.Option("--op", metavar="OP", help="only this one; may be repeated")] = None,
    level: LevelOption = HIGHER,
    json: JsonFlag = False,
) -> None:
    """Which sizes the planned cases cross, where tiles, counters and grids end, and why not the others."""
    from porthal.conformance.report import coverage as report
    from porthal.hal import contracts

    found = [row for name in op or contracts() for row in report.rows(name, level.value)]
    if json:
        text.as_json(report.as_json(found))
    else:
        text.table(*(report.table(found) if op else report.summary(found)))
