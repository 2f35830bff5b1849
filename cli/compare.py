"""`porthal compare`: reports of conformance or of speed beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from porthal.cli import text
from porthal.cli.options import share_of
from porthal.cli.text import print
from porthal.hal import UsageError

if TYPE_CHECKING:
    from porthal.bench.compare import Comparison as Times
    from porthal.conformance.report.compare import Comparison as Proofs


def compare(
    files: Annotated[list[Path], typer.Argument(show_default=False, metavar="A.json B.json", help="2 to 8, of one kind")],
    fail_over: Annotated[
        float | None,
        typer.Option("--fail-over", parser=share_of, metavar="5%", help="exit with 1 where a later report is that much worse"),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write the comparison as one page")] = None,
) -> int:
    """Reports of `conform --json`, or of `bench --json`, beside each other; the first is what the others are compared with.

    Speed: per op how many times as fast, with the 95 % interval, and whole steps. Conformance: whose own kernels cover more,
    with smaller errors. With --fail-over, exit code 1 when an op or a step takes that much longer, or that share of
    the cases that passed passes no more.
    """
    text.check_writable(html=html)
    if html and (read := next((file for file in files if file.resolve() == html.resolve()), None)):
        raise UsageError(f"--html is {read}, which is one of the reports: give another file")
    found = compared(files)
    text.drawn(found.table())
    if html:
        text.save(html, found.html())
    worse = [] if fail_over is None else found.regressions(fail_over)
    for sentence in worse:
        print(f"worse: {sentence}")
    return int(bool(worse))


def compared(files: list[Path]) -> Proofs | Times:
    """Reports of one kind beside each other."""
    from porthal.bench.compare import comparison as times
    from porthal.bench.speeds import Speeds, read_report
    from porthal.conformance.report.compare import comparison as proofs
    from porthal.conformance.report.differences import LETTERS
    from porthal.conformance.report.report import Report

    if not 2 <= len(files) <= len(LETTERS):
        raise UsageError(f"got {len(files)} report{'s' * (len(files) != 1)}: expected 2 to {len(LETTERS)}")
    made: list[Any] = [read_report(file) for file in files]
    kinds = {Report: "a conformance report", Speeds: "a benchmark file"}
    for file, report in zip(files, made):
        if type(report) is not type(made[0]):
            what = f"{files[0]} is {kinds[type(made[0])]} and {file} is {kinds[type(report)]}"
            raise UsageError(f"{what}: compare reports of one kind")
    return times(*made) if type(made[0]) is Speeds else proofs(*made)
