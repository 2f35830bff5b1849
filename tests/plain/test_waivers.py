"""Waivers: what their file may say, which cases they excuse, and how they are kept honest."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from textwrap import dedent

import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import Report, run
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.waivers import Waiver, parse, verify, waive, waivers
from porthal.hal import UsageError, limits, one_of

ROOT = Path(__file__).resolve().parents[2]
TODAY = date(2026, 6, 1)
GOOD = """
[[unsupported]]
pattern = "add,*a:fp16*"
reason = "the chip has no float16"

[[known_failure]]
pattern = "add,T=312,*"
reason = "counts to 16"
expires = 2026-07-01

[[known_failure]]
pattern = "topk,*"
reason = "ties"
expires = "2026-07-02"
"""


def test_the_file_says_what_how_long_and_why():
    assert parse(GOOD) == (
        Waiver("unsupported", "add,*a:fp16*", "the chip has no float16"),
        Waiver("known_failure", "add,T=312,*", "counts to 16", date(2026, 7, 1)),
        Waiver("known_failure", "topk,*", "ties", date(2026, 7, 2)),
    )
    assert parse("") == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[unsupported]\n", "plugin/waivers.toml is not TOML: "),
        ("[[unsuported]]\npattern = 'a'", "has 'unsuported': expected lists [[unsupported]] and [[known_failure]]"),
        ("unsupported = 'add'", "has 'unsupported': expected lists"),
        ("unsupported = ['add']", "unsupported 1 is 'add', expected a table with pattern and reason"),
        ("[[unsupported]]\nreason = 'x'", "unsupported 1 has pattern None, expected text"),
        ("[[unsupported]]\npattern = 'x'\nreason = ' '", "unsupported 1 has reason ' ', expected text"),
        ("[[unsupported]]\npattern = 'x'\nreason = 'x'\nuntil = 1", "'until': expected only pattern, reason and"),
        ("[[known_failure]]\npattern = 'x,*'\nreason = 'y'", "known_failure 1 ('x,*') lacks expires"),
        ("[[known_failure]]\npattern = 'x'\nreason = 'y'\nexpires = 'soon'", "expires 'soon', expected a day such as"),
        ("[[known_failure]]\npattern = 'x'\nreason = 'y'\nexpires = 3", "has expires '3', expected a day such as"),
        ("[[known_failure]]\npattern = 'x'\nreason = 'y'\nexpires = 2026-01-01T10:00:00", "expected a day such as"),
    ],
)
def test_a_malformed_file_gets_one_sentence(text, sentence):
    with pytest.raises(UsageError) as error:
        parse(text, "plugin/waivers.toml")
    assert sentence in str(error.value) and str(error.value).startswith("plugin/waivers.toml")
    assert "\n" not in str(error.value)


def test_a_pattern_leaves_deliberate_mistakes_alone_unless_it_names_them():
    everything = Waiver("unsupported", "add,*", "none")
    assert everything.matches("add,T=7,H=96,a:fp16,0")
    assert not everything.matches("add,T=7,H=96,a:fp16,fault=dtype,0")
    assert not everything.matches("add_rms_norm,T=7,H=96,x:fp16,0")
    assert Waiver("unsupported", "add,*fault=dtype*", "none").matches("add,T=7,H=96,a:fp16,fault=dtype,0")


def wrong(self, a, b):
    """Wrong at 312 rows, and nowhere else."""
    return a - b if len(a) == 312 else a + b


@pytest.fixture(scope="module")
def found():
    machine = type("Made", (Reference,), {"name": "made", "add": wrong})()
    return run(machine, ["add"])


def test_what_failed_is_waived_and_keeps_what_it_was(found):
    known = parse(GOOD)
    waived = [waive(r, known, TODAY) for r in found.results]
    excused = [r for r in waived if r.verdict == "WAIVED"]
    assert [(r.token.split(",")[1], r.waived, r.reason) for r in excused] == [("T=312", "FAIL_VALUE", "counts to 16")]
    assert len(found.failures) == 1 and not any(r.failed for r in waived)
    assert [r for r in waived if ",T=312," not in r.token] == [r for r in found.results if ",T=312," not in r.token]
    assert "FAIL_VALUE was waived: counts to 16" in excused[0].explain()


def test_what_nobody_claims_is_waived_as_well():
    kernel = limits(dtypes={"a": one_of("bfloat16")})(wrong)
    from porthal.hal import Backend

    report = run(type("Made", (Backend,), {"name": "made", "base": None, "add": kernel})(), ["add"])
    waived = [waive(r, parse(GOOD), TODAY) for r in report.results]
    changed = [r for r in waived if r.verdict == "WAIVED" and r.waived == "UNCLAIMED"]
    assert changed and all("a:fp16" in r.token and "fault=" not in r.token for r in changed)
    assert all(r.verdict == "UNCLAIMED" for r in waived if "a:fp32" in r.token)


def test_an_expired_waiver_holds_no_more(found):
    failed = found.failures[0]
    assert waive(failed, parse(GOOD), date(2026, 6, 30)).verdict == "WAIVED"
    assert waive(failed, parse(GOOD), date(2026, 7, 1)).verdict == "FAIL_VALUE"


def test_verification_names_each_entry_that_is_not_honest(found):
    results = [waive(r, parse(GOOD), TODAY) for r in found.results]
    assert verify(parse(GOOD)[1:2], results, TODAY) == []
    (stale,) = verify([Waiver("unsupported", "add,*a:fp16*", "x")], results, TODAY)
    assert stale.startswith("unsupported 'add,*a:fp16*' is stale: add,") and stale.endswith(
        "passed; remove it, or narrow its pattern"
    )
    (expired,) = verify([Waiver("known_failure", "add,T=312,*", "x", date(2026, 1, 1))], results, TODAY)
    assert expired == (
        "known_failure 'add,T=312,*' expired on 2026-01-01: repair what it waives, or give it a later day"
    )
    (never,) = verify([Waiver("unsupported", "softmax,*", "x")], results, TODAY)
    assert never == "unsupported 'softmax,*' matches no case of any level: remove it, or copy the pattern from a report"


def test_an_entry_for_a_higher_level_or_an_op_that_was_not_run_is_none_that_never_matches(found):
    assert verify([Waiver("unsupported", "add,T=257,*", "x"), Waiver("unsupported", "linear,*", "x")], found.results) == []


def test_backends_here_have_no_waivers_and_a_class_outside_any_package_has_none():
    assert waivers(Reference()) == ()
    assert waivers(type("Made", (Reference,), {"name": "made", "__module__": "alone"})()) == ()


# -- from a plugin's package, through the command --------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path):
    """`conform --op add --backend waived` with this text as waivers.toml: (exit code, stdout, stderr)."""
    package = tmp_path / "waived_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("requires = ()\n")
    (package / "backend.py").write_text(
        dedent("""
        from porthal.backends.reference.backend import Reference

        class Waived(Reference):
            def add(self, a, b):
                return a - b if len(a) == 312 else a + b
        """)
    )
    info = tmp_path / "waived_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: waived-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[porthal.backends]\nwaived = waived_plugin\n")
    paths = os.pathsep.join(filter(None, [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH")]))

    def conform(text, *options):
        (package / "waivers.toml").write_text(text)
        program = [sys.executable, "-c", "from porthal.cli import main; main()", "conform", "--backend", "waived"]
        done = subprocess.run(
            [*program, "--op", "add", "--workers", "1", *options],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr

    return conform


IN_FORCE = '[[known_failure]]\npattern = "add,T=312,*"\nreason = "counts to 16"\nexpires = 2999-01-01\n'


def test_a_plugins_waivers_decide_the_exit_code(plugin, tmp_path):
    code, out, _ = plugin("")
    assert code == 1 and "FAIL_VALUE" in out
    code, out, _ = plugin(IN_FORCE, "--verify-waivers", "--json", str(tmp_path / "report.json"))
    assert code == 0 and "1 waived: counts to 16" in out and "1 WAIVED" in out
    report = Report.from_json((tmp_path / "report.json").read_text())
    assert report.waivers == (Waiver("known_failure", "add,T=312,*", "counts to 16", date(2999, 1, 1)),)
    assert [(r.verdict, r.waived) for r in report.waived] == [("WAIVED", "FAIL_VALUE")]
    code, out, _ = plugin(IN_FORCE + '[[unsupported]]\npattern = "add,T=1,*"\nreason = "gone"\n', "--verify-waivers")
    assert code == 1 and "waivers.toml: unsupported 'add,T=1,*' is stale" in out


def test_an_expired_waiver_is_told_without_being_asked_for(plugin):
    code, out, _ = plugin(IN_FORCE.replace("2999", "2026"))
    assert code == 1 and "1 FAIL_VALUE" in out
    sentence = "waivers.toml: known_failure 'add,T=312,*' expired on 2026-01-01: repair what it waives, or give it a later day"
    assert out.count(sentence) == 1
    code, out, _ = plugin(IN_FORCE.replace("2999", "2026"), "--verify-waivers")
    assert code == 1 and out.count(sentence) == 1


def test_a_malformed_file_stops_the_run_before_it_begins(plugin):
    code, out, err = plugin("[[known_failure]]\npattern = 'add,*'\nreason = 'x'\n")
    assert (code, out) == (2, "")
    assert err.strip() == (
        "porthal: waived_plugin/waivers.toml: known_failure 1 ('add,*') lacks expires: "
        "a known failure needs a day such as expires = 2027-01-01"
    )


def test_facts_carry_the_waivers():
    assert Facts.of(Reference()).waivers == ()
