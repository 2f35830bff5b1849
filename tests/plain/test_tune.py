"""The fastest of several kernels is measured, kept, and chosen; the times are a stand-in's, which no clock has read."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import porthal
from porthal.bench import tune
from porthal.bench.measured import Measured
from porthal.bench.run import COLD, WARM, Run
from porthal.bench.scale import Bounds
from porthal.bench.tune import _measured_as
from porthal.bench.workloads import Workload, workload
from porthal.cli.tune import JUDGED
from porthal.conformance.cases.profiles import home_of
from porthal.conformance.report.facts import Facts
from porthal.hal import CallSpec, Choice, bind, contracts, create
from porthal.hal.sources import digest
from porthal.hal.tuned import Table, Timed, _together, file_of, first_of, in_order, kind_of, versions
from porthal.model.config import Config
from porthal.model.load import profile
from tests.plugins import install, installed

CHIP = """
    from itertools import cycle
    from time import perf_counter

    import numpy as np

    from porthal.backends.reference.backend import Reference
    from porthal.hal import limits

    CALLED = []
    NOISE = cycle([1e-9, 9e-9])
    SECONDS = {"few": lambda rows: rows * 1e-6, "many": lambda rows: 1e-5, "wrong": lambda rows: 1e-9,
               "noisy": lambda rows: next(NOISE)}


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


    class Noisy:
        @limits(provider="noisy")
        def argmax(self, logits):
            CALLED.append(("noisy", len(logits)))
            return np.argmax(logits, -1).astype(np.int32)


    class Chip(Wrong, Noisy, Many, Few, Reference):
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
    """The folder of a plugin with four kernels for argmax; its tables go to another one."""
    monkeypatch.setenv("PORTHAL_CACHE", str(tmp_path / "cache"))
    package = install(tmp_path, "tuning", backend=CHIP)
    with installed(tmp_path):
        yield package


def timed(rows: int, seconds: dict[str, float | None], words: int = 256, date: str = "2026-01-02") -> Timed:
    return Timed("argmax", CallSpec({"T": rows, "V": words}, {"logits": "float32"}, {}, {}), seconds, date=date)


def keep(*calls: Timed) -> Path:
    """What one run of porthal tune has measured; the file in which it is."""
    backend = create("tuning")
    Table.updated(backend, calls).save(file := file_of(backend))
    return file


def chosen(rows: Any) -> tuple[Choice, Any]:
    spec = CallSpec({"T": rows, "V": 256}, {"logits": "float32"}, {}, {})
    binding = bind("tuning", profile={"argmax": [spec]})
    return binding.choices["argmax"], binding


def test_what_was_measured_decides(chip: Path, command_line: Any) -> None:
    assert chosen((1, 100))[0].provider == "wrong"  # as the classes stand
    assert "kernels chosen by" not in Facts.of(create("tuning")).environment
    other = timed(1, {"few": 1e-6, "many": 2e-6}, words=300)
    file = keep(other)
    code, out, err = command_line(*TUNE)
    assert code == 1, err
    assert "argmax  measured: at 1 row few 1 µs, many 10 µs, wrong wrong; at 8 rows few 8 µs" in out
    assert out.count("via=wrong,0: FAIL_VALUE") == 3
    assert len(re.findall(r"not timed: argmax,T=\d+,\S+,via=noisy,0: too noisy \(\d\.\d\d\)", out)) == 3
    assert out.endswith(f"kept in {file}: porthal explain --backend tuning --dtype float32 shows what is chosen\n")
    table = create("tuning").tuned
    assert other in table.calls  # of another run
    assert Facts.of(create("tuning")).environment["kernels chosen by"] == f"{len(table.calls)} calls timed on {table.date}"
    kept = json.loads(file.read_text())
    assert kept["device"] == "a stand-in"
    assert kept["calls"][1]["seconds"] == {"wrong": None, "many": 1e-5, "few": 1e-6}
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
    assert f"what was measured here on {table.date} decides" in out
    code, out, _ = command_line("explain", "--backend", "tuning", "--model", "glm-5")
    assert code == 0 and f"what was measured here on {table.date} is of no such call" in out


def test_a_table_is_of_one_device_and_of_these_versions(chip: Path, command_line: Any) -> None:
    file = keep(timed(1, {"few": 1e-6, "many": None, "wrong": None}))
    assert chosen(8)[0].provider == "few"
    shipped = chip / "tuned" / file.name
    shipped.parent.mkdir()
    file.rename(shipped)
    assert chosen(8)[0].provider == "few"  # the package's own table
    file.write_text("[]")
    assert chosen(8)[0].provider == "few"
    file.unlink()
    kept = json.loads(shipped.read_text())
    sources = kept["versions"]["tuning_plugin"]
    for wrong, why in (
        ({"versions": {**kept["versions"], "porthal": "0"}}, f"was measured with porthal 0, here it is {porthal.__version__}"),
        ({"versions": {**kept["versions"], "tuning_plugin": "of old"}}, f"with tuning_plugin of old, here it is {sources}"),
        ({"versions": {**kept["versions"], "liba": "2"}}, "was measured with liba 2, here it is not found"),
        ({"versions": {}}, "was measured with porthal of a version that it does not say, here it is "),
        ({"versions": []}, "is no table of porthal tune (AttributeError: "),
        ({"device": "another"}, "was measured on another, this is a stand-in"),
        ({"schema": 9}, "has another schema than 2"),
        ({"calls": []}, "is no table of porthal tune (ValueError: it has no calls)"),
    ):
        shipped.write_text(json.dumps({**kept, **wrong}))
        assert why in create("tuning").tuned.why
        assert chosen(8)[0].provider == "wrong"
    code, out, _ = command_line("explain", "--backend", "tuning")
    assert code == 0 and "(ValueError: it has no calls): run porthal tune --backend tuning\n" in out
    shipped.unlink()
    assert create("tuning").tuned.why == "nothing is measured on a stand-in"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"op": "nothing"}, "KeyError: 'nothing'"),
        ({"spec": 3}, "TypeError: "),
        ({"seconds": {"few": "fast"}}, "few took 'fast' s"),
        ({"seconds": {"few": -1}}, "few took -1 s"),
        ({"seconds": {"few": 0.0}}, "few took 0.0 s"),
        ({"seconds": {"few": math.nan}}, "few took nan s"),
        ({"seconds": {"few": math.inf}}, "few took inf s"),
        ({"seconds": {"few": True}}, "few took True s"),
        ({"seconds": {"another": 1e-6}}, "argmax has no another"),
        ({"date": None}, "ValueError: '' of None"),
        ({"spec": {"dims": {"T": []}}}, "T is []"),
        ({"spec": {"dims": {"T": "x"}}}, "T is 'x'"),
        ({"spec": {"dims": {"T": -1}}}, "T is -1"),
        ({"spec": {"dims": {"T": [1, 8]}}}, "T is [1, 8]"),
        ({"spec": {"dims": {"V": 256}}}, "T is not there"),
        ({"spec": {"dims": {"T": 1, "Z": 1}}}, "argmax has no Z"),
        ({"spec": {"dtypes": {"x": "float32"}}}, "argmax has no x"),
        ({"spec": {"attrs": {"eps": []}}}, "TypeError: unhashable type: 'list'"),
    ],
)
def test_a_call_that_nobody_measured_is_refused(chip: Path, wrong: dict[str, Any], why: str) -> None:
    file = keep(timed(1, {"few": 1e-6, "many": None}))
    kept = json.loads(file.read_text())
    if isinstance(wrong.get("spec"), dict):
        wrong = {"spec": {**kept["calls"][0]["spec"], **wrong["spec"]}}
    file.write_text(json.dumps({**kept, "calls": [{**kept["calls"][0], **wrong}]}))
    assert re.search(rf"is no table of porthal tune \(.*{re.escape(why)}", create("tuning").tuned.why)


def test_runs_add_to_what_is_kept_until_a_source_changes(chip: Path) -> None:
    keep(timed(1, {"few": 1e-6, "many": 2e-6}, date="2026-01-02"), timed(8, {"few": 1e-6, "many": 2e-6}, date="2026-01-02"))
    keep(timed(8, {"few": 3e-6, "many": 2e-6}, date="2026-01-05"))
    table = create("tuning").tuned
    turns = table.turns(contracts()["argmax"], table.calls[0].spec)
    assert turns == {1: {"few": 1e-6, "many": 2e-6}, 8: {"few": 3e-6, "many": 2e-6}}
    assert table.date == "2026-01-02 to 2026-01-05"
    digest.cache_clear()
    (chip / "backend.py").write_text((chip / "backend.py").read_text() + "# another kernel\n")
    assert "was measured with tuning_plugin of sources " in create("tuning").tuned.why
    keep(timed(1, {"few": 1e-6, "many": 2e-6}))
    assert len(create("tuning").tuned.calls) == 1


def test_a_library_without_a_distribution_is_known_by_its_files(chip: Path) -> None:
    (chip.parent / "liba.py").write_text("one")
    calls = [timed(1, {"liba.norm": 1e-6, "few": 1e-6, "numpy.argmax": 1e-6})]
    before = versions(create("tuning"), calls)
    assert before["numpy"] == np.__version__ and before.keys() == {"porthal", "tuning_plugin", "numpy", "liba"}
    (chip.parent / "liba.py").write_text("two")
    digest.cache_clear()
    after = versions(create("tuning"), calls)
    assert {name for name in after if after[name] != before[name]} == {"liba"}


def test_fewer_rows_than_were_measured_go_as_the_classes_stand(chip: Path) -> None:
    keep(timed(8, {"few": 1e-6, "many": 2e-6, "wrong": None}))
    assert chosen(7)[0].provider == "wrong" and chosen(8)[0].provider == "few"
    keep(timed(8, {"many": 2e-6, "wrong": None}))
    assert chosen(8)[0].provider == "many"


def test_what_is_measured_of_another_place_device_or_call_decides_nothing(
    chip: Path, command_line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(timed(1, {"few": 1e-6, "many": 2e-6}))
    cls: Any = type(create("tuning"))
    monkeypatch.setattr(cls, "describe", lambda self: "another")
    assert create("tuning").tuned.why == "nothing is measured on another"
    monkeypatch.undo()
    monkeypatch.setenv("PORTHAL_CACHE", str(chip.parent / "cache"))
    assert chosen(8)[0].provider == "few"
    monkeypatch.setattr(cls, "place", "emulated device")
    assert create("tuning").tuned.why == "tuning runs on: emulated device, which has no speed"
    assert chosen(8)[0].provider == "wrong"
    code, out, err = command_line(*TUNE)
    assert (code, out) == (2, "") and "which has no speed; run porthal tune where the chip is" in err
    topk = contracts()["topk"]
    short, long = (CallSpec({"T": 1}, {"scores": "float32"}, {"k": k}, {}) for k in (512, 2048))
    assert kind_of(topk, short) == kind_of(topk, replace(short, dims={"T": 8})) != kind_of(topk, long)
    plain = CallSpec({"T": 1, "K": 8, "N": 8}, {"x": "float32", "w": "float32"}, {}, {"w": "none"})
    kinds = [replace(plain, schemes={"w": "fp8_block"}), replace(plain, dtypes={"x": "bfloat16", "w": "bfloat16"})]
    assert len({kind_of(contracts()["linear"], spec) for spec in (plain, replace(plain, schemes={}), *kinds)}) == 3


def test_ones_own_table_goes_before_the_packages(chip: Path) -> None:
    file = keep(timed(1, {"many": 1e-6, "few": 2e-6}))
    (chip / "tuned").mkdir()
    (chip / "tuned" / file.name).write_bytes(file.read_bytes())
    keep(timed(1, {"many": 2e-6, "few": 1e-6}))
    assert chosen(8)[0].provider == "few"


def test_times_are_of_cold_caches_and_of_the_models_matrices(chip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is made up: by provider the time with cold caches, and with warm ones."""
    took = {"few": (2e-6, 1e-6), "many": (1e-6, 2e-6)}

    def measured(calls: Workload, names: Any, threads: int, seconds: float, progress: Any = None) -> Run:
        found = [
            Measured(row.case.token, "tuning", cache, "PASS", samples=(t,) * 9)
            for row in calls.rows
            for cache, t in zip((COLD, WARM), took.get(row.case.via, ()))
        ]
        late = [Measured(row.case.token, "tuning", "", why="no time") for row in calls.rows if row.case.via not in took]
        return Run(calls, threads, found=[*reversed(found), *late])

    monkeypatch.setattr(tune, "bench", measured)
    bounds = Bounds(2**30, JUDGED)
    calls = workload("demo", ["decode"], "", bounds)
    found = tune.tune(create("tuning"), calls, ["argmax"], bounds, 1)
    assert [call.seconds for call in found.calls] == [{"many": 1e-6, "few": 2e-6}] * len(found.calls) != []
    assert {*found.left.values()} == {"no time"} and not found.wrong
    row = next(row for row in calls.rows if row.case.op == "argmax")
    smaller = replace(row, case=replace(row.case, dims=tuple((s, n if s == "T" else n // 2) for s, n in row.case.dims)))
    assert _measured_as(row) and _measured_as(smaller) is None


def test_contexts_are_compared_where_all_kernels_were_measured() -> None:
    mean = _together([timed(1, {"few": 1.0, "many": 4.0}), timed(1, {"few": 3.0, "many": 2.0})])
    assert mean == {"few": 2.0, "many": 3.0}
    whole, part = timed(1, {"few": 3e-6, "many": 2e-6}), timed(1, {"few": 1e-6})
    assert _together([whole, part]) == {"few": 3e-6, "many": 2e-6}
    assert _together([part, timed(1, {"few": 3e-6, "wrong": None})]) == {"few": 3e-6, "wrong": math.inf}
    assert _together([timed(1, {"few": 1e-6, "many": 2e-6}), timed(1, {"few": 1e-6, "wrong": None})]) == {
        "few": 1e-6, "wrong": math.inf
    }  # fmt: skip
    kernels = [SimpleNamespace(provider=p) for p in ("wrong", "untimed", "few")]
    assert [k.provider for k in in_order(kernels, {"few": 1.0, "wrong": math.inf})] == ["few", "untimed", "wrong"]  # type: ignore[arg-type, list-item]


def test_where_nothing_can_be_kept_nothing_is_measured(
    chip: Path, command_line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTHAL_CACHE", "/proc/porthal/golden")
    code, out, err = command_line(*TUNE)
    assert (code, out) == (2, "") and err.startswith("porthal: cannot write /proc/porthal/golden/tuned-tuning-")


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
    ops = ("sparse_mla", "grouped_gemm", "moe_experts", "sample")
    wanted = profile(config, "bfloat16")
    for row in workload("glm5", ["verify"], "", bounds).only(ops, bounds).rows:
        spec, contract = _measured_as(row), known[row.case.op]
        assert spec and kind_of(contract, spec) in [kind_of(contract, s) for s in wanted[row.case.op]], row.case.token
        kept = Timed(row.case.op, spec, {"": 1e-6}, row.case.token)
        assert Timed.read(json.loads(json.dumps(asdict(kept))), create("reference")) == kept
        if "E" in spec.dims:  # made smaller with their rows
            assert first_of(spec, contract) == first_of(row.spec, contract)  # type: ignore[arg-type]
