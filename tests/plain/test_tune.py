"""The fastest of several kernels is measured, kept, and chosen; the times are a stand-in's, which no clock has read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal.bench.scale import Bounds
from porthal.bench.tune import _measured_as
from porthal.bench.workloads import workload
from porthal.cli.tune import JUDGED
from porthal.conformance.cases.profiles import home_of
from porthal.conformance.report.facts import Facts
from porthal.hal import CallSpec, Choice, bind, contracts, create
from porthal.hal.tuned import first_of, kind_of
from porthal.model.config import Config
from porthal.model.load import profile
from tests.plugins import install, installed

CHIP = """
    from time import perf_counter

    import numpy as np

    from porthal.backends.reference.backend import Reference
    from porthal.hal import limits

    CALLED = []
    SECONDS = {"few": lambda rows: rows * 1e-6, "many": lambda rows: 1e-5, "wrong": lambda rows: 1e-9}


    class Few:
        @limits(provider="few")
        def argmax(self, logits):
            CALLED.append(("few", len(logits)))
            return np.argmax(logits, -1).astype(np.int32)


    class Many:
        @limits(provider="many")
        def argmax(self, logits):
            CALLED.append(("many", len(logits)))
            return np.argmax(logits, -1).astype(np.int32)


    class Wrong:
        @limits(provider="wrong")
        def argmax(self, logits):
            CALLED.append(("wrong", len(logits)))
            return np.zeros(len(logits), np.int32)


    class Chip(Wrong, Many, Few, Reference):
        def describe(self):
            return "a stand-in"

        def timed(self, run, clock=perf_counter):
            CALLED.clear()
            run()
            return sum(SECONDS[provider](rows) for provider, rows in CALLED)
"""
TUNE = ("tune", "--backend", "tuning", "--workload", "demo", "--seconds", "30")


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a plugin with three kernels for argmax; its tables go to another one."""
    monkeypatch.setenv("PORTHAL_CACHE", str(tmp_path / "cache"))
    package = install(tmp_path, "tuning", backend=CHIP)
    with installed(tmp_path):
        yield package


def chosen(rows: Any) -> tuple[Choice, Any]:
    spec = CallSpec({"T": rows, "V": 256}, {"logits": "float32"}, {}, {})
    binding = bind("tuning", profile={"argmax": [spec]})
    return binding.choices["argmax"], binding


def test_what_was_measured_decides(chip: Path, command_line: Any) -> None:
    assert chosen((1, 100))[0].provider == "wrong"  # as the classes stand
    assert "kernels chosen by" not in Facts.of(create("tuning")).environment
    code, out, err = command_line(*TUNE)
    assert code == 1, err
    assert "argmax  measured: at 1 row few 1 µs, many 10 µs, wrong wrong; at 8 rows few 8 µs" in out
    table = create("tuning").tuned
    assert Facts.of(create("tuning")).environment["kernels chosen by"] == f"{len(table.calls)} calls timed on {table.date}"
    assert out.count("via=wrong,0: FAIL_VALUE") == 3
    [file] = (chip.parent / "cache").glob("tuned-*.json")
    kept = json.loads(file.read_text())
    assert kept["device"] == "a stand-in"
    assert kept["calls"][0]["seconds"] == {"wrong": None, "many": 1e-5, "few": 1e-6}
    assert chosen(8)[0].provider == "few" and chosen((64, 100))[0].provider == "many"
    assert chosen(8)[0].reason == chosen((64, 100))[0].reason != ""
    choice, binding = chosen((1, 100))
    assert choice.provider == "few or many" and choice.reason.startswith("measured: at 1 row few 1 µs")
    called = sys.modules["tuning_plugin.backend"].CALLED  # type: ignore[attr-defined]
    for rows, provider in ((63, "few"), (64, "many")):
        binding.argmax(np.zeros((rows, 256), np.float32))
        assert called[-1] == (provider, rows)
    code, out, _ = command_line("explain", "--backend", "tuning")
    assert code == 0 and re.search(r"argmax +own +tuning +few +measured: at 1 row few 1 µs, many 10 µs, wrong", out)
    assert f"what was measured here on {kept['date']} decides" in out

    shipped = chip / "tuned" / file.name
    shipped.parent.mkdir()
    file.rename(shipped)
    assert chosen(8)[0].provider == "few"  # the package's own table
    for wrong, why in (
        ({"versions": {"porthal": "0"}}, "was measured with porthal 0, which is not here: run porthal tune --backend tuning"),
        ({"versions": []}, "is no table of porthal tune (AttributeError): run porthal tune"),
        ({"schema": 9}, "has another schema than 1: run porthal tune"),
        ({"calls": [{"op": "argmax", "spec": 3}]}, "is no table of porthal tune (TypeError): run porthal tune"),
        ({"calls": [{**kept["calls"][0], "seconds": {"few": "fast"}}]}, "is no table of porthal tune (ValueError)"),
    ):
        shipped.write_text(json.dumps({**kept, **wrong}))
        assert why in create("tuning").tuned.why
        assert chosen(8)[0].provider == "wrong"
    shipped.unlink()
    assert create("tuning").tuned.why == "nothing is measured on a stand-in: run porthal tune --backend tuning"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--backend", "tuning", "--op", "add"), "nothing to choose from: tuning has several kernels for argmax, not for add"),
        (("--backend", "reference"), "there is nothing to choose from: reference has several kernels for no op"),
        (("--backend", "cuda"), "backend 'cuda' is not here: there is no /proc/driver/nvidia/version"),
        (("--backend", "tuning", "--dtype", "bfloat16", "--op", "argmax", "--workload", "demo", "--seconds", "0"), "--seconds"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(chip: Path, command_line: Any, given: tuple[str, ...], said: str) -> None:
    code, out, err = command_line("tune", *given)
    assert code == 2 and out == "" and said in err and "Traceback" not in err


def test_what_is_timed_is_found_again_by_a_model() -> None:
    """Calls that steps make, and those that stand for what a composite's kernel hides."""
    bounds, known = Bounds(2**30, JUDGED), contracts()
    config = Config.read(home_of())
    ops = ("sparse_mla", "grouped_gemm", "moe_experts")
    wanted = profile(config, "bfloat16")
    for row in workload("glm5", ["verify"], "", bounds).only(ops, bounds).rows:
        spec, contract = _measured_as(row), known[row.case.op]
        assert spec and kind_of(contract, spec) in [kind_of(contract, s) for s in wanted[row.case.op]], row.case.token
        if "E" in spec.dims:  # made smaller with their rows
            assert first_of(spec, contract) == first_of(row.spec, contract)  # type: ignore[arg-type]
