"""The page of benchmarks in a browser: nothing meets, is cut or strays, bars are as long as their times say, dark is dark."""

from __future__ import annotations

import itertools

import pytest

from porthal.bench.compare import comparison
from porthal.bench.speeds import Speeds
from tests.benchfiles import benchmark_file, sealed, unmeasured
from tests.chromium import WIDTHS, brightness, measured, needs_chromium

pytestmark = needs_chromium


def file(*args, **settings) -> Speeds:
    return Speeds.of_object(benchmark_file(*args, **settings))


@pytest.fixture(scope="module")
def comparisons():
    """Two backends in two files, with all that can be said of them; one alone; eight, far apart."""
    other = benchmark_file({"cpu": 0.7, "torch:cuda:0": 0.5}, seed=1, threads=2, noise=0.03, machine="Ampere Altra Max M128-30")
    other["benchmarks"][1]["extra_info"]["noise"] = 0.9
    unmeasured(other, 0, "FAIL_VALUE: y is off")
    both = comparison(file({"cpu": 0.9, "torch:cuda:0": 0.4}), Speeds.of_object(sealed(other)))
    alone = comparison(file({"mychip": 0.9}, rows=(64,), contexts=("8k",), only=("linear", "rope")))
    many = comparison(*(file({"cpu": 0.9 / 4**n}, rows=(1,), contexts=("1k", "128k")) for n in range(8)))
    return both, alone, many


@pytest.fixture(scope="module")
def pages(comparisons, tmp_path_factory):
    """Each of them at each of the widths."""
    asked = itertools.product((c.html() for c in comparisons), WIDTHS)
    found = measured([*asked], tmp_path_factory.mktemp("pages"))
    return [found[n : n + len(WIDTHS)] for n in range(0, len(found), len(WIDTHS))]


def test_nothing_meets_is_cut_strays_or_needs_sideways_scrolling(pages):
    for n, page in enumerate(pages):
        for width, found in zip(WIDTHS, page, strict=True):
            assert (found["meeting"], found["cut"], found["strays"]) == ([], [], 0), f"page {n} at {width}"
            assert found["needs"] <= found["width"] and found["afterwards"] <= found["width"], f"page {n} at {width}"
            assert found["font"] >= 14


def test_bars_are_as_long_as_their_steps(comparisons, pages):
    for made, page in zip(comparisons, pages, strict=True):
        steps = [[step.time.median for step in steps] for steps in made.steps.values()]
        for found in page:
            drawn = iter(found["stacks"])
            for times in steps:
                widths = [next(drawn) for _ in times]
                full = max(widths)
                assert full > 150
                assert widths == pytest.approx([full * t / max(times) for t in times], abs=1.5)
            assert next(drawn, None) is None


def test_dark_is_dark(comparisons, pages, tmp_path):
    (dark,) = measured([(comparisons[1].html(), 390)], tmp_path, "--force-dark-mode")
    assert brightness(pages[1][1]) > 230 and brightness(dark) < 40
