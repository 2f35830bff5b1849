"""`porthal tune`: which of a chip's kernels is the fastest for a call, kept where binding looks for it."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import BackendOption, Dtype, dtype_of
from porthal.cli.stopping import stoppable
from porthal.cli.text import print

SIZES = {"glm5": " --model glm-5", "demo": ""}  # how porthal explain is told of a workload
JUDGED = 30.0  # seconds to judge a call at most: one whose matrices are made narrower says nothing of what it stands for


def tune(
    backend: BackendOption = None,
    op: Annotated[list[str] | None, typer.Option("--op", metavar="OP", help="only this one; may be repeated")] = None,
    workload: Annotated[str, typer.Option("--workload", metavar="glm5|half|demo", help="whose calls are timed")] = "glm5",
    step: Annotated[
        list[str] | None, typer.Option("--step", metavar="decode|prefill|verify", help="default: decode, prefill; repeatable")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", parser=dtype_of, metavar="DTYPE", help="default: bfloat16, of demo float32")
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=1, help="about how long to measure in all")] = 240,
    memory: Annotated[float, typer.Option(metavar="GIB", min=0.01, max=1024, help="for the operands of one call")] = 1,
) -> int:
    """Time the kernels among which a backend chooses, each judged first, and keep a table that its choice reads from then on.

    Exit code 1 when a kernel was wrong, 2 when no table was made.
    """
    from porthal.bench.scale import Bounds
    from porthal.bench.tune import tune as run
    from porthal.bench.workloads import workload as named
    from porthal.hal import contracts, create, running, selected
    from porthal.hal.tuned import file_of, said

    made, bounds = create(backend or selected()[0]), Bounds(memory * 2**30, JUDGED)
    calls = named(workload, step or ["decode", "prefill"], dtype.value if dtype else "", bounds)
    with running(made):
        file, before = file_of(made), made.tuned.why
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
    text.check_writable(table=file)
    with running(made), stoppable(lambda: "nothing is kept of it"), text.progress() as advance:
        found = run(made, calls, op or (), bounds, seconds, advance)
    table, known = found.table, contracts()
    rows = dict.fromkeys((call.op, said(table.turns(known[call.op], call.spec))) for call in found.calls)
    if rows:
        text.table(["op", "kernels"], list(rows))
    for token, why in {**found.wrong, **found.left}.items():
        print(f"not timed: {token}: {why}")
    if not found.calls:
        print("nothing is kept: of no call two kernels were timed; give more --seconds, on a machine that does nothing else")
    else:
        if before and file.is_file():
            print(f"replaced: {before}")
        table.save(file)
        shown = f"porthal explain --backend {made}{SIZES[workload]} --dtype {calls.dtype}" if workload in SIZES else ""
        print(f"kept in {file}{shown and f': {shown} shows what is chosen'}")
    return 1 if found.wrong else 0 if found.calls else 2
