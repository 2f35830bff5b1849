"""Times beside each other: ratios with their intervals, geometric means, whole steps, and what became slower."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from porthal.bench.page import speeds_page
from porthal.bench.run import COLD
from porthal.bench.speeds import Call, Key, Speed, Speeds, Timed, machine
from porthal.bench.statistics import OVER
from porthal.bench.text import time_text, times_text
from porthal.conformance.report.differences import LETTERS, differences
from porthal.hal import UsageError

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

ALONE = "alone"  # the step of calls that belong to none
FAINT = 0.1  # of a step's time, what may be noisy of it
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
        return f"{times_text(self.value)}x ({times_text(self.low)} to {times_text(self.high)})"


@dataclass(frozen=True, eq=False)
class Side:
    """A backend of a file, and the side that it is compared with: that of the same backend in the first file, else the first
    side of all."""

    label: str
    file: int
    backend: str
    rows: dict[Key, Speed]
    reference: Side | None

    @cached_property
    def calls(self) -> dict[Call, Speed]:
        """Each call once, in whichever groups it stands."""
        found: dict[Call, Speed] = {}
        for key, row in self.rows.items():
            found.setdefault(key.call, row)
        return found

    @cached_property
    def ratios(self) -> dict[Call, Ratio]:
        """Of the calls that it and its reference measured quietly enough, and not faster than can be."""
        theirs = self.reference.calls if self.reference else {}
        both = {call: (row, theirs[call]) for call, row in self.calls.items() if call in theirs}
        return {c: Ratio.of(a.time, b.time) for c, (a, b) in both.items() if not (a.silent or b.silent)}


class Step(NamedTuple):
    """One step of the workload on one side: the sum over its calls."""

    side: Side
    time: Timed
    rows: list[Speed]
    lacks: list[str]  # ops of calls that it has not measured
    ratio: Ratio | None  # over the calls that it and its reference have measured

    @property
    def noisy(self) -> bool:
        """Whether much of its time is of noisy calls."""
        return sum(row.calls * row.time.median for row in self.rows if row.noisy) > FAINT * self.time.median


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

    @cached_property
    def calls(self) -> list[Call]:
        return list(dict.fromkeys(key.call for key in self.keys))

    @property
    def ops(self) -> list[str]:
        return list(dict.fromkeys(call.op for call in self.calls))

    @cached_property
    def parts(self) -> dict[str, dict[str, list[Step]]]:
        """By group and kind: what its calls take on each side, with cold caches, as one call evicts what the next one needs."""
        kinds = {key: row.step for side in self.sides for key, row in side.rows.items()}
        found: dict[str, dict[str, list[Key]]] = {}
        for key in self.keys:
            if key.call.cache == COLD and kinds[key] != ALONE:
                found.setdefault(key.group, {}).setdefault(kinds[key], []).append(key)
        return {
            group: {kind: [step for side in self.sides if (step := self._step(side, keys))] for kind, keys in by_kind.items()}
            for group, by_kind in found.items()
        }

    @cached_property
    def steps(self) -> dict[str, list[Step]]:
        """By group: each side's step, where the calls of the group make up one."""
        return {group: steps for group, by_kind in self.parts.items() if len(by_kind) == 1 for steps in by_kind.values()}

    def _step(self, side: Side, keys: Sequence[Key]) -> Step | None:
        mine = [key for key in keys if key in side.rows]
        if not mine:
            return None
        theirs = side.reference.rows if side.reference else {}
        common = [key for key in mine if key in theirs]
        pairs = [took(rows[key] for key in common) for rows in (side.rows, theirs)] if common else []
        faint = [took(rows[key] for key in common if rows[key].silent) for rows in (side.rows, theirs)] if common else []
        clear = pairs and all(part.median <= FAINT * whole.median for part, whole in zip(faint, pairs))
        ratio = Ratio.of(*pairs) if clear else None
        gone = [m.op for m in self.files[side.file].missing if (m.group, m.backend) == (keys[0].group, side.backend)]
        lacks = list(dict.fromkeys([*(key.call.op for key in keys if key not in side.rows), *gone]))
        rows = [side.rows[key] for key in mine]
        return Step(side, took(rows), rows, lacks, ratio)

    @property
    def part(self) -> bool:
        """Whether some file has some ops of its steps alone."""
        return any(file.workload.get("part") for file in self.files)

    def mean(self, side: Side, op: str = "") -> Ratio | None:
        """The geometric mean of a side's ratios: of one op, or of all."""
        ratios = [ratio for call, ratio in side.ratios.items() if op in ("", call.op)]
        return Ratio.mean(ratios) if ratios else None

    @property
    def summary(self) -> dict[Side, str]:
        """One sentence per side that is compared with another."""
        found = {}
        for side in self.sides:
            ratio = self.mean(side)
            if ratio and side.reference:
                count = len(side.ratios)
                of = f"geometric mean of {count} calls" if count > 1 else "one call"
                same = "" if ratio.significant else ", which is not significant"
                found[side] = f"{side.label} is {ratio} as fast as {side.reference.label}, {of}{same}"
        return found

    @property
    def differences(self) -> list[str]:
        """What else than the kernels is not the same, and what the numbers do not say."""
        found = self._told()
        for letter, file in zip(LETTERS, self.files):
            said = machine(file.load, list(file.limits.values()))
            found += [f"{letter}: {line}" if len(self.files) > 1 else line for line in dict.fromkeys(said)]
        if wrong := [f"{side.label}: {n}" for side in self.sides if (n := sum(r.impossible for r in side.calls.values()))]:
            what = f"faster than {OVER:.0%} of what the machine's limit permits, and compared with nothing"
            found.append(f"impossible, {what}: {', '.join(wrong)} of {len(self.calls)} calls")
        runs: dict[str, list[str]] = {}
        for letter, file in zip(LETTERS, self.files):
            runs.setdefault(file.receipt, []).append(letter)
        found += [f"{' and '.join(same)} are the same run" for same in runs.values() if same[1:]]
        if len(runs) > 1:
            found.append("the files are of different runs: an interval knows how a time varies within one")
        rows = [(side, row) for side in self.sides for row in side.calls.values()]
        others = {(side.label, row.kernel, row.op): None for side, row in rows if row.kernel != "own"}
        for label, kernel in dict.fromkeys(at[:2] for at in others):
            ops = ", ".join(op for *at, op in others if at == [label, kernel])
            found.append(f"{label} has no own kernel, but one that is {kernel}, for {ops}")
        if noisy := [f"{side.label}: {n}" for side in self.sides if (n := sum(row.noisy for row in side.calls.values()))]:
            found.append(f"too noisy to be compared: {', '.join(noisy)} of {len(self.calls)} calls")
        for side in self.sides:
            if lacking := [call for call in self.calls if call not in side.calls]:
                ops = ", ".join(dict.fromkeys(call.op for call in lacking))
                found.append(f"{side.label} lacks {len(lacking)} of {len(self.calls)} calls: {ops}")
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
        if not any(side.ratios for side, _ in later):
            raise UsageError("no call could be compared, all are noisy or impossible: measure again on a quiet machine")
        return [line for side, reference in later for line in self._worse(side, reference, beyond)]

    def _worse(self, side: Side, reference: Side, beyond: float) -> Iterator[str]:
        for op in self.ops:
            mine = {call: ratio for call, ratio in side.ratios.items() if call.op == op}
            slower = {call: ratio for call, ratio in mine.items() if _slower(ratio, beyond)}
            if slower:
                call = min(slower, key=lambda call: slower[call].value)
                where = f"the most in {side.calls[call].group}, {call.cache} [{call.token}], where it {_longer(slower[call])}"
                yield f"{op} on {side.label} in {len(slower)} of {len(mine)} calls, {where}"
        for group, steps in self.steps.items():
            for step in steps:
                if step.side is side and step.ratio and _slower(step.ratio, beyond):
                    yield f"a whole step of {group} on {side.label}: it {_longer(step.ratio)}"
        before = {(call.op, call.token) for call in reference.calls}
        lost = {(m.op, m.token): m for m in self.files[side.file].missing if m.backend == side.backend}
        for at, gone in lost.items():
            if at in before:
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
            table.add_row(op, str(sum(call.op == op for call in self.calls)), *cells)
        if compared:
            yield table
        if not self.steps:
            return
        yield Text("")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("part of a step" if self.part else "one step", no_wrap=True)
        for side in self.sides:
            table.add_column(side.label, justify="right", no_wrap=True)
            if side.reference:
                table.add_column("", no_wrap=True)
        for group, steps in self.steps.items():
            by_side = {step.side: step for step in steps}
            cells = [cell for side in self.sides for cell in _step_cells(side, by_side.get(side))]
            table.add_row(group, *cells)
        yield table
        if lacking := list(dict.fromkeys(op for steps in self.steps.values() for step in steps for op in step.lacks)):
            yield Text(f"* without calls of {', '.join(lacking)}, which it has not measured; ratios are over common calls")


def comparison(*files: Speeds) -> Comparison:
    """The comparison; UsageError where the files have no call in common."""
    made = Comparison(files)
    common = {side.file for side in made.sides if side.reference and side.calls.keys() & side.reference.calls.keys()}
    for n, letter in zip(range(1, len(files)), LETTERS[1:]):
        if n not in common:
            raise UsageError(f"files A and {letter} have no call in common: measure the same workload, with the same caches")
    return made


def took(rows: Iterable[Speed]) -> Timed:
    """All calls of these rows together."""
    rows = list(rows)
    median = sum(row.calls * row.time.median for row in rows)
    down = math.hypot(*(row.calls * (row.time.median - row.time.low) for row in rows))
    up = math.hypot(*(row.calls * (row.time.high - row.time.median) for row in rows))
    return Timed(median, median - down, median + up)


def _slower(ratio: Ratio, beyond: float) -> bool:
    return ratio.significant and 1 / ratio.value > 1 + beyond


def _longer(ratio: Ratio) -> str:
    return f"takes {100 / ratio.value - 100:.3g} % longer ({100 / ratio.high - 100:.3g} to {100 / ratio.low - 100:.3g})"


def _cells(ratio: Ratio | None) -> list[str]:
    return [str(ratio), ratio.word] if ratio else ["", ""]


def _step_cells(side: Side, step: Step | None) -> list[str]:
    took = time_text(step.time.median) + "*" * bool(step.lacks) if step else ""
    return [took, *([str(step.ratio) if step and step.ratio else ""] if side.reference else [])]
