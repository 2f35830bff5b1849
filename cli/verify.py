"""`porthal verify`: somebody's report put to the test here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import WORKERS, MemoryOption, TimeoutOption, WorkersOption, share_of
from porthal.cli.stopping import stoppable
from porthal.hal import UsageError


def verify(
    report: Annotated[Path, typer.Argument(show_default=False, metavar="RESULT.json", help="of conform or of bench")],
    share: Annotated[
        float, typer.Option("--share", parser=share_of, metavar="5%", help="of its rows, drawn at random; one at least")
    ] = 0.05,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="NAME[:DEVICE]", help="default: that of the report")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the report with what came out as its mark")
    ] = None,
    workers: WorkersOption = WORKERS,
    timeout: TimeoutOption = 300,
    memory: MemoryOption = 3,
) -> int:
    """Run a random part of somebody's report again here, and say which rows hold.

    Pages and comparisons of the file that --json writes say reproduced, or not, instead of self-reported. Exit code 1 where
    a row does not hold.
    """
    from porthal.bench.scale import Bounds as Sizes
    from porthal.bench.speeds import Speeds, read_report
    from porthal.bench.verify import verify as time_again
    from porthal.conformance.report.files import read
    from porthal.conformance.runner.verify import verify as run_again
    from porthal.conformance.runner.workers import Bounds

    text.check_writable(json=json)
    if json and json.resolve() == report.resolve():
        raise UsageError(f"--json is {json}, which is the report itself: give another file")
    made, bounds = read_report(report), Bounds(workers, timeout, memory)
    with stoppable(), text.progress() as advance:
        if isinstance(made, Speeds):
            threads = min(made.threads, len(os.sched_getaffinity(0)))
            found = time_again(made, share, threads, backend or "", Sizes(memory * 2**30), advance)
        else:
            found = run_again(made, share, backend or "", bounds, advance)
    text.drawn(found.table())
    if json:
        text.save(json, found.marked(read(report, dict)))
    return found.exit_code
