"""How long a run still takes: cases weighed by what they compute, at the pace that their op has shown so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.cost import operations
from porthal.conformance.cases.legal import elements
from porthal.conformance.report.results import Result

# Seconds of a case, of one of its numbers, of a float operation of its reference: only how these compare counts.
CASE, NUMBER, FLOP = 3e-3, 1e-7, 5e-10
LATE = 0.2  # of the operations, where the reference computes a small call
FIRST = 8  # of an op's cases every so many run before the others,
HUGE = 3  # but for the largest
DOUBT = 0.02  # seconds of an op that count as much as what all have shown


def weight(case: Case) -> float:
    """About how many seconds a case takes, up to a factor that its op has."""
    if case.fault:
        return CASE
    flops = 0.0
    with suppress(Exception):  # of a plugin's contract: an estimate must not end a run
        flops = operations(case)
    return CASE + NUMBER * elements(case) + FLOP * flops * (LATE if case.distinct else 1.0)


class Remaining:
    """The time left of a run, whose `cases` are in an order that tells it early: some of every op, then the heaviest ops."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.began = time.monotonic()
        self._weights = {case.token: weight(case) for case in cases}
        self._open, self._done, self._spent = (defaultdict[str, float](float) for _ in range(3))
        by_op: dict[str, list[Case]] = {}
        for case in cases:
            by_op.setdefault(case.op, []).append(case)
            self._open[case.op] += self._weights[case.token]
        heavy = [sorted(each, key=lambda case: -self._weights[case.token]) for each in by_op.values()]
        first = {case.token: case for each in heavy for case in each[HUGE::FIRST]}
        rest = [case for case in cases if case.token not in first]
        self.cases = [*first.values(), *sorted(rest, key=lambda case: -self._open[case.op])]

    def after(self, result: Result) -> float:
        """The seconds left when this result has come."""
        known = self._weights.get(result.token, 0.0)
        for each, seconds in ((self._open, -known), (self._done, known), (self._spent, result.seconds)):
            each[result.op] += seconds
        spent = sum(self._spent.values())
        usual = spent / max(sum(self._done.values()), CASE)
        left = sum(
            most * (self._spent[op] + DOUBT * usual) / (self._done[op] + DOUBT) for op, most in self._open.items()
        )
        return left * (time.monotonic() - self.began) / max(spent, CASE)
