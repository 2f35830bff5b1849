"""Isolation: a backend that does its worst in one case each, in real worker processes; journals; bounds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from porthal.cli.app import app
from porthal.conformance import Report, replay, run
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.plan import cases
from porthal.conformance.judgement.saved import read
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.journal import Journal
from porthal.conformance.report.results import Result
from porthal.conformance.runner.remaining import Remaining
from porthal.conformance.runner.workers import Bounds, Group, Setup
from porthal.conformance.verdicts import Judgement
from porthal.hal import Choice, UsageError, contracts, create
from tests import inner

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-c", "from porthal.cli import main; main()"]
# What happens to a call of `add`, known by its first operand's bytes: each is one case.
DEADLY = """
    import ctypes, os, signal, sys, time, zlib
    import numpy as np
    from porthal.backends.reference.backend import Reference

    class Chip(Reference):
        def add(self, a, b):
            deed = {deeds}.get(zlib.crc32(a.tobytes()))
            if deed:
                globals()[deed]()
            return (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)

    def segfaults():
        ctypes.string_at(0)

    def aborts():
        os.abort()

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs():
        time.sleep(1000)

    def hoards():
        return [np.empty(2**26) for _ in range(64)]

    def leaves():
        print("no such device", file=sys.stderr)
        os._exit(3)

    def fails():
        raise RuntimeError("no such core")
"""
SENTENCES = {
    "segfaults": ("CRASH", "killed by SIGSEGV in string_at (__init__.py:"),
    "aborts": ("CRASH", "killed by SIGABRT in aborts (backend.py:16), called by add (backend.py:9), called by "),
    "killed": ("CRASH", "killed by SIGKILL, as the system does when memory runs out"),
    "hangs": ("TIMEOUT", "no answer within 3 s"),
    "hoards": ("CRASH", "out of memory: MemoryError: Unable to allocate 512. MiB"),
    "leaves": ("CRASH", "exited with code 3: no such device"),
    "fails": ("FAIL_ERROR", "RuntimeError: no such core"),
}


def additions() -> list[Case]:
    return [c for c in cases(contracts()["add"]) if not (c.fault or c.distinct) and build(c).operands["a"].size]


def mark(case: Case) -> int:
    """Of the first call."""
    return zlib.crc32(build(replace(case, seq="")).operands["a"].tobytes())


@pytest.fixture
def deadly(install: Any) -> dict[str, str]:
    """The plugin, and what happens in which case."""
    victims = dict(zip(additions()[1:], SENTENCES))
    install("deadly", DEADLY.format(deeds={mark(case): deed for case, deed in victims.items()}))
    return {case.token: deed for case, deed in victims.items()}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A plugin as an installer leaves it, for this process's workers and for commands."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))

    def write(name: str, backend: str) -> None:
        package = folder / f"{name}_plugin"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "backend.py").write_text(dedent(backend).lstrip())
        info = folder / f"{name}_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[porthal.backends]\n{name} = {name}_plugin\n")

    return write


def command(*args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def workers_of(pid: int) -> list[int]:
    """Processes whose parent this one is."""
    stats = [p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob(f"{pid}/task/*/stat")]
    assert stats
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


# -- what kills a worker ---------------------------------------------------------------------------------------------


def test_a_case_that_takes_its_process_down_costs_that_case_alone(deadly: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = command("conform", "--backend", "deadly", "--op", "add", "--op", "cast", "--timeout", 3, "--json", file)
    report = Report.from_json(file.read_text())
    found = {r.token: r for r in report.results}
    assert done.returncode == 1
    assert len(deadly) == len(SENTENCES)
    for token, deed in deadly.items():
        verdict, message = SENTENCES[deed]
        assert found[token].verdict == verdict
        assert found[token].message.startswith(message)
        assert (found[token].status, found[token].owner) == ("own", "deadly")  # known before the kernel was called
        assert token in done.stdout
    assert {r.verdict for t, r in found.items() if t not in deadly} == {"PASS"}
    plan = [case.token for op in ("add", "cast") for case in cases(contracts()[op])]
    assert [r.token for r in report.results] == plan
    assert not file.with_name("report.json.journal").exists()


def test_a_library_that_keeps_its_compiled_programs_costs_no_case(install: Any) -> None:
    """20 MiB more with every call, as a compiler per shape does: in all far more than a case may take."""
    install(
        "keeping",
        """
        import numpy as np
        from porthal.backends.reference.backend import Reference

        class Chip(Reference):
            programs = []

            def add(self, a, b):
                self.programs.append(np.empty(20 * 2**17))
                return (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)
        """,
    )
    report = run("keeping", ops=["add"], bounds=Bounds(workers=1, memory=1))
    assert [r.explain() for r in report.results if r.failed] == []
    assert len(report.results) > 20


def test_replay_survives_as_well(deadly: dict[str, str]) -> None:
    token = next(t for t, deed in deadly.items() if deed == "killed")
    done = command("replay", token, "--backend", "deadly")
    assert done.returncode == 1
    assert done.stdout.startswith("CRASH: add by deadly's own kernel\nkilled by SIGKILL")


@pytest.mark.parametrize("deed", ["segfaults", "hangs", "hoards", "leaves", "fails"])
def test_what_gave_no_result_is_saved_without_one(
    deadly: dict[str, str], deed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = next(t for t, d in deadly.items() if d == deed)
    file = tmp_path / "case.npz"
    said = (
        f"saved without results, because none came back: `python {file.with_suffix('.py')}` measures it, "
        f"`porthal replay {file}` judges it again\n"
    )
    for call, told in ((token, said), (file, "")):
        with pytest.raises(SystemExit) as left:
            saving = ["--save", str(tmp_path)] if told else []
            app(["replay", str(call), "--backend", "deadly", "--timeout", "3", *saving], "porthal")
        out, err = capsys.readouterr()
        verdict, message = SENTENCES[deed]
        assert (left.value.code, err) == (1, told)
        assert out.startswith(f"{verdict}: add by deadly's own kernel\n{message}"), out
    kept = np.load(file)
    assert {key for key in kept if key.partition("/")[0] in ("golden", "budget", "got")} == {"golden/y", "budget/y"}
    assert replay(read(file), "reference", isolate=False).verdict == "PASS"


def test_pytest_survives_as_well(install: Any, tmp_path: Path) -> None:
    victim = additions()[0]
    install("fatal", DEADLY.format(deeds={mark(victim): "aborts"}))
    options = inner.options("--porthal-backend=fatal", "-k", "add and not rms")
    (tmp_path / "test_mine.py").touch()
    program = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    same = sum(mark(c) == mark(victim) for c in additions())  # programs begin with the very call
    assert re.search(rf"^{same} failed, \d\d passed", done.stdout, re.MULTILINE), done.stdout
    assert "CRASH: add by fatal's own kernel" in done.stdout and f"FAILED ::{victim.token}" in done.stdout


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.abort()", "killed by SIGABRT in <module> (backend.py:2), called by _call_with_frames_removed"),
        ("os._exit(7)", "exited with code 7"),
        ("raise OSError('no driver')", "backend 'dead' is broken: dead_plugin: OSError: no driver (backend.py:2)"),
    ],
)
def test_a_backend_that_dies_at_its_start_is_one_sentence(install: Any, body: str, said: str) -> None:
    install("dead", f"import os\n{body}\n")
    done = command("conform", "--backend", "dead", "--op", "add", "--workers", 1)
    assert (done.returncode, done.stdout) == (2, "")
    prefix = "" if "broken" in said else "backend 'dead' does not start: "
    assert done.stderr.startswith(f"porthal: {prefix}{said}") and done.stderr.count("\n") == 1


def test_what_is_left_when_no_worker_starts_any_more_is_not_judged(install: Any, tmp_path: Path) -> None:
    install(
        "once",
        f"""
        import os
        from pathlib import Path
        from porthal.backends.reference.backend import Reference

        Path({str(tmp_path / "starts")!r}).open("a").write("x")
        if Path({str(tmp_path / "starts")!r}).stat().st_size > 1:
            os._exit(9)

        class Chip(Reference):
            def add(self, a, b):
                if len(a) == 7:
                    os.abort()
                return (a.astype("float32") + b.astype("float32")).astype(a.dtype)
        """,
    )
    file = tmp_path / "run.journal"
    report = run("once", ["add"], bounds=Bounds(workers=1), journal=file)
    found = {r.token: r for r in report.results}
    order = [c.token for c in Remaining(cases(contracts()["add"])).cases]
    verdicts = [found[token].verdict for token in order]
    at = verdicts.index("CRASH")
    assert verdicts == ["PASS"] * at + ["CRASH"] + ["NOT_JUDGED"] * (len(verdicts) - at - 1) and 0 < at < len(verdicts) - 1
    assert found[order[-1]].message == "backend 'once' does not start: exited with code 9"
    assert len(file.read_text().splitlines()) == 1 + at + 1  # the others are asked for again
    assert (tmp_path / "starts").stat().st_size == 2


def test_workers_end_with_the_run(install: Any) -> None:
    before = workers_of(os.getpid())
    run("reference", ["select_rows"])
    assert workers_of(os.getpid()) == before


STUCK = """
    import ctypes, pathlib
    from porthal.backends.reference.backend import Reference

    def hang():
        pathlib.Path({flag!r}).touch()
        ctypes.PyDLL(None).sleep(1000)  # which keeps Python's lock, as a kernel in C may

    class Chip(Reference):
        def add(self, a, b):
            hang()
"""


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("options", [["--workers", "1"], ["--properties", "2", "--workers", "1"]])
def test_a_worker_that_hangs_ends_with_a_run_that_is_killed(
    install: Any, tmp_path: Path, at_start: bool, options: list[str]
) -> None:
    flag = tmp_path / "hangs"
    install("stuck", STUCK.format(flag=str(flag)) + "\n    hang()\n" * at_start)
    run = subprocess.Popen([*PROGRAM, "conform", "--backend", "stuck", "--op", "add", *options], cwd=ROOT)
    until = time.monotonic() + 30
    while time.monotonic() < until and not flag.exists():
        time.sleep(0.05)
    children = workers_of(run.pid)
    run.kill()
    run.wait()
    while time.monotonic() < until and Path(f"/proc/{children[0]}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{children[0]}").exists()


def test_a_script_without_a_main_guard_may_run(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("from porthal.conformance import run\nprint(run('reference', ['select_rows']).summary)\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    count = len(cases(contracts()["select_rows"]))
    assert re.fullmatch(rf"{count} of {count} cases passed \(\d+ own, \d+ refusals\)\n", done.stdout), done.stderr


def test_a_worker_whose_parent_died_while_it_started_ends() -> None:
    program = "from porthal.conformance.runner.workers import ends_with; ends_with(1); print('goes on')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize("deed", ["hangs", "leaves"])
def test_what_ends_before_a_kernel_is_chosen_is_not_called_unclaimed(deed: str) -> None:
    judged = Judgement("TIMEOUT" if deed == "hangs" else "CRASH", "no answer within 3 s")
    result = Result.of(additions()[0], judged, None, 3.0)
    assert result.status == "unknown" and "no kernel" not in result.explain()
    report = Report.of(create("reference"), "bring-up", [result])
    assert (str(report.levels["add"]), report.exit_code) == ("none (failed)", 1)
    assert "not claimed" not in str(report.levels["add"]) and report.rows[0].whose == "1 unknown"


def test_isolated_or_not_the_verdicts_are_the_same() -> None:
    apart, here = (run("reference", ["rms_norm"], isolate=isolate) for isolate in (True, False))
    assert [(r.token, r.verdict, r.worst, r.z) for r in apart.results] == [
        (r.token, r.verdict, r.worst, r.z) for r in here.results
    ]
    assert (apart.environment, apart.place) == (here.environment, here.place)


@pytest.mark.parametrize("value", [0, float("inf")])
@pytest.mark.parametrize("name", ["workers", "timeout", "memory"])
def test_bounds_are_positive_and_finite(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is (0|inf): expected more than 0 and less than a million$"):
        Bounds(**{name: value})


def test_ranks_are_numbered_and_the_kernel_named_is_that_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answering:
        """A worker without a process."""

        def __init__(self, setup: Setup, python: str) -> None:
            self.setup, self.pipe = setup, object()

        def received(self) -> Choice:
            return Choice("add", "own", f"rank {self.setup.rank}", "", "")

    monkeypatch.setattr("porthal.conformance.runner.workers.Worker", Answering)
    group = Group(Setup("reference", "bring-up", False, 3.0, ranks=3))
    assert [worker.setup.rank for worker in group.workers] == [0, 1, 2]
    assert group.answer(group.pipes) is None
    assert group.choice == Choice("add", "own", "rank 0", "", "")


# -- journals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_is_continued(install: Any, tmp_path: Path, number: signal.Signals) -> None:
    """Stopped while a kernel hangs: verdicts stay, workers do not, and the rest is asked for once."""
    calls, flag = tmp_path / "calls", tmp_path / "hang"
    flag.touch()
    plan = cases(contracts()["add"])
    order = Remaining(plan).cases
    victim = [c for c in order if c in additions()][5]
    before, later = order[: order.index(victim)], mark(victim)
    install(
        "slow",
        f"""
        import time, zlib
        from pathlib import Path
        from porthal.backends.reference.backend import Reference

        class Chip(Reference):
            def add(self, a, b):
                Path({str(calls)!r}).open("a").write(f"{{zlib.crc32(a.tobytes())}} ")
                if zlib.crc32(a.tobytes()) == {later} and Path({str(flag)!r}).exists():
                    time.sleep(1000)
                return (a.astype("float32") + b.astype("float32")).astype(a.dtype)
        """,
    )
    file = tmp_path / "report.json"
    journal = file.with_name("report.json.journal")
    options = [*PROGRAM, "conform", "--backend", "slow", "--op", "add", "--workers", "1"]
    heard = partial(signal.signal, number, signal.SIG_DFL)  # where the tests themselves run in the background, it is not
    stopped = subprocess.Popen([*options, "--json", file], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    until = time.monotonic() + 30
    while time.monotonic() < until and not (calls.exists() and str(later) in calls.read_text()):
        time.sleep(0.05)
    children = workers_of(stopped.pid)
    stopped.send_signal(number)
    assert stopped.stderr is not None
    *_, said = stopped.stderr.read().splitlines()
    assert said == f"porthal: stopped: run the same command with --resume {journal} to continue"
    assert stopped.wait(30) == 128 + number
    assert len(children) == 1 and not Path(f"/proc/{children[0]}").exists()
    kept = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert [(r["token"], r["verdict"]) for r in kept] == [(c.token, "PASS") for c in before]

    flag.unlink()
    calls.unlink()
    with journal.open("a") as torn:
        torn.write('{"token": "add,T=')
    done = subprocess.run([*options, "--json", file, "--resume", journal], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = Report.from_json(file.read_text())
    assert [r.token for r in report.results] == [c.token for c in plan] and report.ok
    assert str(later) in calls.read_text().split()
    done_before, rest = ({str(mark(c)) for c in each if c in additions()} for each in (before, order[len(before) :]))
    assert len(done_before - rest) > 2 and not (done_before - rest) & set(calls.read_text().split())
    assert len(journal.read_text().splitlines()) == 1 + len(report.results)


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    file, here = tmp_path / "run.journal", partial(run, "reference", ["select_rows"], isolate=False)
    here(journal=file)
    with pytest.raises(UsageError, match=r'the journal of a conformance run with level "bring-up", this one has "strict"'):
        here(level="strict", journal=file, resume=True)
    lines = file.read_text().splitlines(keepends=True)
    for name, value in (("backend", "torch"), ("suite", 0), ("numpy", "1.0")):
        other = tmp_path / f"{name}.journal"
        other.write_text(json.dumps(json.loads(lines[0]) | {name: value}) + "\n")
        with pytest.raises(UsageError, match=f"of a conformance run with {name} {json.dumps(value)}, this one has "):
            here(journal=other, resume=True)
    other = tmp_path / "sources.journal"
    other.write_text(json.dumps(json.loads(lines[0]) | {"sources": {"porthal": "0"}}) + "\n")
    with pytest.raises(UsageError, match=r'run with sources \{"porthal": "0"\}, this one has \{"porthal": "'):
        here(journal=other, resume=True)
    rubbish = tmp_path / "report.json"
    rubbish.write_text("[1]\n")
    with pytest.raises(UsageError, match=r"report\.json is not the journal of a conformance run"):
        here(journal=rubbish, resume=True)
    assert rubbish.read_text() == "[1]\n"


def test_a_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    facts = Facts.of(create("reference"))
    case = cases(contracts()["moe_layer"])[0]
    result = Result.of(case, Judgement("FAIL_VALUE", "y[0] is odd", 3.5, "y[0]", 2.0, -7.0), None, 1.25, ("linear",))
    journal = Journal(tmp_path / "a", facts, "bring-up", resume=False)
    journal.add(result)
    journal.close()
    again = Journal(tmp_path / "a", facts, "bring-up", resume=True)
    again.close()
    assert again.known == [result]


TWO = """
    import numpy as np
    from porthal.backends.reference.backend import Reference
    from porthal.hal import at_most, limits

    class Few:
        @limits(provider="few", H=at_most(96))
        def add(self, a, b):
            return (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)

    class Chip(Few, Reference):
        @limits(provider="many")
        def add(self, a, b):
            return (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)
"""


def test_every_provider_is_tested_in_workers_too(install: Any) -> None:
    install("two", TWO)
    results = run("two", ["add"], bounds=Bounds(1)).results
    assert [r.explain() for r in results if r.failed] == []
    assert {r.provider for r in results if r.status == "own"} == {"few", "many"}
    assert any("via=few" in r.token for r in results)


def test_a_replay_in_a_worker_is_waived_and_bounded_as_the_run_is(install: Any) -> None:
    install("slow", DEADLY.format(deeds={mark(additions()[1]): "hangs"}))
    token = additions()[1].token
    site = next(Path(folder) for folder in sys.path if (Path(folder) / "slow_plugin").is_dir())
    assert replay(token, "slow", bounds=Bounds(1, timeout=2)).message == "no answer within 2 s"
    (site / "slow_plugin" / "waivers.toml").write_text(f"[[unsupported]]\npattern = '{token}'\nreason = 'stuck'\n")
    again = replay(token, "slow", bounds=Bounds(1, timeout=2))
    assert (again.verdict, again.waived, again.reason) == ("WAIVED", "TIMEOUT", "stuck")
    done = command("replay", token, "--backend", "slow", "--timeout", "2")
    assert done.returncode == 0 and "TIMEOUT was waived: stuck" in done.stdout
