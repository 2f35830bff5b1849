"""The time left of a run is told within a factor of 1.5 after its first minute."""

from __future__ import annotations

import gzip
from contextlib import suppress
from pathlib import Path

import pytest

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.cost import operations
from porthal.conformance.cases.plan import cases
from porthal.conformance.report.results import Result
from porthal.conformance.runner import remaining
from porthal.conformance.runner.remaining import Remaining, weight
from porthal.conformance.verdicts import Judgement
from porthal.hal import UsageError, contracts

RECORDED = Path(__file__).parents[1] / "seconds-of-standard-on-torch.txt.gz"
WORKERS = 2


def recorded() -> dict[Case, float]:
    """What each case of a run took, the plan of which need not be that of today."""
    found: dict[Case, float] = {}
    lines = gzip.decompress(RECORDED.read_bytes()).decode().splitlines()
    for line in lines:
        seconds, _, token = line.partition(" ")
        with suppress(UsageError):  # of an op that has another version now
            found[Case.from_token(token)] = float(seconds)
    assert len(found) > 0.8 * len(lines)
    return found


@pytest.mark.parametrize("warm", [False, True])
def test_a_recorded_run_is_foreseen_after_a_minute(monkeypatch: pytest.MonkeyPatch, warm: bool) -> None:
    """Cold, and with golden values on disk, where what is not the reference's is left."""
    clock = 0.0
    monkeypatch.setattr(remaining.time, "monotonic", lambda: clock)
    took = {case: min(seconds, 0.05 + seconds / 3) if warm else seconds for case, seconds in recorded().items()}
    whole, spent = sum(took.values()), 0.0
    left = Remaining(list(took))
    assert set(left.cases) == set(took) and len(left.cases) == len(took)
    told = []
    for case in left.cases:
        spent += took[case]
        clock = spent / WORKERS
        said = left.after(Result.of(case, Judgement("PASS"), None, took[case]))
        if clock > 60 and whole - spent > 0.1 * whole:
            told.append(said / ((whole - spent) / WORKERS))
    assert len(told) > 1000 and min(told) > 1 / 1.5 and max(told) < 1.5


def test_every_op_shows_its_pace_first() -> None:
    planned = [case for op in ("add", "linear", "topk") for case in cases(contracts()[op], "standard")]
    ordered = Remaining(planned).cases
    few = (len(planned) - 3 * remaining.HUGE) // remaining.FIRST
    assert {case.op for case in ordered[:few]} == {"add", "linear", "topk"}
    assert {case.token for case in ordered} == {case.token for case in planned}
    assert max(map(weight, ordered[:few])) < max(map(weight, planned))


@pytest.mark.parametrize("op", contracts())
def test_the_operations_of_every_case_are_known(op: str) -> None:
    planned = [case for case in cases(contracts()[op], "standard") if not case.fault]
    assert min(map(operations, planned)) >= 0
    assert max(map(weight, planned)) > 2 * min(map(weight, planned)) >= 2 * remaining.CASE


def test_no_worker_has_a_heavy_case_left_when_others_are_done() -> None:
    took = recorded()
    for op in sorted({case.op for case in took}):
        free = [0.0] * WORKERS
        for case in Remaining([case for case in took if case.op == op]).cases:
            free[free.index(min(free))] += took[case]
        assert max(free) < 1.05 * sum(free) / WORKERS, op
