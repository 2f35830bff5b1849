"""Two reports beside each other; and the forms of one report that machines read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.cli.app import app
from porthal.conformance import Report, replay, run
from porthal.conformance.report.compare import comparison
from porthal.conformance.report.report import SCHEMA
from porthal.conformance.report.results import replay_command
from porthal.conformance.verdicts import Verdict
from porthal.hal import UsageError, contracts, create, limits, one_of
from tests.benchfiles import benchmark_file, sealed

DOCS = Path(__file__).resolve().parents[2] / "docs"


OPS = ["add", "rms_norm", "silu_mul", "take_rows"]


def truth(op):
    return lambda self, *args, **attrs: create("reference").derive(contracts()[op])(*args, **attrs)


def chip(name, **members):
    return type("Made", (Reference,), {"name": name, **members})()


@pytest.fixture(scope="module")
def fine():
    return run(chip("fine", add=truth("add"), rms_norm=truth("rms_norm"), silu_mul=truth("silu_mul")), OPS)


@pytest.fixture(scope="module")
def rough():
    def wrong(self, x, weight, *, eps=1e-5):
        y = truth("rms_norm")(self, x, weight, eps=eps)
        return -y if len(y) == 17 else y

    narrow = limits(dtypes={"x": one_of("bfloat16")})(truth("silu_mul"))
    return run(chip("rough", add=truth("add"), rms_norm=wrong, silu_mul=narrow), OPS)


# -- comparison ------------------------------------------------------------------------------------------------------


def test_ops_are_ranked_by_level_then_coverage_then_errors(fine, rough):
    rows = {row.op: row for row in comparison(fine, rough).rows}
    assert {op: row.leader for op, row in rows.items()} == {"add": "even", "rms_norm": "A", "silu_mul": "A", "take_rows": ""}
    wide, narrow = rows["silu_mul"].sides
    assert wide.level == narrow.level == "bring-up" and wide.fraction == 1 and 0 < narrow.fraction < 1
    norm = rows["rms_norm"].sides[1]
    assert norm.failed == sum(r.op == "rms_norm" for r in rough.failures) > 0
    assert norm.passed == norm.claimed - norm.failed < norm.cases
    assert rows["take_rows"].sides[0].claimed == 0 == rows["take_rows"].sides[0].worst
    swapped = {row.op: row.leader for row in comparison(rough, fine).rows}
    assert swapped == {"add": "even", "rms_norm": "B", "silu_mul": "B", "take_rows": ""}


def test_a_wrong_kernel_never_leads(fine, rough):
    """Not even where it covers more than a right one that is narrow, or than none."""
    narrow = run(chip("narrow", rms_norm=limits(H=96)(truth("rms_norm"))), OPS)
    for other in (narrow, fine, rough, run(chip("empty"), OPS)):
        rows = {row.op: row for row in comparison(rough, other).rows}
        assert rows["rms_norm"].leader == ("B" if other in (narrow, fine) else "")
    assert rows["rms_norm"].sides[0].fraction > 0.5 and rows["add"].leader == "A"


def test_smaller_errors_lead_where_all_else_is_equal(fine):
    more = [replace(r, worst=2 * r.worst) if r.op == "add" else r for r in fine.results]
    (row,) = [row for row in comparison(fine, replace(fine, backend="b", results=tuple(more))).rows if row.op == "add"]
    a, b = row.sides
    assert row.leader == "A" and b.worst == 2 * a.worst > 0 and b.median == 2 * a.median


def test_worst_and_median_are_those_of_own_kernels(rough):
    row = next(row for row in comparison(rough, rough).rows if row.op == "silu_mul")
    own = sorted(r.worst for r in rough.results if r.op == "silu_mul" and r.status == "own" and r.worst)
    assert row.sides[0].worst == own[-1] and own[0] <= row.sides[0].median <= own[-1]
    assert row.leader == "even" and comparison(rough, rough).names == ["rough A", "rough B"]


def test_the_summary_counts_who_leads(fine, rough):
    assert comparison(fine, rough).summary == (
        "fine leads in 2, rough leads in 0, 1 even, 1 without a right own kernel on any side"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"suite": 99}, "the reports are of suite 1 and 99: compare reports of the same suite"),
        ({"level": "strict"}, "the reports are of level bring-up and strict: compare reports of the same level"),
        ({"contracts": {"add": 7}}, "the reports are of contract add versions 1 and 7: run the older one again"),
        ({"contracts": {"cast": 1}}, "the reports have no op in common: compare reports of the same ops"),
    ],
)
def test_what_was_not_asked_the_same_is_refused(fine, change, sentence):
    if "suite" in change:
        sentence = sentence.replace("1 and", f"{fine.suite} and")
    with pytest.raises(UsageError) as error:
        comparison(fine, replace(fine, **change))
    assert str(error.value) == sentence


HEAD = f'{{"schema": {SCHEMA}, "results": '


def command(capsys, *args):
    with pytest.raises(SystemExit) as left:
        app([*map(str, args)], prog_name="porthal")
    return left.value.code or 0, *capsys.readouterr()


def test_the_command_compares_files_and_writes_a_page(capsys, tmp_path, fine, rough):
    a, b, page = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "page.html"
    a.write_text(fine.json())
    b.write_text(rough.json())
    code, out, err = command(capsys, "compare", a, b, "--html", page)
    assert (code, err) == (0, "")
    assert re.search(r"^rms_norm +bring-up .* A$", out, re.M) and "fine leads in 2" in out
    text = page.read_text()
    assert "fine <span" in text and "fine leads in 2" in text
    assert not re.search(r"(src|href)=|https?://|@import|url\(|<script", text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot read {}: No such file or directory"),
        ("{", "{} is not JSON: "),
        ("[]", "{} is not a report: expected a JSON object"),
        ("{}", "{} is not a conformance report: it lacks schema and results"),
        ("[" * 100_000, "{} is not a report: its JSON is nested too deep"),
        (HEAD + "NaN}", "{} is not JSON: NaN is no number of JSON"),
        ('{"schema": 1, "results": []}', "{} is a report of schema 1, expected " + str(SCHEMA)),
        (HEAD + '[{"token": "add"}]}', "{} is a damaged report ('foreign' is missing): write it again"),
        (HEAD + '[{"foreign": [], "few": []}]}', "{} is a damaged report ("),
        (HEAD + "[]}", "{} is a damaged report (it has no results): write it again"),
        (b"\xff\xfe", "cannot read {}: it is not text"),
    ],
)
def test_a_missing_or_damaged_file_gets_one_sentence(capsys, tmp_path, fine, text, sentence):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(fine.json())
    if text is not None:
        b.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = command(capsys, "compare", a, b)
    assert (code, out) == (2, "")
    assert err.startswith("porthal: " + sentence.format(b)) and err.count("\n") == 1


def test_three_reports_stand_beside_each_other(capsys, tmp_path, fine, rough):
    files = [tmp_path / f"{name}.json" for name in "abc"]
    for file, report in zip(files, (rough, fine, replace(fine, backend="third", place="emulated device"))):
        file.write_text(report.json())
    code, out, _ = command(capsys, "compare", *files)
    assert code == 0 and "different place: hardware (A+B), emulated device (C)" in out
    assert re.search(r"^rms_norm .* even$", out, re.M) and "rough leads in 0, fine leads in 0, third leads in 0, 3 even" in out


def test_what_passes_no_more_fails_over_its_share(capsys, tmp_path, fine, rough):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(fine.json())
    b.write_text(rough.json())
    code, out, _ = command(capsys, "compare", a, b, "--fail-over", "0%")
    norm = [r for r in rough.failures if r.op == "rms_norm"]
    had = sum(r.op == "rms_norm" and r.own for r in fine.results)
    assert code == 1 and f"worse: rms_norm: rough does not pass {len(norm)} of the {had} cases that fine passes" in out
    assert re.search(r"^worse: silu_mul: ", out, re.M) and "worse: add" not in out
    assert command(capsys, "compare", a, b, "--fail-over", "100%")[0] == command(capsys, "compare", a, b)[0] == 0
    assert command(capsys, "compare", b, a, "--fail-over", "0%")[0] == 0


def test_reports_of_one_kind_alone_are_compared(capsys, tmp_path, fine):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(fine.json())
    b.write_text(json.dumps(benchmark_file({"cpu": 1})))
    sentence = f"porthal: {a} is a conformance report and {b} is a benchmark file: compare reports of one kind\n"
    assert command(capsys, "compare", a, b) == (2, "", sentence)
    assert command(capsys, "compare", a) == (2, "", "porthal: got 1 report: expected 2 to 8\n")
    assert command(capsys, "compare", *[a] * 9) == (2, "", "porthal: got 9 reports: expected 2 to 8\n")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"worst": "0.5"}, "worst of result 2 is '0.5', expected a number"),
        ({"z": True}, "z of result 2 is True, expected a number"),
        ({"token": 7}, "token of result 2 is 7, expected text"),
        ({"foreign": [7]}, "foreign of result 2 is (7,), expected a list of text"),
        ({"verdict": "OK"}, "verdict of result 2 is 'OK', expected one of PASS, FAIL_VALUE, "),
        ({"status": "mine"}, "status of result 2 is 'mine', expected one of own, inherited, "),
        ({"worst": 0}, ""),
    ],
)
def test_a_report_with_a_damaged_result_is_refused(fine, change, why):
    data = json.loads(fine.json())
    data["results"][1] |= change
    if not why:
        with pytest.raises(UsageError, match=r"^a report that was changed after it was written"):
            Report.from_json(json.dumps(data))
        assert Report.from_json(json.dumps(sealed(data))).results[1].worst == 0
        return
    with pytest.raises(UsageError) as error:
        Report.from_json(json.dumps(data))
    assert str(error.value).startswith(f"a damaged report ({why}") and str(error.value).endswith("): write it again")


# -- the forms of a report -------------------------------------------------------------------------------------------


def tables(text):
    """Heading -> {field: type} of the tables in a document."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        found[part.splitlines()[0]] = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", part, re.M))
    return found


NAMES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def conforms(value, fields):
    assert list(sorted(value)) == sorted(fields)
    for name, item in value.items():
        permitted = fields[name].split(" or ")
        assert NAMES[type(item)] in [*permitted, *["integer"] * ("number" in permitted)], name


def test_the_json_is_what_the_document_says(rough):
    text = (DOCS / "report-schema.md").read_text(encoding="utf-8")
    known = tables(text)
    assert f"version of this form, {SCHEMA}" in text
    assert all(f"`{verdict}`" in text for verdict in Verdict.__args__)
    data = json.loads(rough.json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    conforms(data, known["Report"])
    for result in data["results"]:
        conforms(result, known["Result"])
    for level in data["levels"].values():
        conforms(level, known["Level"])
    assert set(known["Waiver"]) == {"kind", "pattern", "reason", "expires"}
    assert data["contracts"].keys() == data["levels"].keys() == set(OPS)
    assert Report.from_json(rough.json()) == rough


def test_junit_has_a_testcase_per_case_and_the_command_in_failures(rough):
    odd = replace(rough.results[0], verdict="NOT_JUDGED", message="a \x00 byte & <tag> \ud800")
    waived = replace(rough.results[1], verdict="WAIVED", waived="FAIL_VALUE", reason="known")
    report = replace(rough, results=(odd, waived, *rough.results[2:]))
    root = ElementTree.fromstring(report.junit().encode())
    assert [suite.get("name") for suite in root] == OPS
    found = root.findall("testsuite/testcase")
    assert [c.get("name") for c in found] == [r.token for r in report.results]
    failures = root.findall("testsuite/testcase/failure")
    assert len(failures) == len(rough.failures) > 0
    for failure, result in zip(failures, rough.failures):
        assert failure.get("type") == "FAIL_VALUE" and report.replay(result) in failure.text
    assert [e.get("type") for e in root.iter("error")] == ["NOT_JUDGED"]
    assert [e.get("message") for e in root.iter("skipped")] == ["WAIVED: known"]
    for suite in root:
        for kind in ("failure", "error", "skipped"):
            plural = {"failure": "failures", "error": "errors"}.get(kind, kind)
            assert int(suite.get(plural)) == len(suite.findall(f"testcase/{kind}"))
        assert int(suite.get("tests")) == len(suite.findall("testcase"))


def test_the_command_writes_junit(capsys, tmp_path):
    file = tmp_path / "report.xml"
    code, _, _ = command(capsys, "conform", "--backend", "reference", "--op", "take_rows", "--junit", file, "--workers", 1)
    assert code == 0 and len(ElementTree.parse(file).findall("testsuite/testcase")) > 10


def test_replay_commands_name_level_and_emulation():
    token = "add,T=7,H=96,a:bf16,0"
    assert replay_command(token, "cpu") == f"porthal replay '{token}' --backend cpu"
    assert replay_command(token, "torch:cuda:1", "strict") == f"porthal replay '{token}' --backend torch:cuda:1 --level strict"
    assert replay_command(token, "ascend:0", "standard", "emulated device") == (
        f"porthal replay '{token}' --backend ascend:0 --level standard --emulated"
    )
    simulated = replay_command(token, "mychip", place="emulated device")  # by its vendor's library, not by a module of ours
    assert simulated == f"porthal replay '{token}' --backend mychip"


def test_a_level_decides_what_replay_says():
    """Hence the level in the command: what bring-up permits, strict does not."""

    def one_step_off(self, a, b):
        y = truth("add")(self, a, b)
        y[0, 0] = np.nextafter(y[0, 0], 2 * y[0, 0])
        return y

    made = chip("made", add=one_step_off)
    token = "add,T=7,H=96,a:fp32,0"
    assert replay(token, made).verdict == "PASS" and replay(token, made, "strict").verdict == "FAIL_VALUE"


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_shows_states_place_and_commands(rough):
    page = rough.html()
    assert page.count("porthal replay") == len(rough.failures)
    assert rough.date[:10] in page and rough.device in page and rough.sources["porthal"] in page
    assert 'class="chip own"' in page and 'class="chip other"' in page and "failed of" in page
    assert "Nothing here ran on the chip" not in page and "none (inherited)" in page
    for section in ("Worst error against the budget", "Errors by dtype", "Slowest cases", "Environment"):
        assert f"<h2>{section}</h2>" in page
    assert page.count('class="limit"') > 3 and "<script" not in page


@pytest.mark.parametrize("place", ["emulated device", "vendor package on a stub runtime"])
def test_an_emulated_pass_never_looks_like_a_hardware_pass(rough, place):
    page = replace(rough, place=place).html()
    assert "Nothing here ran on the chip" in page and page.count(place) > 3
    assert 'class="chip own"' not in page and 'class="chip elsewhere"' in page
    assert not re.search(r'class="(dot|bar)-own"', page) and '"dot-own elsewhere"' in page
    assert replace(rough, place=place).overall.endswith(f"({place})")


def test_waivers_and_deviations_are_declared(rough):
    changed = [replace(r, verdict="WAIVED", waived=r.verdict, reason="known & <b>") if r.failed else r for r in rough.results]
    changed = [replace(r, tie="any") if r.op == "take_rows" else r for r in changed]
    report = replace(rough, results=tuple(changed))
    page = report.html()
    assert report.ok and report.deviations == ["take_rows"]
    assert "Declared deviations and waivers" in page and "known &amp; &lt;b&gt;" in page
    assert re.search(r"<b>take_rows</b>: the kernel orders equal scores in its own way", page)
