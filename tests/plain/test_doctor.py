"""The doctor: what it writes, what it leaves out, and that the vendors' pages list what it runs."""

from __future__ import annotations

import getpass
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from porthal.cli import doctor
from porthal.cli.doctor import PASSED, STEPS, Step, private, report, run
from porthal.conformance.diff.check import Check
from porthal.conformance.diff.model import Difference

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(p for p in (ROOT / "docs").glob("*.md") if "porthal doctor --backend" in p.read_text(encoding="utf-8"))
FEW = Step(("backends",), "NAME is available", r"^\*? *NAME +available", emulates=False)


def test_ten_commands():
    assert len(STEPS) == 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_vendors_page_lists_them_and_what_they_must_print(page):
    rows = re.findall(r"^\| `(porthal .*?)` \| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    name = page.stem
    assert rows == [(s.shown.replace("NAME", name), s.words.replace("NAME", name)) for s in STEPS]


def test_pages_are_found():
    assert {"ascend", "cambricon", "kunlunxin", "moore_threads"} <= {page.stem for page in PAGES}


def test_a_step_is_judged_by_its_exit_code_and_by_what_it_prints():
    good = run(FEW, "reference", emulated=False, timeout=60)
    assert (good.code, good.as_expected) == (0, True)
    other = run(Step(("backends",), "", "^NAME is here"), "reference", emulated=False, timeout=60)
    assert (other.code, other.as_expected) == (0, False)
    unknown = run(Step(("explain", "--backend", "NAME"), "", ""), "nochip", emulated=False, timeout=60)
    assert (unknown.code, unknown.as_expected) == (2, False)
    assert "unknown backend 'nochip'" in unknown.output


def test_cases_that_passed_without_one_of_an_own_kernel_prove_nothing():
    """Lines of `conform`; what no kernel takes, it says itself."""
    assert re.search(PASSED, "65 of 66 cases passed (24 own, 37 inherited, 4 refusals); 1 UNCLAIMED")
    assert not re.search(PASSED, "56 of 56 cases passed (52 inherited, 4 refusals)")
    assert not re.search(PASSED, "nothing of ascend was tested yet: 56 of 56 cases passed (52 inherited, 4 refusals)")


def test_what_diff_and_check_say_where_all_holds_is_what_their_pages_want():
    patterns = {step.arguments[0]: step.pattern.replace("NAME", "chip") for step in STEPS}
    said = SimpleNamespace(backend="chip:0", dtype="bfloat16", facts=SimpleNamespace(place="hardware"), _under="", seconds=9.0,
                           calls=[1, 2], stopped="", at_fault=None, failed=["calls"], exit_code=0)
    wrong = SimpleNamespace(label="linear", step=0, fault="too large")
    sentence, verdict = (get.__get__(said) for get in (Difference.sentence.fget, Check.verdict.fget))
    assert re.search(patterns["diff"], sentence()) and re.search(patterns["check"], verdict())
    for code in (1, 2):
        said.at_fault, said.exit_code = wrong, code
        assert not re.search(patterns["diff"], sentence()) and not re.search(patterns["check"], verdict())


def test_a_command_that_hangs_is_stopped():
    stopped = run(Step(("conform", "--backend", "NAME"), "", ""), "reference", emulated=False, timeout=1)
    assert (stopped.code, stopped.as_expected) == (None, False)
    assert "stopped after" in report("reference", {}, [stopped])


def test_one_file_with_versions_variables_and_what_was_printed(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "STEPS", (FEW,))
    file = tmp_path / "told.txt"
    code, out, _ = command_line("doctor", "--backend", "reference", "--out", str(file))
    assert code == 0
    assert out.splitlines()[-1] == "1 of 1 as expected; send back told.txt"
    told = file.read_text(encoding="utf-8")
    assert re.search(r"^python: 3\.", told, re.MULTILINE)
    assert "place: hardware" in told
    assert "--- 1. porthal backends\nas expected: exit code 0" in told
    assert str(tmp_path) not in told and str(ROOT) not in told


def test_what_was_run_before_it_was_stopped_is_in_the_file(command_line, tmp_path, monkeypatch):
    def ended(step, *more):
        if step is not FEW:
            raise KeyboardInterrupt
        return run(step, *more)

    monkeypatch.setattr(doctor, "STEPS", (FEW, Step(("check", "--backend", "NAME"), "one verdict: it holds")))
    monkeypatch.setattr(doctor, "run", ended)
    code, _, _ = command_line("doctor", "--backend", "reference", "--out", file := tmp_path / "told.txt")
    told = file.read_text()
    assert code == 130 and "--- 1. porthal backends\nas expected: exit code 0 after " in told
    assert told.endswith("--- 2. porthal check --backend reference\nit has begun, and not ended\n")


def test_paths_are_told_from_the_package_on_and_names_not_at_all():
    line = f'{ROOT}/backends/torch/backend.py, File "/opt/secret/lib/x.py", ~/key/file and /dev/mtgpu.0 of {getpass.getuser()}x'
    told = private(line)
    assert told.startswith("porthal/backends/torch/backend.py, ")
    assert "secret" not in told and "key" not in told
    assert "/dev/mtgpu.0" in told
    assert private("a/b, 4/5 passed, and/or") == "a/b, 4/5 passed, and/or"
    assert private('File "/home/my project/run.py", line 2, "porthal/x.py"') == 'File "<path>", line 2, "porthal/x.py"'
    assert private(r"on \\server\share\x") == "on <path>"


def test_short_names_of_machines_are_names_and_case_does_not_matter(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "joe.smith")
    monkeypatch.setattr(socket, "gethostname", lambda: "node17.lab.acme.com")
    assert private("node17.lab.acme.com, node17 and JOE.SMITH; node171") == "<name>, <name> and <name>; node171"
