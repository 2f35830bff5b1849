"""The page of benchmarks: what it shows stands where its numbers say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from porthal.bench import page
from porthal.bench.compare import comparison
from porthal.bench.speeds import Speeds
from porthal.bench.text import rate_text, time_text
from porthal.conformance.report.axis import Axis
from tests.benchfiles import LIMITS, OPS, benchmark_file, sealed, unmeasured


def measured(*args, **settings):
    return Speeds.of_object(benchmark_file(*args, **settings))


@pytest.fixture(scope="module")
def made():
    return comparison(measured({"cpu": 0.9, "torch": 0.4}))


@pytest.mark.parametrize(("least", "most"), [(1.0, 1.0), (0.99, 1.01), (0.4, 1.1), (0.001, 2.0), (1e-30, 1.0)])
def test_an_axis_of_ratios_has_even_in_its_middle_and_all_of_them_on_it(least, most):
    axis = Axis.ratios(least, most)
    assert axis(1) == 50 and 1 in axis.labels
    assert 10**axis.low <= least * 1.001 and most <= 10**axis.high * 1.001
    assert axis(least) + axis(1 / least) == pytest.approx(100)


def test_points_stand_below_the_roof_by_their_share(made):
    charts = list(page._rooflines(made, page._colours(made)))
    assert [chart.title for chart in charts] == ["cpu, bfloat16", "torch, bfloat16"]
    for chart, share in zip(charts, (0.9, 0.4)):
        decades = chart.y.high - chart.y.low
        roof = {slope.what: slope for slope in chart.roof}
        assert set(roof) == {"peak", "dram", "l3", "l2"}
        (points,) = chart.series
        assert len(points) == 8 * sum(op != "take_rows" for op in OPS)
        for point in points:
            ridge = roof["dram"]
            if point.x >= ridge.x2:
                limit = roof["peak"].y1
            else:
                limit = ridge.y1 + (point.x - ridge.x1) / (ridge.x2 - ridge.x1) * (ridge.y2 - ridge.y1)
            below = (point.y - limit) / 100 * decades  # a percent of y is that many decades
            assert below == pytest.approx(-math.log10(share), abs=0.02)
        slowest = [roof[name] for name in ("l2", "l3", "dram")]
        assert [s.x2 for s in slowest] == sorted(s.x2 for s in slowest)  # a slower memory meets the peak later
        assert roof["dram"].x2 == pytest.approx(chart.x(LIMITS["bf16"] / LIMITS["dram"]), abs=0.02)


def test_what_a_step_costs_is_drawn_over_the_context(made):
    one, eight = page._contexts(made)
    assert (one.title, eight.title) == ("decode, 1 request", "decode, 8 requests")
    assert [one.x.text(t) for t in one.x.ticks] == ["1k", "8k", "32k", "128k"]
    cpu, torch = eight.series
    assert [p.x for p in cpu] == [0, pytest.approx(300 / 7, abs=0.01), pytest.approx(500 / 7, abs=0.01), 100]
    assert [p.y for p in cpu] == sorted((p.y for p in cpu), reverse=True)  # dearer further right
    assert all(slow.y < fast.y for slow, fast in zip(torch, cpu))
    times = [step.time.median for steps in made.steps.values() for step in steps if step.side is made.sides[0]][4:]
    sizes = ("1k", "8k", "32k", "128k")
    assert [p.words for p in cpu] == [f"cpu, context {c}: {time_text(t)}" for c, t in zip(sizes, times)]


def test_the_parts_of_a_curve_are_drawn_apart_and_are_no_step():
    data = benchmark_file({"cpu": 0.9, "torch": 0.4}, rows=(1,), only=("linear", "sparse_mla"))
    for entry in data["benchmarks"]:
        entry["group"] = entry["group"].replace("decode, 1 request", "curve")
        entry["extra_info"]["step"] = "sparse" if entry["extra_info"]["op"] == "sparse_mla" else "dense"
    both = comparison(Speeds.of_object(sealed(data)))
    assert both.steps == {}
    charts = list(page._contexts(both))
    assert [(c.title, c.note) for c in charts] == [("curve", f"calls of {n}, over the context") for n in ("cpu", "torch")]
    assert all(c.legend == [("dense", 0), ("sparse", 1)] and [len(s) for s in c.series] == [4, 4] for c in charts)


def test_parts_of_a_bar_are_the_step(made):
    colours = page._colours(made)
    assert sorted(colours.values()) == [0, 1, 2, 3, 4, 5, 6, 7, 7] and len(colours) == len(OPS)
    for steps in made.steps.values():
        bars = list(page._bars(steps, colours))
        assert max(sum(part.width for part in bar.parts) for bar in bars) == pytest.approx(100)
        for bar in bars:
            assert sum(part.seconds for part in bar.parts) == pytest.approx(bar.step.time.median)


def test_shares_are_over_all_calls_of_an_op(made):
    for line in page._lines(made):
        assert line.shares == {0: pytest.approx(0.9, rel=0.01), 1: pytest.approx(0.4, rel=0.01)}
        assert set(line.ratios) == {1}


@pytest.mark.parametrize(
    ("what", "text"), [(1.5, "1.5 s"), (0.00123, "1.23 ms"), (4.56e-6, "4.56 µs"), (7e-9, "7 ns"), (3e-13, "0.0003 ns")]
)
def test_seconds_are_written_short(what, text):
    assert time_text(what) == text


def test_rates_are_written_short():
    assert [rate_text(r, "B/s") for r in (12.0, 1.5e3, 2.5e10, 3e16)] == ["12 B/s", "1.5 kB/s", "25 GB/s", "30 PB/s"]


def test_the_page_stands_alone_and_says_all(command_line, tmp_path: Path):
    other = benchmark_file({"cpu": 0.5}, threads=2)
    unmeasured(other, 0, "FAIL_VALUE: <y> & more")
    a, b, html = (tmp_path / name for name in ("a.json", "b.json", "page.html"))
    a.write_text(json.dumps(benchmark_file({"cpu": 0.9})))
    b.write_text(json.dumps(sealed(other)))
    code, _, err = command_line("compare", a, b, "--html", html)
    text = html.read_text()
    assert (code, err) == (0, "") and not re.search(r"(src|href)=|https?://|@import|url\(|<script", text)
    for section in ("One step", "Cost against context", "Share of the limit", "How many times as fast", "Call by call"):
        assert f"<h2>{section}</h2>" in text
    assert "different threads: 1 (cpu A), 2 (cpu B)." in text and "without calls of rms_norm, not measured" in text
    assert "<b>rms_norm</b> on cpu, 1 calls: FAIL_VALUE: &lt;y&gt; &amp; more" in text and "<y>" not in text
    assert "A step of one request as a whole" in text and text.count("1 thread, 337 µs between 35 ops") == 2
    assert text.count(f"receipt {other['porthal']['receipt']}") == 1 and text.count(">self-reported<") == 2
