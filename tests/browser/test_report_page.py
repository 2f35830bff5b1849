"""The pages in a browser: no width forces sideways scrolling, marks stand where their numbers say, dark is dark."""

from __future__ import annotations

from dataclasses import replace

import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import run
from porthal.conformance.report.compare import comparison
from porthal.conformance.report.page import errors_axis
from porthal.conformance.report.results import LARGEST
from tests.chromium import WIDTHS, at_widths, brightness, measured, needs_chromium

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def report():
    """Passed, failed, inherited, waived and not claimed; long tokens."""

    def wrong(self, x, weight, *, eps=1e-5):
        return x * 0 + 3

    made = run(type("Made", (Reference,), {"name": "made", "rms_norm": wrong})(), ["rms_norm", "add", "rope", "topk"])
    results = list(made.results)
    results[-1] = replace(results[-1], verdict="WAIVED", waived="FAIL_VALUE", reason="the chip has no such thing")
    results[-2] = replace(results[-2], verdict="UNCLAIMED", status="missing")
    results[3] = replace(results[3], worst=LARGEST)
    return replace(made, results=tuple(results), untried=(f"mla_prolog ({'+'.join(3 * ['vendor_ops.with_a_name'])})",))


@pytest.fixture(scope="module")
def pages(report, tmp_path_factory):
    """The report as it is at each of the widths."""
    return at_widths(report.html(), tmp_path_factory.mktemp("pages"))


def test_no_width_needs_sideways_scrolling(report, pages):
    for width, page in zip(WIDTHS, pages, strict=True):
        assert width - 20 < page["width"] <= width and page["font"] >= 14  # a scroll bar takes its part
        assert page["needs"] <= page["width"], f"{page['needs']} wide at {page['width']}"
        assert page["afterwards"] <= page["width"], "an opened failure is too wide"
        assert page["details"] == len(report.causes) > 0 and min(page["open"]) > 250


def test_no_text_runs_into_another_or_is_cut(pages):
    for width, page in zip(WIDTHS, pages, strict=True):
        assert (page["meeting"], page["cut"]) == ([], []), f"at {width}"


def test_labels_of_the_error_axis_stand_apart_however_far_it_goes(report, tmp_path, monkeypatch):
    monkeypatch.setattr("porthal.conformance.report.page.HIGHEST", 1e300)
    first, *others = [r for r in report.results if r.worst and r.worst < 1][:3]
    greatest = [10.0**n for n in range(-1, 21)]
    worst = [replace(report, results=(replace(first, worst=w), *others)) for w in greatest]
    axes = [errors_axis([w]) for w in greatest]
    assert {axis.high - axis.low for axis in axes} == set(range(3, 25))
    for axis, found in zip(axes, measured([(r.html(), min(WIDTHS)) for r in worst], tmp_path), strict=True):
        assert (found["meeting"], found["cut"]) == ([], []), f"to 1e{axis.high}"
        assert 1 in axis.labels and len(axis.labels) > 1


def test_errors_beyond_the_limit_stand_right_of_it(pages):
    for page in pages:
        assert page["limits"] and max(page["limits"]) - min(page["limits"]) < 0.5  # one line through all rows
        assert page["bad"] and min(page["bad"]) > max(page["limits"])
        assert page["good"] and max(page["good"]) <= min(page["limits"])


def test_dark_is_dark(report, pages, tmp_path):
    dark, *_ = at_widths(report.html(), tmp_path, "--force-dark-mode")
    assert brightness(pages[0]) > 230 and brightness(dark) < 40


def test_a_comparison_fits_every_width(report, tmp_path):
    both = comparison(report, replace(report, backend="other-chip:0", place="emulated device"))
    for found in at_widths(both.html(), tmp_path):
        assert found["needs"] <= found["width"]
        assert (found["meeting"], found["cut"]) == ([], [])
