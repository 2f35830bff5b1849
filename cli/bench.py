"""`porthal bench`: how fast backends are, beside each other and against what the machine can do."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from porthal.cli import text
from porthal.cli.options import CacheOption, Dtype, PeersOption, dtype_of
from porthal.cli.ranks import MOST
from porthal.cli.selecting import among
from porthal.cli.stopping import stoppable
from porthal.cli.text import print
from porthal.hal import UsageError

GIB = 2**30
MEMORY = 0.5  # GiB


def bench(
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="A,B,...", help="side by side; default: the first available")
    ] = None,
    op: Annotated[list[str] | None, typer.Option("--op", metavar="OP", help="only this one; may be repeated")] = None,
    workload: Annotated[
        str, typer.Option("--workload", metavar="glm5|half|demo|FILE", help="of trace --json, or of FlashInfer-Bench")
    ] = "glm5",
    step: Annotated[
        list[str] | None, typer.Option("--step", metavar="decode|prefill|verify", help="default: decode; may be repeated")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", parser=dtype_of, metavar="DTYPE", help="default: bfloat16, of demo float32")
    ] = None,
    cache_scheme: CacheOption = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="cost of a token against its context, sparse and dense, as Markdown")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", metavar="N", min=2, max=MOST, help="time calls of so many processes: all-to-all and its like"),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="of each backend; default: all processors")] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=1, help="about how long to measure in all")] = 240,
    memory: Annotated[float, typer.Option(metavar="GIB", help="for the operands of one call, on each backend")] = MEMORY,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write it in pytest-benchmark's format")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write it as one page")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="keep each time there, and continue from those kept")
    ] = None,
    peers: PeersOption = None,
) -> int:
    """Time ops, each judged right on the very call first, against the limits of the machine.

    Exit code 1 when a call is wrong or faster than the limit permits, 2 when nothing was timed.
    """
    from porthal.bench import curve as curves
    from porthal.bench import ranked
    from porthal.bench.compare import comparison
    from porthal.bench.report import Report, check_format
    from porthal.bench.run import bench as run
    from porthal.bench.scale import Bounds
    from porthal.bench.speeds import Speeds
    from porthal.bench.workloads import workload as named
    from porthal.hal import selected

    here, known = len(os.sched_getaffinity(0)), among(peers)
    if threads and threads > here:
        raise UsageError(f"--threads is {threads}: expected at most {here}, the processors that this process may use")
    if not 0 < memory < math.inf:
        raise UsageError(f"--memory is {memory}: expected a number of GiB above 0")
    journal = resume or (json and json.with_name(f"{json.name}.journal"))
    text.check_writable(json=json, html=html, resume=journal)
    if json:
        check_format()
    bounds = Bounds(memory=memory * GIB)
    if curve and (op or step or cache_scheme or workload != "glm5"):
        raise UsageError("--curve has calls of its own: give it without --op, --step, --workload and --cache-scheme")
    others = {"--curve": curve, "--workload": workload != "glm5", "--step": step, "--dtype": dtype, "--threads": threads,
              "--resume": resume, "--peers": peers, "--cache-scheme": cache_scheme, "--memory": memory != MEMORY}  # fmt: skip
    if ranks and (given := [option for option, value in others.items() if value]):
        raise UsageError(f"--ranks has calls of its own, with one thread each: give it without {', '.join(given)}")
    kind = dtype.value if dtype else ""
    if ranks:
        calls = ranked.collective(ranks, op or ())
    elif curve:
        calls = curves.curve(kind or "bfloat16", bounds)
    else:
        calls = named(workload, step or ["decode"], kind, bounds, cache_scheme or ())
    if op and not ranks:
        calls = calls.only(op, bounds)
    if not calls.rows:
        raise UsageError(f"{workload} has no call to time: choose other steps or ops")

    def advice() -> str:
        if ranks:
            return "give more --seconds, or fewer ops"
        kept = journal and journal.exists()
        return f"run the same command with --resume {journal} to continue" if kept else "nothing is kept without --resume FILE"

    with stoppable(advice), text.progress() as advance:
        names = (backend or selected()[0]).split(",")
        if ranks:
            found = Report(ranked.bench(calls, names, ranks, seconds, advance))
        else:
            found = Report(run(calls, names, threads or here, seconds, journal, resume is not None, advance, known))
    if curve:
        for line in (*curves.markdown(found.run), "", *found.said()):
            print(line)
    else:
        text.drawn(found.table())
    if json:
        text.save(json, found.json())
    if html and found.run.timed:
        text.save(html, comparison(Speeds.of_object(found.document)).html())
    if journal and found.run.late:
        text.note(f"porthal: there was no time left for some calls: {advice()}")
    elif journal and not resume and not ranks:  # the report has all of it
        journal.unlink()
    if found.exit_code == 2:
        print("nothing was timed: what stood against it is said above")
    return found.exit_code
