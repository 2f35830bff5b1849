"""Times beside each other: ratios with their intervals, geometric means, whole steps, and what became slower."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from porthal.bench.page import seconds, speeds_page
from porthal.bench.speeds import Key, Speed, Speeds, Timed
from porthal.conformance.report.differences import LETTERS, differences
from porthal.hal import UsageError

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

ALONE = "alone"  # the step of calls that belong to none
DRIFT = 0.05  # by how much a limit of the machine may differ between two runs before it is said


class Ratio(NamedTuple):
    """How many times as fast, with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, time: Timed, reference: Timed) -> Ratio:
        """The reference's median over this one's: above 1 is faster.

        The interval is made of those of both logarithms (MOVER: Donner and Zou, Biometrics 2002), and knows no more than
        these do: how a time varies within a run.
        """
        down = math.hypot(math.log(reference.median / reference.low), math.log(time.high / time.median))
        up = math.hypot(math.log(reference.high / reference.median), math.log(time.median / time.low))
        return cls._of(math.log(reference.median / time.median), down, up)

    @classmethod
    def mean(cls, ratios: Sequence[Ratio]) -> Ratio:
        """The geometric mean."""
        n = len(ratios)
        down = math.hypot(*(math.log(r.value / r.low) for r in ratios)) / n
        up = math.hypot(*(math.log(r.high / r.value) for r in ratios)) / n
        return cls._of(sum(math.log(r.value) for r in ratios) / n, down, up)

    @classmethod
    def _of(cls, log: float, down: float, up: float) -> Ratio:
        return cls(math.exp(log), math.exp(log - down), math.exp(log + up))

    @property
    def significant(self) -> bool:
        return not self.low <= 1 <= self.high

    @property
    def word(self) -> str:
        return "not significant" if not self.significant else "faster" if self.value > 1 else "slower"

    def __str__(self) -> str:
        return f"{self.value:.3g}x ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True, eq=False)
class Side:
    """A backend of a file, and the side that it is compared with: that of the same backend in the first file, else the first
    side of all."""

    label: str
    file: int
    backend: str
    rows: dict[Key, Speed]
    reference: Side | None

    def against(self, keys: Iterable[Key]) -> dict[Key, Ratio]:
        """Of the calls that both measured quietly enough."""
        theirs = self.reference.rows if self.reference else {}
        both = (key for key in keys if key in self.rows and key in theirs)
        quiet = (key for key in both if not (self.rows[key].noisy or theirs[key].noisy))
        return {key: Ratio.of(self.rows[key].time, theirs[key].time) for key in quiet}

    def took(self, keys: Iterable[Key]) -> Timed:
        """All calls of these together."""
        rows = [self.rows[key] for key in keys]
        median = sum(row.calls * row.time.median for row in rows)
        down = math.hypot(*(row.calls * (row.time.median - row.time.low) for row in rows))
        up = math.hypot(*(row.calls * (row.time.high - row.time.median) for row in rows))
        return Timed(median, median - down, median + up)


class Step(NamedTuple):
    """One step of the workload on one side: the sum over its calls."""

    side: Side
    time: Timed
    rows: list[Speed]
    lacks: list[str]  # ops of calls that another side has measured
    ratio: Ratio | None  # over the calls that it and its reference have measured


@dataclass(frozen=True)
class Comparison:
    """Benchmark files beside each other; one alone has its backends beside each other."""

    files: tuple[Speeds, ...]

    @cached_property
    def sides(self) -> list[Side]:
        several = len(self.files) > 1
        found: list[Side] = []
        for n, file in enumerate(self.files):
            for backend, rows in file.by_backend.items():
                same = [side for side in found if side.file == 0 and side.backend == backend]
                label = f"{backend} {LETTERS[n]}" if several else backend
                found.append(Side(label, n, backend, rows, next(iter(same or found), None)))
        return found

    @cached_property
    def keys(self) -> list[Key]:
        """All that is measured on any side."""
        return list(dict.fromkeys(key for side in self.sides for key in side.rows))

    @property
    def ops(self) -> list[str]:
        return list(dict.fromkeys(key.op for key in self.keys))

    @cached_property
    def steps(self) -> dict[tuple[str, str], list[Step]]:
        """By group and cache: each side's step."""
        alone = {key for side in self.sides for key, row in side.rows.items() if row.step == ALONE}
        groups = dict.fromkeys((key.group, key.cache) for key in self.keys if key not in alone)
        found = {at: [k for k in self.keys if (k.group, k.cache) == at] for at in groups}
        return {at: [step for side in self.sides if (step := _step(side, keys))] for at, keys in found.items()}

    def mean(self, side: Side, op: str = "") -> Ratio | None:
        """The geometric mean of a side's ratios: of one op, or of all."""
        ratios = side.against(key for key in self.keys if op in ("", key.op))
        return Ratio.mean([*ratios.values()]) if ratios else None

    @property
    def summary(self) -> dict[Side, str]:
        """One sentence per side that is compared with another."""
        found = {}
        for side in self.sides:
            ratio = self.mean(side)
            if ratio and side.reference:
                count = len(side.against(self.keys))
                of = f"geometric mean of {count} calls" if count > 1 else "one call"
                same = "" if ratio.significant else ", which is not significant"
                found[side] = f"{side.label} is {ratio} as fast as {side.reference.label}, {of}{same}"
        return found

    @property
    def differences(self) -> list[str]:
        """What else than the kernels is not the same, and what the numbers do not say."""
        found = self._told()
        if len(self.files) > 1:
            found.append("the files are of different runs: an interval knows how a time varies within one")
        rows = [(side, row) for side in self.sides for row in side.rows.values()]
        others = {(row.kernel, f"{row.op} on {side.label}"): None for side, row in rows if row.kernel != "own"}
        for kernel in dict.fromkeys(kernel for kernel, _ in others):
            found.append(f"not own kernels, but {kernel}: {', '.join(what for k, what in others if k == kernel)}")
        if noisy := [f"{side.label}: {n}" for side in self.sides if (n := sum(row.noisy for row in side.rows.values()))]:
            found.append(f"too noisy to be compared: {', '.join(noisy)} of {len(self.keys)} calls")
        for side in self.sides:
            if lacking := [key for key in self.keys if key not in side.rows]:
                ops = ", ".join(dict.fromkeys(key.op for key in lacking))
                found.append(f"{side.label} lacks {len(lacking)} of {len(self.keys)} calls: {ops}")
        scaled = {row.op for _, row in rows if row.scaled}
        return [*found, *([f"smaller than the model's own: calls of {', '.join(sorted(scaled))}"] if scaled else [])]

    def _told(self) -> list[str]:
        found = differences(
            {
                "machine": [file.described for file in self.files],
                "workload": [file.worked for file in self.files],
            }
        )
        for side in self.sides:
            if side.reference:
                found += self._other(side, side.reference)
        return found

    def _other(self, side: Side, reference: Side) -> Iterator[str]:
        """What is said otherwise of a side than of what it is compared with: of the same backend anything, else its threads."""
        mine, theirs = (self.files[s.file].facts(s.backend) for s in (side, reference))
        same = side.backend == reference.backend
        places = (self.files[s.file].place(s.backend) for s in (side, reference))
        mine["place"], theirs["place"] = places
        for name in sorted({*mine, *theirs} if same else {"place", "threads"}):
            if mine.get(name) != theirs.get(name):
                was, now = (facts.get(name, "not said") for facts in (theirs, mine))
                yield f"different {name}: {was} ({reference.label}), {now} ({side.label})"
        if side.file != reference.file:
            yield from self._drift(side, reference)

    def _drift(self, side: Side, reference: Side) -> Iterator[str]:
        """How the machine itself was another."""
        mine, theirs = (self.files[s.file].limits.get(s.backend, {}) for s in (side, reference))
        moved = {what: mine[what] / theirs[what] for what in mine if what in theirs}
        parts = [f"{what} {ratio:.2f}x" for what, ratio in moved.items() if abs(ratio - 1) > DRIFT]
        if parts:
            yield f"the machine's own limits for {side.label} against {reference.label}: {', '.join(parts)}"

    def regressions(self, beyond: float) -> list[str]:
        """What in a later file takes more than `beyond` longer than in the first, significantly, or is measured no more."""
        later = [(side, side.reference) for side in self.sides if side.file and side.reference]
        return [line for side, reference in later for line in self._worse(side, reference, beyond)]

    def _worse(self, side: Side, reference: Side, beyond: float) -> Iterator[str]:
        ratios = side.against(self.keys)
        for op in self.ops:
            mine = {key: ratio for key, ratio in ratios.items() if key.op == op}
            slower = {key: ratio for key, ratio in mine.items() if _slower(ratio, beyond)}
            if slower:
                key = min(slower, key=lambda key: slower[key].value)
                where = f"the most in {key.group}, {key.cache} [{key.token}], where it {_longer(slower[key])}"
                yield f"{op} on {side.label} in {len(slower)} of {len(mine)} calls, {where}"
        for (group, cache), steps in self.steps.items():
            for step in steps:
                if step.side is side and step.ratio and _slower(step.ratio, beyond):
                    yield f"a whole step of {group}, {cache} on {side.label}: it {_longer(step.ratio)}"
        before = {(key.op, key.token) for key in reference.rows}
        for gone in self.files[side.file].missing:
            if gone.backend == side.backend and (gone.op, gone.token) in before:
                yield f"{gone.op} [{gone.token}] has no time on {side.label} any more: {gone.why}"

    def table(self) -> Group:
        """What is compared, what differs, then per op and per step the ratios. Fits 80 columns for two files of a backend."""
        from rich.console import Group
        from rich.text import Text

        return Group(*map(Text, [*self._head(), *self.differences]), *self._tables(), *map(Text, self.summary.values()))

    def html(self) -> str:
        """One page without external resources."""
        return speeds_page(self)

    def _head(self) -> Iterator[str]:
        for letter, file in zip(LETTERS, self.files):
            for backend in file.by_backend:
                yield f"{letter}: {backend} ({file.place(backend)}); {'; '.join([*file.said(backend), file.origin])}"

    def _tables(self) -> Iterator[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        compared = [side for side in self.sides if side.reference]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("op", no_wrap=True)
        table.add_column("calls", justify="right", no_wrap=True)
        for side in compared:
            table.add_column(f"{side.label}: times as fast", justify="right", no_wrap=True)
            table.add_column("", no_wrap=True)
        for op in self.ops:
            cells = [cell for side in compared for cell in _cells(self.mean(side, op))]
            table.add_row(op, str(sum(key.op == op for key in self.keys)), *cells)
        if compared:
            yield table
        if not self.steps:
            return
        yield Text("")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("one step", no_wrap=True)
        for side in self.sides:
            table.add_column(side.label, justify="right", no_wrap=True)
            if side.reference:
                table.add_column("", no_wrap=True)
        for (group, cache), steps in self.steps.items():
            by_side = {step.side: step for step in steps}
            cells = [cell for side in self.sides for cell in _step_cells(side, by_side.get(side))]
            table.add_row(f"{group}, {cache}", *cells)
        yield table
        if lacking := list(dict.fromkeys(op for steps in self.steps.values() for step in steps for op in step.lacks)):
            yield Text(f"* without calls that another has measured, of {', '.join(lacking)}; ratios are over common calls")


def comparison(*files: Speeds) -> Comparison:
    """The comparison; UsageError where the files have no call in common."""
    made = Comparison(files)
    common = {side.file for side in made.sides if side.reference and side.rows.keys() & side.reference.rows.keys()}
    for n, letter in zip(range(1, len(files)), LETTERS[1:]):
        if n not in common:
            raise UsageError(f"files A and {letter} have no call in common: measure the same workload, with the same caches")
    return made


def _step(side: Side, keys: Sequence[Key]) -> Step | None:
    mine = [key for key in keys if key in side.rows]
    if not mine:
        return None
    common = [key for key in mine if side.reference and key in side.reference.rows]
    noisy = any(s.rows[key].noisy for key in common for s in (side, side.reference) if s)
    ratio = Ratio.of(side.took(common), side.reference.took(common)) if side.reference and common and not noisy else None
    lacks = list(dict.fromkeys(key.op for key in keys if key not in side.rows))
    return Step(side, side.took(mine), [side.rows[key] for key in mine], lacks, ratio)


def _slower(ratio: Ratio, beyond: float) -> bool:
    return ratio.significant and 1 / ratio.value > 1 + beyond


def _longer(ratio: Ratio) -> str:
    return f"takes {100 / ratio.value - 100:.3g} % longer ({100 / ratio.high - 100:.3g} to {100 / ratio.low - 100:.3g})"


def _cells(ratio: Ratio | None) -> list[str]:
    return [str(ratio), ratio.word] if ratio else ["", ""]


def _step_cells(side: Side, step: Step | None) -> list[str]:
    took = seconds(step.time.median) + "*" * bool(step.lacks) if step else ""
    return [took, *([str(step.ratio) if step and step.ratio else ""] if side.reference else [])]
