"""A benchmark file of somebody else, timed again in part: what holds, and the mark that it gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from porthal.bench.report import Report
from porthal.bench.run import bench
from porthal.bench.scale import Bounds
from porthal.bench.speeds import Speeds, read_report
from porthal.bench.workloads import workload
from tests.benchfiles import sealed

pytestmark = pytest.mark.usefixtures("few_rounds")
SECONDS = 600.0  # that nobody waits for: calls are done after a few rounds
FAR = 30.0  # times as long as a time is here, which no busy machine makes of it


@pytest.fixture(scope="module")
def written(few_rounds):
    """Some rows of the demo checkpoint, timed on the reference."""
    made = workload("demo", ["decode"], "", Bounds()).only(["rms_norm", "linear"], Bounds())
    return json.loads(Report(bench(replace(made, rows=made.rows[:3]), ["reference"], 1, SECONDS)).json())


@pytest.fixture
def verify(command_line, tmp_path: Path):
    """(exit code, stdout, stderr) of verifying what a change makes of the file, and the file with its mark."""

    def call(data, *args):
        file = tmp_path / "report.json"
        file.write_text(json.dumps(sealed(data)))
        return command_line("verify", file, "--json", tmp_path / "marked.json", *args), tmp_path / "marked.json"

    return call


def times(data, factor):
    """The file with all of its times that many times as long, in a machine that is as fast as before."""
    made = json.loads(json.dumps(data))
    for entry in made["benchmarks"]:
        for name in ("min", "median", "max"):
            entry["stats"][name] *= factor
        entry["extra_info"]["p10"] *= factor
        entry["extra_info"]["ci95"] = [t * factor for t in entry["extra_info"]["ci95"]]
    return made


def test_a_file_that_holds_is_marked_as_reproduced(verify, written):
    slow = times(written, FAR)  # what is faster here than it says holds too
    (code, out, _), file = verify(slow, "--share", "100%")
    assert code == 0 and "rows, drawn at random" in out and "\nreproduced: " in out, out
    marked = read_report(file)
    assert marked.origin.startswith("reproduced: ") and marked.rows == Speeds.of_object(slow).rows


def test_times_that_are_not_reached_here_are_named(verify, written):
    (code, out, _), file = verify(times(written, 1 / FAR), "--share", "100%")
    assert code == 1 and "does not hold: linear [linear,T=1" in out and "porthal bench --backend reference --op linear" in out
    assert read_report(file).origin.startswith("not reproduced: ")


def test_the_same_time_on_a_slower_machine_holds(verify, written):
    """What counts is the share of the limit that was measured in the same run."""
    fast = times(written, 1 / FAR)
    for entry in fast["benchmarks"]:
        entry["extra_info"]["limit_s"] *= FAR**-2
    for limits in fast["porthal"]["limits"].values():
        limits |= {name: rate * FAR**2 for name, rate in limits.items()}
    (code, out, _), _ = verify(fast, "--share", "100%")
    assert code == 1 and "does not hold" in out  # there is no machine that differs so and has this name
    for facts in fast["porthal"]["backends"].values():
        facts["device"] = "a faster one"
    (code, out, _), _ = verify(fast, "--share", "100%")
    assert code == 0 and "does not hold" not in out


def test_what_is_impossible_does_not_hold(verify, written):
    fast = times(written, 1e-6)
    for entry in fast["benchmarks"]:
        entry["extra_info"] |= {"noise": 0.0, "limit_noise": 0.0}
    (code, out, _), _ = verify(fast, "--share", "100%")
    assert code == 1 and ", which is impossible" in out


def test_a_call_that_is_too_large_is_refused_before_anything_runs(verify, written):
    written = json.loads(json.dumps(written))
    written["benchmarks"][0]["extra_info"]["token"] = "rms_norm,T=4096,H=6144,x:fp32,0"
    (code, out, err), _ = verify(written, "--share", "100%", "--memory", "0.1")
    assert (code, out) == (2, "") and "expected a call that fits --memory" in err and err.count("\n") == 1


def test_another_backend_says_nothing_about_these_times(verify, written):
    (code, out, err), _ = verify(written, "--backend", "cpu")
    assert (code, out) == (2, "")
    assert err == "porthal: --backend is cpu, which has no times in the report: expected reference\n"
