"""`porthal check`: a minute's answer."""

from __future__ import annotations

from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import (
    WORKERS,
    BackendOption,
    CacheOption,
    EmulatedFlag,
    MemoryOption,
    SizesOption,
    TimeoutOption,
    WorkersOption,
)
from porthal.cli.stopping import stoppable


def check(
    backend: BackendOption = None,
    model: SizesOption = None,
    emulated: EmulatedFlag = False,
    workers: WorkersOption = WORKERS,
    timeout: TimeoutOption = 60,
    memory: MemoryOption = 3,
    scheme: Annotated[
        str, typer.Option("--scheme", metavar="NAME", help="the demo checkpoint in this format, see porthal quantize")
    ] = "",
    cache_scheme: CacheOption = None,
) -> int:
    """Does this port lie? A minute's look in bfloat16: a model's calls in its own sizes, and the demo checkpoint's bits per
    byte, multi-byte text and accepted drafts against the reference's; under schemes of few bits if asked.

    Exit code 1 when something does not hold, 2 when no kernel of the chip's own was called. `conform` is the proof.
    """
    from porthal.cli.selecting import tested
    from porthal.conformance.cases.profiles import MODEL
    from porthal.conformance.diff.check import check as run
    from porthal.conformance.runner.workers import Bounds

    with stoppable(), text.progress() as advance:
        name = tested(backend, emulated)
        bounds = Bounds(workers, timeout, memory)
        found = run(name, str(model or MODEL), emulated, bounds, advance, scheme, cache_scheme or ())
    text.drawn(found.table())
    return found.exit_code
