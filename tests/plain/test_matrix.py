import json
from dataclasses import replace

import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import run
from porthal.conformance.report import vendors
from porthal.conformance.report.matrix import Row, cells, rows, section
from porthal.hal import UsageError, at_most, create, limits, one_of
from porthal.hal.contract import contracts
from porthal.hal.sources import digest, library_files
from tests.matrix import assert_is_told


def test_the_support_matrix_tells_what_the_backend_states():
    assert_is_told("reference")


def test_of_an_op_all_own_kernels_are_told_and_what_else_there_is():
    class Chip(Reference):
        name = "chip"

        @limits(provider="lib.gemm", schemes=one_of("none", "int8_channel"), dtypes={"x": "float32"}, K=at_most(8))
        def linear(self, x, w, *, out="x"): ...

    found = {op: [row for row in rows(Chip()) if row.op == op] for op in ("linear", "rms_norm", "moe_layer")}
    assert found["linear"] == [
        Row("linear", "own", "lib.gemm", "int8_channel", "x: float32; K: at most 8"),
        Row("linear", "inherited from reference"),
    ]
    assert found["rms_norm"] == [Row("rms_norm", "inherited from reference")]
    assert found["moe_layer"] == [Row("moe_layer", "composed")]
    assert cells(found["linear"]) == {"linear": "own"} and cells(found["rms_norm"]) == {"rms_norm": "inherited"}
    apart = Row("linear", "own", "lib.bits", "only int8_channel"), Row("linear", "inherited from reference")
    assert cells(apart) == {"linear": "own int8_channel; inherited"} and cells([*apart, *found["linear"]]) == cells(apart)
    told = section("chip", "hardware", found["linear"])
    assert told.endswith("| linear | `lib.gemm` | int8_channel | x: float32; K: at most 8 |\n")


@pytest.fixture(scope="module")
def report():
    """As if Cambricon's emulated device had run one op at standard."""
    def add(self, a, b):
        return create("reference").derive(contracts()["add"])(a, b)

    chip = type("Chip", (Reference,), {"name": "cambricon", "add": limits(provider="lib.add", T=at_most(300))(add)})
    ran = run(chip(), ["add"])
    sources = {"cambricon": digest(library_files("porthal.backends.cambricon"))}
    missing = replace(ran.results[-1], verdict="UNCLAIMED", status="missing", message="T is 4096")
    return replace(ran, results=(*ran.results[:-1], missing), place=vendors.PLACE, level="standard", sources=sources)


def test_what_an_emulated_device_passed_is_kept_and_told(report, tmp_path, monkeypatch):
    file, into = tmp_path / "add.json", tmp_path / "vendors.json"
    file.write_text(report.json())
    into.write_text(json.dumps([{"backend": "zeta", "op": "add"}, {"backend": "cambricon", "op": "add", "verdicts": {}}]))
    vendors.merge([file], into)
    kept, other = vendors.kept(into)
    assert other["backend"] == "zeta" and len(into.read_text().splitlines()) == 4
    verdicts = kept["verdicts"]
    assert verdicts["UNCLAIMED"] == 1 and sum(verdicts.values()) == len(report.results) and kept["failed"] == 0
    assert kept["own"]["lib.add"] == kept["kernels"]["own"] > 0 and vendors.objection(kept) == ""
    assert vendors.objection(kept | {"hash": "0"}).endswith(f": {vendors.RENEW.format('cambricon', 'add')}")
    monkeypatch.setattr(vendors, "KEPT", into)
    page = section("cambricon", vendors.PLACE, [Row("add", "own"), Row("cast", "own")])
    assert (kept["domain"][1] > 0, kept["remarks"][0][:12]) == (True, "1 unclaimed,")
    counts = "{} of {}".format(*kept["domain"]), f"{verdicts['PASS']} of {len(report.results)}"
    passed = f"passed | {' | '.join(counts)} | {kept['kernels']['own']} own, "
    assert f"| add | {passed}" in page and " | 1 unclaimed | " in page and "| cast | not run |" in page
    assert "\n* `add`: 1 unclaimed, " in page and "\nEmulated device: " in page
    assert "at the standard level" not in section("other", "hardware", [Row("add", "own")])


@pytest.mark.parametrize("changed", [
    {"place": "hardware"}, {"level": "strict"}, {"sources": {"cambricon": "0"}}, {"contracts": {"add": 0}},
], ids=str)  # fmt: skip
def test_another_run_is_not_kept(report, changed):
    with pytest.raises(UsageError, match=r"^a report of .*: write one of these sources: porthal conform --emulated "):
        vendors.entry(replace(report, **changed))
