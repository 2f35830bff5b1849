"""What a base has passed is not run again for a plugin that inherits it unchanged, and for no other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import Result
from porthal.conformance.runner import proven
from porthal.conformance.runner.check import check
from porthal.conformance.runner.proven import Proven, overridden, sources
from porthal.hal import Backend, Need, at_most, contracts, create, limits

ADD, LAYER = "add,T=7,H=96,a:fp32,0", "mla_output,T=3,N=2,C=512,V=64,H=96,o:fp32,0"
MTP = "mtp_input,T=3,H=8,eps=1e-05,0"
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
    elsewhere = Far()
    elsewhere.device = "1"
    assert ran(elsewhere, ADD)[1]
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


def services() -> list[str]:
    hidden = ("__init__", "_rounded", "place", "derive")
    open_to_all = {n for n in dir(Reference) if not n.startswith("_")} - set(contracts())
    return [*sorted(open_to_all - {"name", "describe", *hidden}), *hidden]


@pytest.mark.parametrize("name", services())
def test_whatever_a_plugin_defines_anew_of_its_base_but_kernels_makes_everything_run(name: str) -> None:
    ran(Near(), ADD)
    changed = vars(Reference).get(name, getattr(Reference, name))
    plugin = type("Plugin", (Reference,), {"name": "plugin", name: changed})
    assert overridden(plugin, Reference) == {name}
    assert ran(plugin(), ADD)[1]


def test_helpers_of_its_own_and_what_it_says_of_itself_make_nothing_run() -> None:
    ran(Near(), ADD)
    says = {"__doc__": "Mine.", "describe": lambda self: "mine, driver 1.0"}
    plugin = type("Plugin", (Reference,), {"name": "plugin", "gemm": lambda self: None, **says})
    assert not ran(plugin(), ADD)[1]


def test_a_kernel_that_calls_another_runs_where_that_is_overridden() -> None:
    class Base(Reference):
        name = "base"

        def _sum(self, a: Any, b: Any) -> Any:
            return (lambda: self.add(a, b))()

        def add(self, a: Any, b: Any) -> Any:
            return (a.astype(np.float64) + b).astype(a.dtype)

        def silu_mul(self, x: Any) -> Any:
            return self._sum(x, x)[..., : x.shape[-1] // 2]

    Plugin = type("Plugin", (Base,), {"name": "plugin", "add": lambda self, a, b: a})
    assert proven.called(Base, "silu_mul") >= {"_sum", "add"}
    assert Proven(Plugin(), "bring-up")._kernels(["silu_mul"], "base") is None
    [kernel] = (Proven(Plugin(), "bring-up")._kernels(["rms_norm"], "base") or {})["rms_norm"]
    assert kernel[:2] == ["reference", ""]


def test_what_a_base_has_fused_itself_proves_no_composition() -> None:
    assert ran(create("reference"), LAYER)[0].status == "own"
    first, was_run = ran(Near(), LAYER)
    assert was_run and first.status == "composed" and first.foreign and not first.own
    again, was_run = ran(Far(), LAYER)
    assert not was_run and again.foreign == first.foreign and not again.own


def test_parts_of_two_owners_prove_nothing() -> None:
    class Linear(Reference):
        name = "linears"

        def linear(self, x: Any, w: Any, *, out: str = "x") -> Any:
            return create("reference").derive(contracts()["linear"])(x, w, out=out)

    heirs = [type("Heir", (Linear,), {"name": name})() for name in ("first", "second")]
    found = [ran(heir, MTP) for heir in heirs]
    assert {result.status for result, _ in found} == {"composed"} and all(was_run for _, was_run in found)


def test_only_what_passed_is_kept() -> None:
    wrong = type("Wrong", (Reference,), {"name": "wrong", "add": lambda self, a, b: a + a})
    assert ran(wrong(), ADD)[0].verdict == "FAIL_VALUE"
    heir = type("Heir", (wrong,), {"name": "heir"})
    result, was_run = ran(heir(), ADD)
    assert was_run and result.verdict == "FAIL_VALUE"


def test_a_kernel_of_another_provider_runs() -> None:
    def chip(provider: str) -> Any:
        def add(self: Any, a: Any, b: Any) -> Any:
            return (a.astype(np.float64) + b).astype(a.dtype)

        add.provider = provider  # type: ignore[attr-defined]
        base = type("Chip", (Reference,), {"name": "chip", "add": add, "__module__": __name__})
        return type("Heir", (base,), {"name": "heir", "__module__": __name__})()

    assert ran(chip("first"), ADD)[1] and not ran(chip("first"), ADD)[1]
    assert ran(chip("second"), ADD)[1]


@pytest.mark.parametrize("what", ["place", "version", "package", "processor", "source"])
def test_another_circumstance_is_not_spared(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran(Near(), ADD)
    assert not ran(Far(), ADD)[1]
    if what == "place":
        monkeypatch.setattr(Reference, "place", "emulated device")
    elif what == "version":
        monkeypatch.setattr(contracts()["rms_norm"], "version", 7)
    elif what == "package":
        monkeypatch.setattr(proven, "environment", lambda base: {"vendor": "2"})
    elif what == "processor":
        monkeypatch.setattr(Backend, "describe", lambda self: "another")
    else:
        file = tmp_path / "add.py"
        file.write_text("one")
        monkeypatch.setattr(proven, "sources", lambda base: iter([file]))
        ran(Near(), ADD)
        assert not ran(Far(), ADD)[1]
        file.write_text("two")
    assert ran(Far(), ADD)[1]


def test_sources_are_of_all_that_computes_and_judges() -> None:
    from porthal.backends.cpu.backend import Cpu

    found = {str(file).rpartition("porthal/")[2] for file in sources(Cpu)}
    wanted = {"hal/numerics.py", "ops/add.py", "conformance/judgement/judge.py"}
    assert found >= wanted and any(f.endswith("cpu/backend.py") for f in found)
    assert any(f.endswith("reference/backend.py") for f in found), "a base of the base"
    files = [contract.files() for contract in contracts().values()]
    assert all(any(file.name == f"{op}.py" for file in own) for op, own in zip(contracts(), files, strict=True))


def test_native_code_counts_wherever_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import ModuleType

    loaded = ModuleType("porthal.backends.reference._native")
    loaded.__file__ = str(tmp_path / "_native.so")
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    assert Path(loaded.__file__) in sources(Reference)


def test_a_file_grows_with_what_is_new_alone_and_bad_bytes_cost_their_line(folder: Path) -> None:
    for _ in range(3):
        ran(Near(), ADD), ran(create("reference"), ADD)
    (file,) = folder.glob("proven-*.jsonl")
    assert len(file.read_text().splitlines()) == 1
    file.write_bytes(b"\xff\xfe\n[1]\n{}\n" + file.read_bytes())
    assert not ran(Far(), ADD)[1]


def test_the_report_says_what_was_not_run() -> None:
    results = [ran(Near(), token)[0] for token in (ADD, ROUTE)] and [ran(Far(), token)[0] for token in (ADD, ROUTE)]
    report = Report.of(Far(), "bring-up", results)
    assert report.not_run == [
        "2 cases were not run again: reference has passed them with the same kernels, services, sources and versions; "
        "set PORTHAL_CACHE to an empty folder to run them"
    ]
    assert report.not_run[0] in report.html()


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed"])
def test_a_damaged_line_proves_nothing(folder: Path, damage: str) -> None:
    ran(Near(), ADD)
    (file,) = folder.glob("*.jsonl")
    whole = file.read_bytes()
    assert ran(Far(), ADD)[1] is False
    line = whole.rstrip(b"\n")
    for at in range(1, len(line), 41):
        changed = line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]
        file.write_bytes({"cut": line[:at], "emptied": b"", "changed": changed}[damage])
        assert Proven(Far(), "bring-up").recall(Case.from_token(ADD)) is None, at
    assert ran(Far(), ADD)[1] is True  # what is kept of it, behind a line without an end, shares its fate
    ran(Near(), ADD)
    assert ran(Far(), ADD)[1] is False


@pytest.mark.parametrize(("before", "after"), [
    ({"H": at_most(64)}, {}),
    ({"H": at_most(64)}, {"H": at_most(8192)}),
    ({"dtypes": {"x": "bfloat16"}}, {"dtypes": {"x": "float32"}}),
    ({"H": at_most(64)}, {"needs": {"x": Need("positive numbers", lambda x: x > 0)}}),
])  # fmt: skip
def test_a_kernel_that_takes_more_than_before_runs(before: dict[str, Any], after: dict[str, Any]) -> None:
    """What was inherited yesterday is the chip's own today."""
    right = create("reference").derive(contracts()["rms_norm"])

    def chip(stated: dict[str, Any]) -> Backend:
        kernel = limits(**stated)(lambda self, x, weight, *, eps=1e-5: right(x, weight, eps=eps))  # type: ignore[misc]
        return type("Chip", (Reference,), {"name": "chip", "rms_norm": kernel})()

    token = "rms_norm,T=7,H=96,eps=1e-05,x:fp32,0"
    ran(chip(before), token)
    assert not ran(chip(before), token)[1] and ran(chip(after), token)[1]
