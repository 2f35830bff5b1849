"""What is missing, cut off, newer than the runtime or cannot be written costs one sentence; what was there before stays."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[dev]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")

from porthal.backends.onnxruntime import functions  # noqa: E402
from porthal.backends.onnxruntime.graph import Graph  # noqa: E402
from porthal.hal import Unavailable, UsageError, contracts, create  # noqa: E402
from porthal.model.export import export  # noqa: E402
from porthal.model.load import DEMO, opened  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / "examples/onnx/generate.py"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(*opened(DEMO), tmp_path_factory.mktemp("exported") / "model.onnx")


@pytest.mark.parametrize("fate", ["missing", "moved", "truncated", "empty", "half a graph", "no graph", "beyond"])
def test_the_script_says_which_file_is_wrong(fate, exported, tmp_path):
    graph, data = (Path(shutil.copy(path, tmp_path)) for path in exported[:2])
    size = data.stat().st_size
    if fate == "moved":
        (tmp_path / "sub").mkdir()
        graph = graph.rename(tmp_path / "sub" / graph.name)
    elif fate == "half a graph":
        graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    elif fate in ("truncated", "empty"):
        data.write_bytes(data.read_bytes()[: size // 2 if fate == "truncated" else 0])
    elif fate == "beyond":
        made = onnx.load(str(graph), load_external_data=False)
        first = next(tensor for tensor in made.graph.initializer if tensor.external_data)
        next(fact for fact in first.external_data if fact.key == "offset").value = str(2**63 - 1)  # where a tensor begins
        graph.write_bytes(made.SerializeToString())
    else:
        (graph if fate == "no graph" else data).unlink()
    done = subprocess.run([sys.executable, "-I", str(SCRIPT), str(graph), "x", "2"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.match(rf"{graph} cannot be run: \w", done.stderr) and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"expected it and {graph}.data as they were exported, in one folder\n")


def test_a_graph_newer_than_the_runtime_is_named(monkeypatch):
    monkeypatch.setattr(functions, "OPSET", 99)
    kernel = next(k.function for k in create("onnxruntime").candidates(contracts()["add"]))
    with pytest.raises(Unavailable, match=r"does not take porthal.add, of opset 99: .*Opset 99.*; expected an onnxruntime of"):
        kernel(np.ones((1, 2), np.float32), np.ones((1, 2), np.float32))


def test_a_stopped_export_leaves_the_files_of_the_one_before(exported, tmp_path, monkeypatch):
    files = [Path(shutil.copy(path, tmp_path)) for path in exported]
    before = [path.read_bytes() for path in files]
    saved, count = Graph.saved, 0

    def full(*args):
        nonlocal count
        count += 1
        if count == 2:  # the draft: weights and the step are written
            raise OSError(28, "No space left on device")
        saved(*args)

    monkeypatch.setattr(Graph, "saved", full)
    with pytest.raises(UsageError, match=r"cannot write .*model.onnx: No space left on device, give a writable folder"):
        export(*opened(DEMO), files[0], "bfloat16")
    assert sorted(tmp_path.iterdir()) == sorted(files) and [path.read_bytes() for path in files] == before


def test_offsets_beyond_32_bits(tmp_path):
    """A weight 5 GiB into the file, which is sparse."""
    graph = Graph()
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    with (tmp_path / "x.data").open("wb") as file:
        file.seek(5 << 30)
        graph.weights_in(file, "x.data")
        held = graph.from_numpy(weight)
    rows = graph.input("rows", (1,), "int64", {0: "T"})
    graph.saved(tmp_path / "x.onnx", "x", {"y": graph.entered("Gather", [held, rows], (1, 3), "float32")}, False)
    run = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    assert (run.run(None, {"rows": np.array([1, 0])})[0] == weight[::-1]).all()
