"""`porthal bench` from end to end, small: judged, timed in turns, held to the machine's limits, kept, and read by others."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from porthal.bench.report import Report
from porthal.bench.roofline import ARITHMETIC
from porthal.bench.run import bench
from porthal.bench.scale import Bounds
from porthal.bench.worker import Backstage
from porthal.bench.workloads import workload
from porthal.conformance.verdicts import Judgement
from porthal.hal import create

pytestmark = pytest.mark.usefixtures("few_rounds")
SECONDS = 600.0  # that nobody waits for: calls are done after a few rounds
PEAKS = ("fp32", "bf16", "dram", "l3", "l2", "copy")


@pytest.fixture(scope="module")
def few():
    """Two calls of the demo checkpoint's decode step."""
    made = workload("demo", ["decode"], "", Bounds()).only(["rms_norm", "argmax"], Bounds())
    return replace(made, rows=made.rows[:2])


@pytest.fixture(scope="module")
def run(few, few_rounds, tmp_path_factory):
    journal = tmp_path_factory.mktemp("bench") / "journal"
    return bench(few, ["cpu", "reference"], 1, SECONDS, journal), journal


def test_every_call_is_timed_on_every_backend(run, few):
    found, _ = run
    timed = {(m.token, m.backend, m.cache) for m in found.timed}
    tokens = {row.case.token for row in few.rows}
    assert timed == {(t, b, c) for t in tokens for b in ("cpu", "reference") for c in ("cold", "warm")}
    assert all(m.verdict == "PASS" and len(m.samples) >= 3 for m in found.timed)
    assert {m.kernel for m in found.timed if m.backend == "cpu" and m.token.startswith("rms_norm")} == {"own"}
    assert found.sides["cpu"].clock == "CPU time" and found.sides["cpu"].threads == 1


def test_the_limits_are_those_of_the_processor(run):
    found, _ = run
    assert found.peaks["cpu"] == found.peaks["reference"]
    best = {name: max(rates) for name, rates in found.peaks["cpu"].items()}
    assert set(PEAKS) <= set(best)
    assert 2 * best["l2"] > best["dram"] and 10 * best["bf16"] > best["fp32"] > 1e9  # whatever a busy machine makes of them
    assert Report(found).impossible == []


def test_pytest_benchmark_reads_the_file(run, tmp_path):
    found, _ = run
    report = Report(found)
    assert report.exit_code == 0
    file = tmp_path / "report.json"
    file.write_text(report.json())
    written = json.loads(file.read_text())
    ours = written["porthal"]
    assert ours["schema"] == 1 and ours["place"] == "hardware" and ours["unmeasured"] == []
    assert ours["limits"]["cpu"]["dram"] > 1e8 and ours["backends"]["cpu"]["threads"] == 1
    assert len({b["fullname"] for b in written["benchmarks"]}) == len(written["benchmarks"])
    info = written["benchmarks"][0]["extra_info"]
    assert info["share"] == pytest.approx(info["limit_s"] / written["benchmarks"][0]["stats"]["median"])
    assert {b["extra_info"]["step"] for b in written["benchmarks"]} == {"decode"}
    program = "import sys; from pytest_benchmark.cli import main; sys.argv[0] = 'pytest-benchmark'; main()"
    done = subprocess.run([sys.executable, "-c", program, "compare", file], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "rms_norm[rms_norm,T=1" in done.stdout, done.stderr


def test_a_run_goes_on_from_what_is_kept(run, few, tmp_path):
    _, journal = run
    backends = ["cpu", "reference"]
    part = tmp_path / "part"  # the second call was stopped between its measurements
    part.write_text("".join(journal.read_text().splitlines(keepends=True)[:6]))
    late = bench(few, backends, 1, 1e-9, part, resume=True)
    first = {few.rows[0].case.token}
    assert {m.token for m in late.timed} == first and len(late.timed) == 4
    assert len(late.found) == 6 and all(m.why for m in late.found if m.token not in first)
    whole = bench(few, backends, 1, SECONDS, part, resume=True)
    assert len(whole.timed) == len(whole.found) == 8 and whole.timed[:4] == late.timed


def test_no_time_is_said_and_nothing_timed_is_exit_code_2(few, command_line, tmp_path):
    late = bench(few, ["reference"], 1, 1e-9)
    assert late.timed == [] and all("no time left" in m.why for m in late.found)
    assert Report(late).exit_code == 2
    code, out, err = command_line("bench", "--workload", "demo", "--op", "topk", "--backend", "nothing")
    assert code == 2 and out == "" and "unknown backend" in err


def test_a_wrong_kernel_gets_no_time(few, tmp_path):
    package = tmp_path / "wrong_norm"
    package.mkdir()
    package.joinpath("__init__.py").write_text("")
    package.joinpath("backend.py").write_text(
        "import os\n\nfrom porthal.backends.reference.backend import Reference\n\n\n"
        "class WrongNorm(Reference):\n"
        "    def rms_norm(self, x, weight, *, eps=1e-5):\n        y = self.empty(x.shape, x.dtype.name)\n"
        "        y[...] = x\n        return y\n\n"
        "    def argmax(self, logits):\n        os._exit(3)\n"
    )
    meta = tmp_path / "wrong_norm-1.dist-info"
    meta.mkdir()
    meta.joinpath("entry_points.txt").write_text("[porthal.backends]\nwrong-norm = wrong_norm\n")
    meta.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: wrong-norm\nVersion: 1\n")
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from porthal.cli import main; main()"
    call = ["bench", "--workload", "demo", "--op", "rms_norm", "--op", "argmax", "--threads", "1", "--seconds", f"{SECONDS}"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *call, "--backend", "wrong-norm"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "FAIL_VALUE" in done.stdout and "CRASH: exited with code 3" in done.stdout and "µs" not in done.stdout


def test_a_step_tells_the_work_of_the_host():
    worker = Backstage("reference", 1)
    took = worker.ask("step", workload("demo", [], "", Bounds()).whole, "float32")
    worker.close()
    assert took.calls == 35 and 0 < took.host < took.seconds


def test_a_worker_that_dies_says_how():
    worker = Backstage("reference", 1)
    assert isinstance(worker.ask("peak", "nothing"), Judgement)  # a KeyError there
    worker.close()


def test_every_peak_does_the_work_that_it_tells():
    peaks = create("cpu").peaks()
    assert set(peaks) >= set(PEAKS) and set(ARITHMETIC.values()) & set(peaks)
    assert peaks["dram"].work() == 2**26 == peaks["copy"].work()
    assert peaks["l2"].holds < peaks["l3"].holds
    assert peaks["bf16"].work() >= peaks["fp32"].work() > 1e6
