"""Whether what a rank got is what the reference says that simulates all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.inputs import Array, Inputs
from porthal.conformance.cases.ranked import given, origin
from porthal.conformance.execution.outcome import differing
from porthal.conformance.judgement.golden import RUNS, Spread, widened
from porthal.conformance.judgement.judge import check_form, exactly_judged, judge_floats
from porthal.conformance.level import Level
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal.dtypes import dtype, narrow
from porthal.hal.numerics import noise

Named = dict[str, Array]


class Simulation:
    """All ranks of one group of a case, by the reference."""

    def __init__(self, case: Case, group: int = 0) -> None:
        self.case, self.contract = case, case.contract
        self.inputs = [given(case, rank, group) for rank in range(dict(case.dims)["ranks"])]

    @cached_property
    def results(self) -> list[Named]:
        """Of every rank."""
        return self._run()

    def _run(self) -> list[Named]:
        names = self.inputs[0].operands
        lists = {name: [widened(i.operands[name]) for i in self.inputs] for name in names}
        with np.errstate(all="ignore"):
            return [self.contract.named(out) for out in self.contract.reference(**lists, **self.inputs[0].attrs)]

    def rows(self, rank: int) -> dict[str, int]:
        """How many rows of a rank's results are specified, where not all are."""
        return dict(self.contract.specified(**self.results[rank])) if self.contract.specified else {}

    def noisy(self, rank: int) -> Iterator[Named]:
        """The results of a rank where the ranks round as the contract permits."""
        spec = self.inputs[rank].spec
        kinds = {**spec.dtypes, **{r.name: kind for r, _, kind in self.contract.results(spec)}}
        kinds = {"x": next(iter(spec.dtypes.values()), ""), **kinds}
        for run in range(RUNS):
            with noise(np.random.default_rng([run, zlib.crc32(self.case.stream.encode())]), kinds):
                yield self._run()[rank]

    def alike(self) -> list[str]:
        """The results that are the same on every rank."""
        first, *others = self.results
        return [n for n, v in first.items() if all(np.array_equal(v, o[n], equal_nan=v.dtype.kind == "f") for o in others)]

    def judged(self, rank: int, got: Named, limit: Level) -> Judgement:
        """What a rank got; raises Failed."""
        inputs, expected = self.inputs[rank], self.results[rank]
        check_form(inputs, got)
        rows = self.rows(rank)
        found = [Judgement("PASS")]
        for name, value in expected.items():
            y, g = got[name][: rows.get(name)], value[: rows.get(name)]
            if g.dtype != np.float64 or exactly_judged(inputs, g):
                _check_exact(inputs, name, y, narrow(g, dtype(y)) if g.dtype == np.float64 else g)
            else:
                found.append(self._judged_floats(rank, name, y, g, limit))
        return max(found, key=lambda each: each.worst)

    def _judged_floats(self, rank: int, name: str, y: Array, g: Array, limit: Level) -> Judgement:
        runs = [run[name][: len(g)] for run in self.noisy(rank)]
        with np.errstate(invalid="ignore"):
            off = [np.nan_to_num(np.abs(run - g), nan=0.0, posinf=0.0) for run in runs]
        sigma = np.sqrt(np.mean(np.square(off), axis=0))
        return judge_floats(self.inputs[rank], name, y, Spread(g, sigma, 6 * sigma), limit, lambda: runs)


def _check_exact(inputs: Inputs, name: str, y: Array, expected: Array) -> None:
    wrong = differing(y, expected)
    if not wrong.any():
        return
    at = tuple(int(i[0]) for i in np.nonzero(wrong))
    got, right = y[at], expected[at]
    words = f"{name}{list(at)} is {got}, expected {right}"
    source = inputs.contract.dtypes[name][0]
    tagged = source in inputs.operands and inputs.case.recipe(source) == "tagged" and got.dtype.itemsize == 4
    if tagged and np.isfinite(got):
        words += f": {origin(got)} in place of {origin(right)}"
    raise Failed("FAIL_VALUE", words, at=f"{name}{list(at)}")


def check_alike(simulation: Simulation, mine: Mapping[str, str], all_of: list[Mapping[str, str]]) -> None:
    """Raise Failed where a result that is the same on every rank has other bits on one; by the digests of all ranks."""
    for name in simulation.alike():
        for rank, theirs in enumerate(all_of):
            if theirs[name] != mine[name]:
                raise Failed("FAIL_VALUE", f"{name} has other bits than on rank {rank}, expected the same on every rank")


def judge_fault(case: Case, rank: int, error: BaseException | None, seconds: float, patience: float, at_fault: int) -> Any:
    """Whether a rank was told what another did, in one sentence and in time; raises Failed."""
    expected = "PeerLost" if case.fault in ("killed", "stalled") else "UsageError"
    if type(error).__name__ != expected:
        raise Failed("FAIL_ERROR", f"fault {case.fault} of rank {at_fault}: rank {rank} got {error!r}, expected {expected}")
    words = f"rank {at_fault} {'is gone' if case.fault == 'killed' else ''}"
    if expected == "PeerLost" and rank != at_fault and words not in str(error):
        raise Failed("FAIL_ERROR", f"rank {at_fault} is missing, and rank {rank} was told: {error}")
    if seconds > patience:
        raise Failed("FAIL_ERROR", f"rank {rank} was told after {seconds:.1f} s, expected at most {patience:g}")
    return Judgement("PASS")
