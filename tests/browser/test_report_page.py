"""The pages in a browser: no width forces sideways scrolling, marks stand where their numbers say, dark is dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace

import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import run
from porthal.conformance.report.compare import comparison
from porthal.conformance.report.page import Scale
from porthal.conformance.report.results import LARGEST

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is here: apt-get install chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=4000"),
]
WIDTHS = (360, 390, 768, 1280)
# Each page stands in frames of these widths; what is measured there becomes the text of the outer page.
MEASURE = """<!doctype html><meta charset="utf-8">%s<pre id="out"></pre><script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const middle = e => { const r = e.getBoundingClientRect(); return r.left + r.width / 2; };
    const all = (s) => [...page.querySelectorAll(s)];
    // Every line of text with its box, and what cuts it off: the page, or a part that scrolls by itself.
    const lines = [], walk = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const text = walk.currentNode, range = page.createRange(), card = text.parentElement.closest(".wide, .card");
      const hidden = text.parentElement.closest("style, .plot .op, details:not([open]) > :not(summary)");
      if (!text.textContent.trim() || hidden) continue;
      range.selectNodeContents(text);
      for (const r of range.getClientRects())
        if (r.width > 1)
          lines.push({text: text.textContent.trim(), r, end: card ? card.getBoundingClientRect().right : root.clientWidth});
    }
    const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
    return {
      cut: lines.filter(l => l.r.right > l.end).map(l => l.text),
      meeting: lines.flatMap((a, i) => lines.slice(i + 1).filter(b => meet(a.r, b.r)).map(b => a.text + " | " + b.text)),
      width: root.clientWidth, needs: root.scrollWidth,
      font: parseFloat(getComputedStyle(page.body).fontSize),
      background: getComputedStyle(page.body).backgroundColor,
      limits: all(".plot line.limit").map(middle),
      bad: all(".plot .dot-bad").map(middle),
      good: all(".plot .dot-own, .plot .dot-other").map(middle),
      details: all("details").length,
      open: all("details").map(d => { d.open = true; return d.querySelector("pre").getBoundingClientRect().width; }),
      afterwards: root.scrollWidth,
    };
  });
  document.getElementById("out").textContent = JSON.stringify(found);
};
</script>"""


def measured(pages: Sequence[tuple[str, int]], folder, *flags: str) -> list[dict]:
    """What a browser says of pages, each at its width."""
    frame = '<iframe srcdoc="{}" width="{}" height="800" style="border: 0"></iframe>'
    frames = "".join(frame.format(html.escape(page), width) for page, width in pages)
    file = folder / "measure.html"
    file.write_text(MEASURE % frames, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)})
    out = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.S)
    assert out, done.stderr
    return json.loads(html.unescape(out[1]))


def at_widths(page: str, folder, *flags: str) -> list[dict]:
    """The same of one page at each of the widths."""
    return measured([(page, width) for width in WIDTHS], folder, *flags)


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
    return replace(made, results=tuple(results))


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
    assert {Scale(w).high - Scale(w).low for w in greatest} == set(range(3, 25))
    for w, found in zip(greatest, measured([(r.html(), min(WIDTHS)) for r in worst], tmp_path), strict=True):
        assert (found["meeting"], found["cut"]) == ([], []), f"up to {w:g}"
        labels = Scale(w).labels
        assert 1 in labels and len(labels) > 1


def test_errors_beyond_the_limit_stand_right_of_it(pages):
    for page in pages:
        assert page["limits"] and max(page["limits"]) - min(page["limits"]) < 0.5  # one line through all rows
        assert page["bad"] and min(page["bad"]) > max(page["limits"])
        assert page["good"] and max(page["good"]) <= min(page["limits"])


def test_dark_is_dark(report, pages, tmp_path):
    def brightness(page):
        return sum(map(int, re.findall(r"\d+", page["background"])[:3])) / 3

    dark, *_ = at_widths(report.html(), tmp_path, "--force-dark-mode")
    assert brightness(pages[0]) > 230 and brightness(dark) < 40


def test_a_comparison_fits_every_width(report, tmp_path):
    both = comparison(report, replace(report, backend="other-chip:0", place="emulated device"))
    for found in at_widths(both.html(), tmp_path):
        assert found["needs"] <= found["width"]
        assert (found["meeting"], found["cut"]) == ([], [])
