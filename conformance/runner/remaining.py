"""How long a run still takes: cases weighed by what they compute, at the pace that their op has shown so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from math import log

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.cost import operations
from porthal.conformance.cases.legal import elements
from porthal.conformance.report.results import Result

# Seconds of a case, of one of its numbers, of a float operation of its reference: only how these compare counts.
CASE, NUMBER, FLOP = 3e-3, 1e-7, 5e-10
LATE = 0.2  # of the operations, where the reference computes a small call
FIRST = 8  # of an op's cases every so many run before the others,
HUGE = 3  # but for the largest
DOUBT = 0.02  # seconds of an op, or of its cases that are about as heavy, that count as much as what more cases have shown
ALIKE = 4.0  # times as heavy
Kind = tuple[str, int | None]  # an op and the magnitude of a weight; of any weight, or of any op


def weight(case: Case) -> float:
    """About how many seconds a case takes, up to a factor that its op has."""
    if case.fault:
        return CASE
    flops = 0.0
    with suppress(Exception):  # of a plugin's contract: an estimate must not end a run
        flops = operations(case)
    return CASE + NUMBER * elements(case) + FLOP * flops * (LATE if case.distinct else 1.0)


class Remaining:
    """The time left of a run, whose `cases` are in an order that tells it early: some of every op, then the heaviest ops, and
    of each the heaviest first, so that no worker is left with one at the end."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.began = time.monotonic()
        self._weights = {case.token: weight(case) for case in cases}
        self._open, self._done, self._spent = (defaultdict[Kind, float](float) for _ in range(3))
        by_op: dict[str, list[Case]] = {}
        for case in sorted(cases, key=lambda case: -self._weights[case.token]):
            by_op.setdefault(case.op, []).append(case)
            for kind in self._kinds(case.op, case.token):
                self._open[kind] += self._weights[case.token]
        first = {case.token: case for each in by_op.values() for case in each[HUGE::FIRST]}
        heavy = sorted(by_op, key=lambda op: -self._open[op, None])
        self.cases = [*first.values(), *(case for op in heavy for case in by_op[op] if case.token not in first)]

    def _kinds(self, op: str, token: str) -> list[Kind]:
        """What a case's pace is like: that of cases about as heavy of its op, of its op, of all."""
        return [(op, round(log(self._weights.get(token, CASE), ALIKE))), (op, None), ("", None)]

    def after(self, result: Result) -> float:
        """The seconds left when this result has come."""
        known = self._weights.get(result.token, 0.0)
        for kind in self._kinds(result.op, result.token):
            for each, seconds in ((self._open, -known), (self._done, known), (self._spent, result.seconds)):
                each[kind] += seconds
        spent = self._spent["", None]
        left = sum(most * self._pace(kind) for kind, most in self._open.items() if kind[1] is not None)
        return left * (time.monotonic() - self.began) / max(spent, CASE)

    def _pace(self, kind: Kind) -> float:
        """Seconds for each unit of weight, as far as is known: in doubt that of a wider kind."""
        op, size = kind
        usual = self._pace((op, None)) if size is not None else self._pace(("", None)) if op else 1.0
        return (self._spent[kind] + DOUBT * usual) / (self._done[kind] + DOUBT)
