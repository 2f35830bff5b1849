"""What a base has passed is not run again for a plugin that inherits it unchanged, and for no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import Result
from porthal.conformance.runner.check import check
from porthal.conformance.runner.proven import SERVICES, Proven
from porthal.hal import Backend, create

ADD, LAYER = "add,T=7,H=96,a:fp32,0", "mla_output,T=3,N=2,C=512,V=64,H=96,o:fp32,0"
ROUTE = "moe_route,T=3,E=9,k=2,scale=1.0,0"


class Near(Reference):
    name = "near"


class Far(Reference):
    name = "far"


class Adds(Reference):
    name = "adds"

    def add(self, a: Any, b: Any) -> Any:
        return (a.astype(np.float64) + b).astype(a.dtype)


class Flushes(Reference):
    name = "flushes"

    def from_numpy(self, x: Any) -> Any:
        return np.array(x)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PORTHAL_CACHE", str(tmp_path))
    return tmp_path


def ran(backend: Backend, token: str, level: str = "bring-up") -> tuple[Result, bool]:
    """A case's result, and whether it was run."""
    result = check(Case.from_token(token), Bindings(backend), level, proven=Proven(backend, level))
    return result, "not run again" not in result.note


def test_what_one_plugin_inherits_the_next_need_not_run() -> None:
    first, was_run = ran(Near(), ADD)
    assert was_run and (first.status, first.owner, first.verdict) == ("inherited", "reference", "PASS")
    again, was_run = ran(Far(), ADD)
    assert not was_run
    assert again.note == "not run again: reference has passed it with the same kernels, services, sources and versions"
    assert (again.token, again.status, again.owner, again.worst, again.at) == (
        ADD, "inherited", "reference", first.worst, first.at
    )  # fmt: skip


def test_a_bases_own_run_proves_it_too_and_is_itself_never_spared() -> None:
    assert ran(create("reference"), ADD)[0].status == "own"
    assert ran(create("reference"), ADD)[1]
    again, was_run = ran(Near(), ADD)
    assert not was_run and (again.status, again.owner) == ("inherited", "reference")


def test_a_composition_of_inherited_kernels_is_spared_and_stays_one() -> None:
    first, _ = ran(Near(), LAYER)
    again, was_run = ran(Far(), LAYER)
    assert not was_run and (again.status, again.owner, again.foreign) == ("composed", "", first.foreign)
    assert "linear" in again.foreign


def test_a_kernel_of_ones_own_always_runs_and_so_does_what_is_made_of_it() -> None:
    layer = "moe_layer,T=3,H=8,I=4,S=4,E=3,k=2,x:fp32,0"
    for token in (ADD, layer, ROUTE):
        ran(Near(), token)
    assert [ran(Adds(), token)[1] for token in (ADD, layer, ROUTE)] == [True, True, False]
    assert ran(Near(), ADD)[1] is False and ran(Adds(), ADD)[0].status == "own"


def test_whoever_changes_a_service_runs_everything_and_proves_nothing() -> None:
    ran(Near(), ADD)
    assert ran(Flushes(), ADD)[1] and ran(Flushes(), ADD)[1]
    assert ran(Flushes(), ROUTE)[1]
    assert ran(Near(), ROUTE)[1], "proven by one with a service of its own"


def test_another_level_device_or_verdict_is_not_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    ran(Near(), ADD)
    assert ran(Far(), ADD, "standard")[1]
    assert ran(Far("1"), ADD)[1]
    monkeypatch.setattr("porthal.conformance.runner.proven.SUITE", 99)
    assert ran(Far(), ADD)[1]
    monkeypatch.undo()
    wrong = type("Wrong", (Near,), {"add": lambda self, a, b: a + a})
    monkeypatch.setenv("PORTHAL_CACHE", str(Path.cwd() / "none"))
    assert ran(wrong(), ADD)[0].verdict == "FAIL_VALUE"


@pytest.mark.parametrize("setting", ["errors", "buffer"])
def test_a_setting_of_the_whole_process_is_a_circumstance(setting: str) -> None:
    """A plugin that sets one as it is imported runs what others have passed, as its kernels compute with it."""
    ran(Near(), ADD)
    with np.errstate(all="raise" if setting == "errors" else None):
        before = np.setbufsize(16 if setting == "buffer" else np.getbufsize())
        try:
            assert ran(Far(), ADD)[1]
        finally:
            np.setbufsize(before)
    assert not ran(Far(), ADD)[1]


def test_a_torn_line_costs_its_case_alone(folder: Path) -> None:
    ran(Near(), ADD), ran(Near(), ROUTE)
    (file,) = folder.glob("proven-*.jsonl")
    kept = file.read_text()
    file.write_text(kept.splitlines()[0] + "\n" + kept.splitlines()[1][:40])
    assert [ran(Far(), ADD)[1], ran(Far(), ROUTE)[1]] == [False, True]


def test_every_service_is_one_of_the_protocol() -> None:
    assert all(hasattr(Backend, service) for service in SERVICES)
    protocol = {n for n in vars(Backend) if not n.startswith("_")} - {"name", "candidates"}
    assert protocol <= set(SERVICES)


def test_the_report_says_what_was_not_run() -> None:
    results = [ran(Near(), token)[0] for token in (ADD, ROUTE)] and [ran(Far(), token)[0] for token in (ADD, ROUTE)]
    report = Report.of(Far(), "bring-up", results)
    assert report.not_run == [
        "2 cases were not run again: reference has passed them with the same kernels, services, sources and versions"
    ]
    assert report.not_run[0] in report.html()
