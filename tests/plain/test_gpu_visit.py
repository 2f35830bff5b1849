"""The visit to a GPU: what it runs in which order, and that a part that takes too long ends with all that it started."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    found = importlib.util.spec_from_file_location("gpu_visit", SCRIPT)
    assert found and found.loader
    sys.modules["gpu_visit"] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_most_telling_parts_come_first_and_leave_time(gpu: ModuleType, tmp_path: Path) -> None:
    for dry in (False, True):
        parts = gpu.parts(tmp_path, dry)
        names = list(dict.fromkeys(part.name for part in parts))
        assert names == ["backends", "bring-up", "text", "lockstep", "tune", "speed", "standard", "sanitizer", "strict"]
        tune = next(part for part in parts if part.name == "tune")
        assert tune.code == (2 if dry else 0)  # an emulated device has no speed
    assert sum(part.most for part in parts[:5]) < gpu.VISIT


@pytest.mark.parametrize(
    ("program", "code", "ended"),
    [("", 0, "good"), ("raise SystemExit(2)", 2, "good"), ("raise SystemExit(2)", 0, "failed with 2"), ("SLEEP", 0, "cut off")],
)
def test_how_a_part_ends(gpu: ModuleType, tmp_path: Path, program: str, code: int, ended: str) -> None:
    started = tmp_path / "started"  # by the part: a process that outlives it unless it is ended too
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = program.replace("SLEEP", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    part = gpu.Part("part", 0, [sys.executable, "-c", program], code)
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        assert gpu._ended(part, 5 if ended == "cut off" else None, file, dict(os.environ)) == ended
    if ended == "cut off":
        for _ in range(100):
            if not _runs(int(started.read_text())):
                break
            time.sleep(0.1)
        assert not _runs(int(started.read_text()))


def _runs(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(") ")[2][0] != "Z"


def test_reports_are_named_after_the_device(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CACHE", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tuned-cuda-1.json").touch()
    (tmp_path / "standard.json").write_text(json.dumps({"device": "NVIDIA H200, driver 580.1"}))
    (tmp_path / "bench.json").write_text("{}")
    gpu.named(tmp_path)
    kept = sorted(file.name for file in (tmp_path / "results").iterdir())
    assert kept == [f"cuda-nvidia-h200-driver-580-1-{what}.json" for what in ("bench", "standard")] + ["tuned-cuda-1.json"]


def test_a_program_that_is_not_there_fails(gpu: ModuleType, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        assert gpu._ended(gpu.Part("part", 0, ["/nowhere"]), None, file, {}).startswith("failed: ")
