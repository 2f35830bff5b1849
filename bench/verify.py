"""A benchmark file put to the test: calls drawn at random are timed again here."""

from __future__ import annotations

from collections.abc import Callable

from porthal.bench import ranked
from porthal.bench.compare import Ratio
from porthal.bench.measured import Measured
from porthal.bench.report import Report
from porthal.bench.run import SECONDS, bench
from porthal.bench.scale import Bounds
from porthal.bench.speeds import Call, Speed, Speeds, Timed, told
from porthal.bench.text import time_text
from porthal.bench.workloads import Row, Workload
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import elements
from porthal.conformance.report.verification import Checked, Verification, drawn, elsewhere
from porthal.hal import UsageError

SLOWER = 1.1  # times as long as the file says, from which on a row does not hold
ABSOLUTE = 3  # times as long in seconds, where the machine is the same
WIDEST = 8  # bytes of an element, at most


def verify(
    file: Speeds,
    share: float,
    threads: int,
    backend: str = "",
    bounds: Bounds | None = None,
    progress: Callable[[int, int, str, float], None] | None = None,
) -> Verification:
    """Time that share of a file's calls again, on the backends that they were timed on, or on this device of one of them.

    What is compared is the time as a multiple of what the machine's limit allows, each as measured in the same run: another
    machine is no reason to fail. A row holds unless its call is wrong here, significantly more than SLOWER times as slow, or
    faster than any limit permits, there or here; on the same machine, unless it takes ABSOLUTE times as long, too. What is too
    noisy here says nothing and is left out.
    Raises UsageError for a file without rows to run, a backend that is not timed in it, calls that do not fit `bounds`, and
    where all was too noisy.
    """
    sides = {name: side for name, side in file.by_backend.items() if not backend or _kind(name) == _kind(backend)}
    if not sides and file.by_backend:
        raise UsageError(f"--backend is {backend}, which has no times in the report: expected {' or '.join(file.by_backend)}")
    rows = [row for side in sides.values() for row in {key.call: row for key, row in side.items()}.values()]
    chosen = drawn(rows, share)
    cases = {row.token: _case(row.token, bounds or Bounds()) for row in chosen}
    said = {backend or row.backend: row.backend for row in chosen}
    names = list(said)
    workload = Workload("verify", "", tuple(Row(r.step, r.group, cases[r.token], r.calls, r.scaled) for r in chosen))
    ranks = max((_ranks(case) for case in cases.values()), default=0)
    run = (
        ranked.bench(workload, names, ranks, SECONDS, progress) if ranks else bench(workload, names, threads, progress=progress)
    )
    here = Report(run).facts()["backends"]
    found = {(m.backend, Call(m.token.partition(",")[0].partition("@")[0], m.token, m.cache)): m for m in run.timed}
    wrong = {(m.backend, m.token): m for m in run.found if not m.samples}
    checked, noisy = [], 0
    for row in chosen:
        name = backend or row.backend
        again = found.get((name, row.key.call)) or wrong.get((name, row.token))
        if again and again.samples and again.noisy:
            noisy += 1
        else:
            same = name in run.sides and run.sides[name].facts.device == _said(file, row.backend).get("device")
            checked.append(_checked(row, name, _ranks(cases[row.token]), again, same))
    if not checked:
        raise UsageError(f"all {noisy} rows that were drawn were too noisy here: try again when the machine is quiet")
    facts = [run.sides[name].facts for name in names]
    differences = [line for name in names for line in elsewhere(told(_said(file, said[name])), told(here[name]))]
    sources = {name: digest for each in facts for name, digest in each.sources.items()}
    where = ", ".join(f"{name} ({each.place})" for name, each in zip(names, facts))
    return Verification(tuple(checked), len(rows), where, facts[0].device, sources, tuple(dict.fromkeys(differences)), noisy)


def _case(token: str, bounds: Bounds) -> Case:
    """The call of a token; UsageError where somebody's file asks for more memory than is given."""
    case = Case.from_token(token)
    if WIDEST * elements(case) > bounds.memory:
        raise UsageError(f"{token} holds {elements(case):.3g} elements: expected a call that fits --memory")
    return case


def _kind(backend: str) -> str:
    """Without its device."""
    return backend.partition(":")[0]


def _said(file: Speeds, name: str) -> dict[str, object]:
    return dict(file.backends.get(name, {}))


def _ranks(case: Case) -> int:
    """How many ranks a call is of, 0 where it is none of several."""
    return dict(case.dims)["ranks"] if case.contract.collective else 0


def _checked(row: Speed, backend: str, ranks: int, again: Measured | None, same: bool) -> Checked:
    name, command = f"{row.op} [{row.token}], {row.cache}", f"porthal bench --backend {backend} --op {row.op}"
    command += f" --ranks {ranks}" * bool(ranks)
    if again is None or not again.samples:
        why = again.why if again else f"no time with {row.cache} caches"
        return Checked(name, row.words, why, False, f"porthal replay '{row.token}' --backend {backend}")
    limit, time = again.limit, Timed(again.summary.median, *again.summary.ci95)
    words = time_text(time.median) + (f", {again.share:.0%} of {limit.bound}" if limit.bound else "")
    scale = row.limit / limit.seconds if row.bound and limit.bound else 1.0
    ratio = Ratio.of(Timed(*(scale * seconds for seconds in time)), row.time)
    fast = ratio.high * SLOWER >= 1 and not (same and Ratio.of(time, row.time).high * ABSOLUTE < 1)
    return Checked(name, row.words, words, fast and not (row.impossible or again.impossible), command)
