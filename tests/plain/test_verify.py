"""A report of somebody else, run again in part: what holds, what does not, and the mark that it gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from porthal import conformance
from porthal.conformance import Report
from porthal.conformance.report.verification import drawn
from porthal.hal import UsageError
from tests.benchfiles import sealed


@pytest.fixture(scope="module")
def report() -> Report:
    return conformance.run("reference", ["add"], dtypes=["float32"], isolate=False)


@pytest.fixture
def verify(command_line, tmp_path: Path):
    """(exit code, stdout, stderr) of verifying a report, and the file with its mark."""

    def call(report: Report, *args: object):
        file = tmp_path / "report.json"
        file.write_text(report.json())
        answer = command_line("verify", file, "--json", tmp_path / "marked.json", "--workers", 1, *args)
        return answer, tmp_path / "marked.json"

    return call


def test_a_report_that_holds_is_marked_as_reproduced(verify, report, command_line, tmp_path):
    (code, out, _), file = verify(report, "--share", "20%")
    n = -(-len(report.results) // 5)
    assert code == 0 and f"reference (hardware): {n} of {len(report.results)} rows, drawn at random" in out
    assert f"\nreproduced: {n} of {n} drawn rows held, " in out and "different" not in out
    marked = Report.from_json(file.read_text())
    assert replace(marked, reproduced=None) == report and marked.receipt == report.receipt
    assert (marked.reproduced.rows, marked.reproduced.held) == (n, n)
    assert marked.reproduced.sources == report.sources
    assert report.origin == "self-reported" and ">self-reported<" in report.html()
    assert '<span class="origin reproduced">reproduced: ' in marked.html()
    (tmp_path / "report.json").write_text(report.json())
    code, _, _ = command_line("compare", tmp_path / "report.json", file, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and page.count('class="origin reproduced"') == page.count('class="origin self-reported"') == 1


def test_rows_that_do_not_come_out_again_are_named(verify, report):
    first, second, *others = report.results
    wrong = replace(first, verdict="FAIL_VALUE", message="y is off"), replace(second, status="inherited", owner="somebody")
    (code, out, _), file = verify(replace(report, results=(*wrong, *others)), "--share", "100%")
    assert code == 1 and out.count("does not hold: ") == 2
    assert f"does not hold: {first.token}\n  said: FAIL_VALUE (own): y is off\n  here: PASS (own)\n  porthal replay '" in out
    assert "  said: PASS (inherited)\n  here: PASS (own)\n" in out
    marked = Report.from_json(file.read_text())
    assert marked.origin.startswith(f"not reproduced: {len(report.results) - 2} of {len(report.results)} drawn rows held, ")
    assert '<span class="origin not-reproduced">' in marked.html()


def test_a_waived_failure_holds_when_it_fails_again_and_what_differs_is_told(verify, report):
    passing = report.results[0]
    waived = replace(passing, verdict="WAIVED", waived="PASS", reason="known")
    other = replace(report, results=(waived,), device="another chip", environment={**report.environment, "numpy": "1.0"})
    (code, out, _), _ = verify(other)
    assert code == 0 and "different device: another chip there, " in out and "different numpy: 1.0 there, " in out


def test_rows_are_drawn_anew_each_time_and_in_order():
    rows = list(range(200))
    found = [drawn(rows, 0.05) for _ in range(20)]
    assert all(len(f) == 10 and f == sorted(set(f)) for f in found) and len({n for f in found for n in f}) > 50
    assert drawn(rows, 0) and drawn(rows, 1) == rows
    with pytest.raises(UsageError, match=r"^the report has no row that can be run again: nothing in it was tested$"):
        drawn([], 0.5)


def test_what_cannot_be_verified_is_refused_in_one_sentence(verify, report, command_line, tmp_path):
    left = replace(report.results[0], verdict="LEFT_OUT")
    (code, out, err), _ = verify(replace(report, results=(left,)))
    assert (code, out) == (2, "") and err == "porthal: the report has no row that can be run again: nothing in it was tested\n"
    gone = replace(report.results[0], token="add@9,T=1,0")
    (code, out, err), _ = verify(replace(report, results=(gone,)))
    assert (code, out) == (2, "") and "is for version 9 of add" in err and err.count("\n") == 1
    (code, out, err), _ = verify(replace(report, backend="nochip"))
    assert (code, out) == (2, "") and "nochip" in err and err.count("\n") == 1
    file = tmp_path / "report.json"
    assert command_line("verify", file, "--json", file)[2].startswith(f"porthal: --json is {file}, which is the report itself")


@pytest.mark.parametrize(
    "mark", [{}, {"rows": 0, "held": 0}, {"rows": 1, "held": 2}, {"rows": 1, "held": 1, "device": "a\x1b[0m"}, [], "yes"]
)
def test_a_damaged_mark_is_refused(report, mark):
    data = json.loads(report.json())
    whole = {"rows": 1, "held": 1, "noisy": 2, "date": "today", "device": "here", "sources": {}, "seal": ""}
    data["reproduced"] = whole
    said = "reproduced: 1 of 3 drawn rows held, 2 were too noisy there to say, today, here"
    assert Report.from_json(json.dumps(sealed(data))).origin == said
    data["reproduced"] = whole | mark if isinstance(mark, dict) and mark else mark
    with pytest.raises(UsageError, match=r"^a damaged report \("):
        Report.from_json(json.dumps(sealed(data)))


def test_a_mark_that_verify_did_not_make_of_this_report_is_refused(verify, report):
    _, file = verify(report, "--share", "20%")
    data = json.loads(file.read_text())
    data["reproduced"]["rows"] = data["reproduced"]["held"] = 6000
    with pytest.raises(UsageError, match=r"^a report whose mark was not made for it as it is, as its seal shows"):
        Report.from_json(json.dumps(data))
