"""Defects by authors who had seen no case: all can be planted, and of the held ones nothing is told but counts."""

import json
from dataclasses import replace

import pytest

from porthal.conformance.selftest.outside import PARTS, Score, Tried, attempt, outside, self_test
from porthal.conformance.selftest.page import ESCAPES
from porthal.conformance.selftest.page import by_others as section
from porthal.conformance.selftest.planting import SOURCES, edited
from porthal.hal import UsageError, contracts


def test_every_edit_applies():
    """Each snippet stands exactly once in a source that is there, be it C++; what comes of Python is Python."""
    for d in outside().values():
        assert d.source in SOURCES, f"{d.key}: there is no source {d.source} any more; renew the edit"
        planted = edited(d.source, d.edits, d.key)
        if not d.native:
            compile(planted, d.key, "exec")


def test_a_part_is_held():
    parts = [d.part for d in outside().values()]
    assert {part: parts.count(part) for part in PARTS} == {"open": 439, "held": 90}
    assert {d.op for d in outside().values()} <= set(contracts())
    assert all(d.family and d.story and d.dtypes for d in outside().values())


def test_the_first_case_that_fails_is_told():
    tried = attempt(("bring-up", "take_rows/missing-rows-of-the-second-block-wrap"))
    assert tried.token.startswith("take_rows,") and tried.verdict.startswith("FAIL") and tried.cases > 1


def trial(part, token, level="standard"):
    defect = next(d for d in outside().values() if d.part == part)
    return Tried(level, defect.op, defect.name, token, "FAIL_VALUE" if token else "", 9, 1.0)


@pytest.mark.parametrize("part", PARTS)
def test_what_escapes_fails_and_is_named_where_it_is_open(part):
    caught = Score.of([trial(part, "take_rows,T=1,0") for part in PARTS], "")
    assert (caught.exit_code, caught.escaped) == (0, [])
    score = Score.of([trial(part, ""), trial(part, "take_rows,T=1,0", "bring-up")], "")
    defect = trial(part, "").defect
    assert score.exit_code == 1
    assert [(r.level, r.part, r.family, r.caught, r.planted) for r in score.rows] == [
        ("bring-up", part, defect.family, 1, 1),
        ("standard", part, defect.family, 0, 1),
    ]
    assert [t.defect for t in score.escaped] == [defect] * (part == "open")
    assert (defect.name in score.json()) == (part == "open")
    assert score.summary.startswith(f"level bring-up, {part}: 1 of 1 caught; level standard, {part}: 0 of 1 caught; 2 s")


def test_a_score_that_was_written_is_read():
    score = Score.of([trial("open", ""), trial("held", "")], "2 defects in C++ were not planted: why")
    assert Score.from_json(score.json()) == score
    assert list(score.lines())[-1] == ["all", "0/1", "0/1"]
    assert json.loads(replace(score, rows=()).json())["exit_code"] == 0


def test_the_page_names_what_escapes_of_the_open_ones_alone():
    assert set(ESCAPES) == {d.family for d in outside().values()}
    score = Score.of([trial(part, "", level) for part in PARTS for level in ("bring-up", "standard")], "")
    page, defect = "\n".join(section(score)), trial("open", "").defect
    assert "| family | bring-up, open | bring-up, held | standard, open | standard, held |" in page
    assert "| all | 0/1 | 0/1 | 0/1 | 0/1 |" in page and "planted 2 more defects" in page
    assert f"| {defect.key} | {defect.kind} | {ESCAPES[defect.family]} |" in page and page.count(defect.key) == 1
    assert trial("held", "").defect.name not in page and "1 held ones escape" in page


def test_the_command_tells_the_score_of_an_op(command_line, tmp_path):
    file = tmp_path / "score.json"
    code, out, _ = command_line("self-test", "--outside", "--quick", "--op", "select_rows", "--workers", 1, "--json", file)
    score = Score.from_json(file.read_text("utf-8"))
    mine = [d for d in outside().values() if d.op == "select_rows"]
    assert (code, sum(r.planted for r in score.rows), score.levels) == (score.exit_code, len(mine), ["bring-up"])
    assert {t.defect for t in score.trials} == {d for d in mine if d.part == "open"}
    assert score.summary in out and not [d.name for d in mine if d.part == "held" and d.name in out]


def test_unknown_ops_are_refused():
    with pytest.raises(UsageError, match="unknown op 'softmax'"):
        self_test(["softmax"])
