"""Which of a chip's kernels is the fastest: each judged, then timed on the calls that several of them take."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from porthal.bench.measured import Measured
from porthal.bench.run import COLD, Progress, bench
from porthal.bench.scale import EXPERTS, Bounds
from porthal.bench.workloads import Row, Workload
from porthal.hal import Backend, CallSpec, UsageError, contracts
from porthal.hal.tuned import FREE, Table, Timed, first_of

UNTIMED = ("", "UNCLAIMED", "LEFT_OUT")  # verdicts that say nothing against a kernel


class Tuned(NamedTuple):
    """What is kept from now on, the calls of it that were timed now, and by token why a kernel was not timed."""

    table: Table
    calls: list[Timed]
    wrong: dict[str, str]
    left: dict[str, str]


def several(backend: Backend, workload: Workload) -> Workload:
    """The calls that at least two kernels of the backend take, once for each of them. UsageError where there is none."""
    rows = [replace(row, case=replace(row.case, via=p)) for row in workload.rows for p in _takers(backend, row)]
    if not rows:
        raise UsageError(f"no call of {workload.name} is taken by two kernels of {backend}: there is nothing to choose from")
    return replace(workload, rows=tuple(rows), whole=None, part=True)


def _takers(backend: Backend, row: Row) -> Sequence[str]:
    kernels = backend.candidates(contracts()[row.case.op]) if row.spec else ()
    taking = [k.provider for k in kernels if k.owner == backend.name and row.spec and not k.refuses(row.spec)]
    return taking if len(taking) > 1 else ()


def tune(
    backend: Backend, workload: Workload, ops: Sequence[str], bounds: Bounds, seconds: float, progress: Progress | None = None
) -> Tuned:
    """Time each call of these ops ([]: all) with each kernel that takes it, within about so many seconds.

    Raises UsageError where the backend does not run on hardware, and where there is nothing to choose from.
    """
    if backend.place != "hardware":
        raise UsageError(f"{backend} runs on: {backend.place}, which has no speed; run porthal tune where the chip is")
    known = backend.alternatives()
    if not (asked := [op for op in known if not ops or op in ops]):
        among = f"{backend} has several kernels for {', '.join(known) or 'no op'}"
        raise UsageError(f"there is nothing to choose from: {among}{f', not for {ops[0]}' if ops else ''}")
    calls = several(backend, workload.only(asked, bounds))
    smaller = {row.case.token: f"its sizes are not the model's: {row.scaled}" for row in calls.rows if not _measured_as(row)}
    calls = replace(calls, rows=tuple(filter(_measured_as, calls.rows)))
    run = bench(calls, [str(backend)], len(os.sched_getaffinity(0)), seconds, progress=progress)
    found: dict[str, Measured] = {}
    for m in sorted(run.found, key=lambda m: m.cache != COLD):
        found.setdefault(m.token, m)
    timed = list(_timed(run.workload, found))
    wrong = {token: m.why for token, m in found.items() if _wrong(m)}
    noisy = {token: f"too noisy ({m.summary.noise:.2f})" for token, m in found.items() if m.samples and m.summary.noisy}
    left = {token: m.why for token, m in found.items() if not m.samples and token not in wrong}
    return Tuned(Table.updated(backend, timed), timed, wrong, smaller | noisy | left)


def _wrong(m: Measured) -> bool:
    return not m.samples and m.verdict not in UNTIMED


def _timed(workload: Workload, found: Mapping[str, Measured]) -> Iterator[Timed]:
    """Calls that tell one kernel from another: at least two were judged, one of them was right."""
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in workload.rows:
        alike.setdefault((row.group, replace(row.case, via="").token), []).append(row)
    today = time.strftime("%Y-%m-%d")
    for (_, token), rows in alike.items():
        seconds: dict[str, float | None] = {}
        for row in rows:
            m = found[row.case.token]
            if _wrong(m):
                seconds[row.case.via] = None
            elif m.samples and not m.summary.noisy:
                seconds[row.case.via] = m.summary.median
        spec = _measured_as(rows[0])
        if spec and len(seconds) > 1 and any(seconds.values()):
            yield Timed(rows[0].case.op, spec, seconds, token, today)


def _measured_as(row: Row) -> CallSpec | None:
    """The step's call with as many rows as were timed, or as many for each expert; None where it was made smaller otherwise."""
    assert row.spec
    contract, made, dims = contracts()[row.case.op], dict(row.case.dims), dict(row.spec.dims)
    free = FREE | {contract.rows, EXPERTS} | {d for o in contract.signature.of_kind("Batch") for d in o.dims}
    if any(made.get(name, size) != size for name, size in dims.items() if name not in free):
        return None
    if contract.rows in made:
        share = dims[EXPERTS] / made[EXPERTS] if EXPERTS in dims else 1  # type: ignore[operator]
        dims[contract.rows] = min(first_of(row.spec, contract), round(made[contract.rows] * share))
    return replace(row.spec, dims=dims)
