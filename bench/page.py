"""Times as a page for people: what the template shows, counted and placed; the template decides how it looks."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from porthal.bench.run import COLD
from porthal.bench.speeds import Key, Speed
from porthal.bench.text import rate_text, time_text, times_text
from porthal.conformance.report.axis import Axis
from porthal.conformance.report.page import render

if TYPE_CHECKING:
    from porthal.bench.compare import Comparison, Ratio, Step

TEMPLATES = Path(__file__).parent / "templates"
WIDE = 200  # pixels of a chart on a phone
COLOURS = 8  # of ops; where there are more, the last is that of all others
PEAKS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}  # of the arithmetic, by a row's dtype
MEMORIES = ("l2", "l3", "dram")
CONTEXT = re.compile(r"(?P<what>.+), context (?P<size>[1-9]\d{0,8})(?P<unit>[kM]?)")
UNITS = {"": 1, "k": 1024, "M": 1024**2}


class Part(NamedTuple):
    """A piece of a stacked bar."""

    op: str
    colour: int
    width: float
    seconds: float


class Bar(NamedTuple):
    """One side's step: its pieces, in percent of the longest step beside it."""

    step: Step
    parts: list[Part]


class Point(NamedTuple):
    """Where something stands on a chart, in percent from its left upper corner; its colour, its words, whether it is a ring."""

    x: float
    y: float
    colour: int
    words: str
    ring: bool = False


class Slope(NamedTuple):
    """A straight piece of a roof, in percent, and what limits there."""

    what: str
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Chart:
    """Points on two logarithmic axes, those of a series joined; or below a roof. `legend` names the colours."""

    title: str
    note: str
    legend: list[tuple[str, int]]
    x: Axis
    y: Axis
    series: list[list[Point]]
    roof: list[Slope]


class Line(NamedTuple):
    """An op: by a side's number its ratio, and the share of the machine's limit that it reaches."""

    op: str
    ratios: dict[int, Ratio]
    shares: dict[int, float]


class Cell(NamedTuple):
    """A call on one side."""

    row: Speed | None
    ratio: Ratio | None


def speeds_page(comparison: Comparison) -> str:
    """Files beside each other, or the backends of one, as one page without external resources or scripts."""
    sides, colours = comparison.sides, _colours(comparison)
    lines, rooflines = list(_lines(comparison)), list(_rooflines(comparison, colours))
    whole = [comparison.files[side.file].whole.get(side.backend, []) for side in sides]
    ratios = [ratio for line in lines for ratio in line.ratios.values()]
    legend = [(op, colour) for op, colour in colours.items() if colour < COLOURS - 1 or len(colours) <= COLOURS]
    return render(
        "bench.html",
        TEMPLATES,
        comparison=comparison,
        sides=sides,
        verdicts=[(sentence, ratio.word) for side, sentence in comparison.summary.items() if (ratio := comparison.mean(side))],
        files=[comparison.files[side.file] for side in sides],
        legend=legend + [("others", COLOURS - 1)] * (len(colours) > COLOURS),
        steps={at: list(_bars(steps, colours)) for at, steps in comparison.steps.items()},
        whole={n: steps for n, steps in enumerate(whole) if steps},
        longest=max((step.seconds for steps in whole for step in steps), default=0),
        contexts=list(_contexts(comparison)),
        rooflines=rooflines,
        limits=[what for what in ("peak", *MEMORIES) if any(s.what == what for chart in rooflines for s in chart.roof)],
        lines=lines,
        ratios=Axis.ratios(min(r.low for r in ratios), max(r.high for r in ratios), "{:g}x".format) if ratios else None,
        tables=_tables(comparison),
        seconds=time_text,
        factor=times_text,
    )


def _colours(comparison: Comparison) -> dict[str, int]:
    """The ops, those that take longest first, each with its colour."""
    took = {op: 0.0 for op in comparison.ops}
    for side in comparison.sides:
        for row in side.rows.values():
            took[row.op] += row.calls * row.time.median
    return {op: min(n, COLOURS - 1) for n, op in enumerate(sorted(took, key=lambda op: -took[op]))}


def _bars(steps: Sequence[Step], colours: Mapping[str, int]) -> Iterator[Bar]:
    longest = max(step.time.median for step in steps)
    for step in steps:
        took = {op: sum(row.calls * row.time.median for row in step.rows if row.op == op) for op in colours}
        yield Bar(step, [Part(op, colours[op], 100 * time / longest, time) for op, time in took.items() if time])


def _contexts(comparison: Comparison) -> Iterator[Chart]:
    """What a step costs at each context that the workload has it at, where all of it was measured. Where the calls of a group
    are parts of different kinds, each side has a chart of these."""
    found: dict[tuple[str, str], dict[tuple[str, int], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for group, by_kind in comparison.parts.items():
        if not (known := CONTEXT.fullmatch(group)):
            continue
        for kind, steps in by_kind.items():
            for step in (step for step in steps if not step.lacks):
                what, size = known["what"], int(known["size"]) * UNITS[known["unit"]]
                n, label = comparison.sides.index(step.side), step.side.label
                at = ((what, ""), (label, n)) if len(by_kind) == 1 else ((what, label), (kind, list(by_kind).index(kind)))
                found[at[0]][at[1]][size] = step.time.median
    for (what, label), series in found.items():
        sizes = sorted({size for by_size in series.values() for size in by_size})
        if len(sizes) > 1:
            times = [time for by_size in series.values() for time in by_size.values()]
            x = Axis(math.log10(sizes[0]), math.log10(sizes[-1]), sizes, _size, WIDE)
            y = Axis.decades(min(times), max(times), time_text)
            lines = [
                [
                    Point(x(size), 100 - y(time), colour, f"{name}, context {_size(size)}: {time_text(time)}")
                    for size, time in sorted(by_size.items())
                ]
                for (name, colour), by_size in series.items()
            ]
            note = "one step, over the context" if not label else f"calls of {label}, over the context"
            yield Chart(what, note, list(series), x, y, lines, [])


def _size(tokens: float) -> str:
    unit = next(u for u in ("M", "k", "") if tokens >= UNITS[u] and tokens % UNITS[u] == 0)
    return f"{tokens / UNITS[unit]:g}{unit}"


def _rooflines(comparison: Comparison, colours: Mapping[str, int]) -> Iterator[Chart]:
    """Per dtype and side: each call's rate over its operations per byte, below what the machine can do."""
    rows = [row for side in comparison.sides for row in side.calls.values() if row.flops]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        mine = [row for row in rows if row.dtype == dtype]
        limits = [comparison.files[s.file].limits.get(s.backend, {}) for s in comparison.sides]
        peaks = [each[PEAKS[dtype]] for each in limits if PEAKS.get(dtype) in each]
        x = Axis.decades(min(map(_intensity, mine)), max(map(_intensity, mine)))
        y = Axis.decades(min(map(_rate, mine)), max([*map(_rate, mine), *peaks]), rate_text)
        for side, known in zip(comparison.sides, limits):
            points = [
                Point(x(_intensity(row)), 100 - y(_rate(row)), colours[row.op], _words(row), row.cache != COLD)
                for row in side.calls.values()
                if row.flops and row.dtype == dtype
            ]
            peak = known.get(PEAKS.get(dtype, ""))
            memories = {name: known[name] for name in MEMORIES if name in known}
            note = [f"{PEAKS[dtype]} {rate_text(peak, 'op/s')}"] if peak else []
            note += [f"{name} {rate_text(speed, 'B/s')}" for name, speed in memories.items()]
            if points:
                yield Chart(f"{side.label}, {dtype}", ", ".join(note), [], x, y, [points], list(_roof(x, y, peak, memories)))


def _intensity(row: Speed) -> float:
    return row.flops / row.bytes


def _rate(row: Speed) -> float:
    return row.flops / row.time.median


def _words(row: Speed) -> str:
    share = f", {row.share:.0%} of {row.bound}" if row.clear else ""
    return f"{row.op} in {row.group}, {row.cache}: {rate_text(_rate(row), 'op/s')}{share}"


def _roof(x: Axis, y: Axis, peak: float | None, memories: Mapping[str, float]) -> Iterator[Slope]:
    """The lines operations per byte * bytes per second of each memory, up to the peak, and the peak."""
    left, right, low, high = (10**end for end in (x.low, x.high, y.low, y.high))
    top = peak or high
    for name, speed in memories.items():
        begin, end = max(left, low / speed), min(right, top / speed)
        if begin < end:
            yield Slope(name, x(begin), 100 - y(begin * speed), x(end), 100 - y(end * speed))
    begin = max(left, top / max(memories.values(), default=top / left))
    if peak and begin < right:
        yield Slope("peak", x(begin), 100 - y(peak), 100, 100 - y(peak))


def _lines(comparison: Comparison) -> Iterator[Line]:
    for op in comparison.ops:
        means = {n: comparison.mean(side, op) for n, side in enumerate(comparison.sides)}
        shares = {}
        for n, side in enumerate(comparison.sides):
            rows = [row for row in side.rows.values() if row.op == op and row.clear and not row.silent]
            if rows:
                shares[n] = sum(r.calls * r.limit for r in rows) / sum(r.calls * r.time.median for r in rows)
        yield Line(op, {n: ratio for n, ratio in means.items() if ratio}, shares)


def _tables(comparison: Comparison) -> dict[tuple[str, str], list[tuple[Key, list[Cell]]]]:
    """By group and cache: each call, and what every side needs for it."""
    found: dict[tuple[str, str], list[tuple[Key, list[Cell]]]] = defaultdict(list)
    for key in comparison.keys:
        cells = [Cell(side.rows.get(key), side.ratios.get(key.call)) for side in comparison.sides]
        found[key.group, key.call.cache].append((key, cells))
    return found
