"""`porthal check`: a minute's answer."""

from __future__ import annotations

from porthal.cli import text
from porthal.cli.options import (
    WORKERS,
    BackendOption,
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
) -> int:
    """Does this port lie? A minute's look in bfloat16: a model's calls in its own sizes, and the demo checkpoint's bits per
    byte, multi-byte text and accepted drafts against the reference's.

    Exit code 1 when something does not hold, 2 when no kernel of the chip's own was called. `conform` is the proof.
    """
    from porthal.cli.selecting import tested
    from porthal.conformance.cases.profiles import MODEL
    from porthal.conformance.diff.check import check as run
    from porthal.conformance.runner.workers import Bounds

    with stoppable(), text.progress() as advance:
        name = tested(backend, emulated)
        found = run(name, str(model or MODEL), emulated, Bounds(workers, timeout, memory), advance)
    text.drawn(found.table())
    return found.exit_code
