"""Reports as pages for people: what the templates show, counted and placed; the templates decide how it looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from porthal.conformance.level import level_of
from porthal.conformance.report.axis import Axis
from porthal.conformance.report.differences import LETTERS
from porthal.conformance.report.results import REFUSAL, figure

if TYPE_CHECKING:
    from porthal.conformance.report.compare import Comparison
    from porthal.conformance.report.report import Report
    from porthal.conformance.report.results import Result

TEMPLATES = Path(__file__).parent / "templates"
LOWEST, HIGHEST = 1e-3, 1e6  # of |e|/B on a plot; values beyond are drawn at its edge
BINS = 4  # of a histogram, per decade
SLOWEST = 10
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "fixed": "fixed"}


class Badge(NamedTuple):
    """One state in a cell of the matrix: its class, its mark, how many cases, and the words for it."""

    state: str
    mark: str
    cases: int
    words: str


class Bar(NamedTuple):
    """A bar of a histogram: own cases below, others above."""

    own: int
    other: int


def report_page(report: Report) -> str:
    """A run as one page without external resources or scripts."""
    results = report.results
    measured = [r for r in results if r.worst > 0]
    limit = level_of(report.level).pointwise
    scale = errors_axis([limit, *(r.worst for r in measured)])
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    return render(
        "report.html",
        report=report,
        dtypes=[(d, DTYPES.get(d, d)) for d in dtypes],
        cells={r.op: {d: _badges(report, [x for x in r.results if x.dtype == d]) for d in dtypes} for r in report.rows},
        proofs=_proofs(report),
        limit=limit,
        scale=scale,
        errors=list(_errors(report)),
        exact=[row.op for row in report.rows if row.passed and not any(r.worst for r in row.results)],
        histograms=[(d, *_histogram([r for r in measured if r.dtype == d], scale)) for d in dtypes],
        slowest=sorted(results, key=lambda r: -r.seconds)[:SLOWEST],
        seconds=sum(r.seconds for r in results),
        waivers=Counter((r.reason, r.waived) for r in report.waived),
    )


def compare_page(comparison: Comparison) -> str:
    """Two runs beside each other."""
    limit = level_of(comparison.reports[0].level).pointwise
    scale = errors_axis([limit, *(side.worst for row in comparison.rows for side in row.sides)])
    return render("compare.html", comparison=comparison, letters=LETTERS, limit=limit, scale=scale)


def errors_axis(shown: Sequence[float]) -> Axis:
    """An axis of |e|/B, from LOWEST to beyond all that is shown."""
    return Axis.decades(LOWEST, 1.2 * max(error for error in shown if error < HIGHEST))


def render(template: str, folder: Path = TEMPLATES, **facts: Any) -> str:
    """A page of a folder of templates; it may build upon those of reports."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["figure"] = figure
    return jinja.get_template(template).render(**facts)


def _badges(report: Report, results: Sequence[Result]) -> list[Badge]:
    """A cell: failures first, then what passed by whose kernel, what is waived, what nobody claims."""
    passed = [r for r in results if r.verdict == "PASS"]
    own, refused = sum(r.own for r in passed), sum(r.status == REFUSAL for r in passed)
    other = len(passed) - own - refused
    count = Counter(r.verdict for r in results)
    failed = sum(r.failed for r in results)
    state, mark = ("own", "✓") if report.on_hardware else ("elsewhere", "◐")
    found = (
        Badge("failed", "✗", failed, f"{failed} failed of {len(results)}"),
        Badge(state, mark, own, f"{own} passed by own kernels ({report.place})"),
        Badge("other", "○", other, f"{other} passed by kernels that are not the chip's"),
        Badge("other", "!", refused, f"{refused} wrong calls, refused before any kernel"),
        Badge("waived", "W", count["WAIVED"], f"{count['WAIVED']} waived"),
        Badge("unclaimed", "–", count["UNCLAIMED"], f"{count['UNCLAIMED']} not claimed"),
        Badge("unclaimed", "·", count["LEFT_OUT"], f"{count['LEFT_OUT']} left out"),
    )
    return [badge for badge in found if badge.cases]


def _proofs(report: Report) -> list[tuple[str, int, str]]:
    """All cases by what they prove: (class, how many, words)."""
    passed, count = report.passed, Counter(r.verdict for r in report.results)
    words = {
        "own": "by the chip's own kernels",
        "composed": "composed of other ops",
        "inherited": "by kernels inherited from its base",
        "fallback": "on another backend",
        REFUSAL: "wrong calls, refused before any kernel",
    }
    return [
        *((status, passed[status], text) for status, text in words.items()),
        ("failed", len(report.failures), "not as the contract says"),
        ("waived", count["WAIVED"], "with the plugin's reason"),
        ("unclaimed", count["UNCLAIMED"], "no kernel takes the call"),
        ("left out", count["LEFT_OUT"], "say nothing of such arrays"),
    ]


class Error(NamedTuple):
    """An op's line on the error plot: the worst case by own kernels and by others, and the median."""

    op: str
    own: float
    other: float
    median: float
    failed: bool
    token: str


def _errors(report: Report) -> Iterator[Error]:
    """Sorted by falling worst error."""
    found = []
    for row in report.rows:
        measured = [r for r in row.results if r.worst > 0]
        if measured:
            own, other = (max((r.worst for r in measured if r.own is whose), default=0.0) for whose in (True, False))
            failed = any(r.failed for r in measured)
            found.append(Error(row.op, own, other, median(r.worst for r in measured), failed, row.worst.token))
    return iter(sorted(found, key=lambda e: -max(e.own, e.other)))


def _histogram(measured: Sequence[Result], scale: Axis) -> tuple[list[Bar], int, int]:
    """Cases by their worst error: the bars, the highest one, and how many cases there are."""
    n = (len(scale.ticks) - 1) * BINS
    own, other = Counter[int](), Counter[int]()
    for r in measured:
        (own if r.own else other)[min(int(scale(r.worst) / 100 * n), n - 1)] += 1
    bars = [Bar(own[i], other[i]) for i in range(n)]
    return bars, max((sum(b) for b in bars), default=0), len(measured)
