"""Calls of several ranks are judged before they are timed, and their file is read as any other."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from porthal.bench import ranked
from porthal.bench.measured import Measured
from porthal.bench.report import Report
from porthal.bench.speeds import Speeds
from porthal.bench.verify import verify
from porthal.cli.app import app
from porthal.hal import UsageError


def test_two_ranks_are_timed_in_both_ways(monkeypatch):
    monkeypatch.setattr(ranked, "BYTES", (1024,))
    run = ranked.bench(ranked.collective(2, ["all_to_all_v", "barrier"]), ["cpu"], 2, 30.0)
    assert {(m.token.partition(",")[0], m.cache, m.verdict, m.kernel) for m in run.timed} == {
        (op, kind, "PASS", "own") for op in ("all_to_all_v", "barrier") for kind in ("chained", "drained")
    }
    assert all(0 <= m.apart < 1 and len(m.samples) >= 3 for m in run.timed)
    assert {m.work.bytes for m in run.timed if m.work and "barrier" in m.token} == {8}
    read = Speeds.of_object(Report(run).document)
    assert {row.cache for row in read.rows} == {"chained", "drained"}
    monkeypatch.setattr(Measured, "noisy", False)
    again = verify(read, 1.0, 1)
    assert len(again.checked) == 4
    assert not [checked for checked in again.checked if not re.match(r"[\d.]+ .?s", checked.found)]
    assert all("--ranks 2" in checked.command for checked in again.checked)


def test_the_calls_have_the_bytes_that_are_listed_and_experts_their_tokens():
    rows = ranked.collective(4, ["all_to_all", "ep_dispatch"]).rows
    sizes = [dict(row.case.dims) for row in rows if row.case.op == "all_to_all"]
    assert [4 * 4 * s["n"] * s["H"] for s in sizes] == [1024 * 4**n for n in range(9)]
    assert [dict(row.case.dims)["N"] for row in rows if row.case.op == "ep_dispatch"] == [8, 64, 512]
    with pytest.raises(UsageError, match="unknown op 'topk' of several ranks: known are all_gather"):
        ranked.collective(2, ["topk"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["2", "--memory", "1", "--step", "decode"], "with one thread each: give it without --step, --memory"),
        (["5000"], "less than or equal to 64"),
    ],
)
def test_what_does_not_go_with_ranks_is_named(options, why):
    made = CliRunner().invoke(app, ["bench", "--op", "barrier", "--ranks", *options])
    assert made.exit_code == 2 and why in made.stderr
