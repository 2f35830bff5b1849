"""Checkpoints of few bits as graphs: codes in the file, QuantizeLinear and DequantizeLinear around products."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[dev]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[dev]'")

import porthal  # noqa: E402
from porthal.hal import Batch, UsageError  # noqa: E402
from porthal.model.export import export  # noqa: E402
from porthal.model.load import DEMO, opened  # noqa: E402
from porthal.model.quantising import quantise  # noqa: E402

TEXT = b"def f(self, x):\n    return self."
TYPES = {"int8": "INT8", "int4": "INT4", "fp8": "FLOAT8E4M3FN"}


@pytest.mark.parametrize(("form", "near"), [("int8", 1e-4), ("int4", 1e-4), ("fp8", 5e-2)])
def test_the_logits_are_those_of_the_scheme(form, near, tmp_path):
    """fp8 is less near as a code at a tie may be the next one, which is a sixteenth away."""
    quantise(DEMO, tmp_path / "few", form)
    export(*opened(tmp_path / "few"), tmp_path / "model.onnx", inline=True)
    made = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    kinds = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in made.graph.initializer}
    by = {output: node for node in made.graph.node for output in node.output}
    gemms = [node for node in made.graph.node if node.op_type == "Gemm"]
    quantised = [by[g.input[1]] for g in gemms if g.input[1] in by and by[g.input[1]].op_type == "DequantizeLinear"]
    assert len(quantised) >= 10 and {kinds[d.input[0]] for d in quantised} == {TYPES[form]}
    assert any(node.op_type == "QuantizeLinear" for node in made.graph.node) == (form != "int4")

    run = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    batch = Batch.build([len(TEXT)], [len(TEXT)], [[0]], 64)
    names = ("positions", "visible", "slots", "row_request", "kv_len", "block_table", "last_rows")
    cache = {i.name: np.zeros((64, i.shape[1]), np.float32) for i in run.get_inputs() if "cache" in i.name}
    given = {"ids": np.array(list(TEXT), np.int32), **{name: getattr(batch, name) for name in names}, **cache}
    found = run.run(["logits"], given)[0][0]
    wanted = porthal.model.load(tmp_path / "few", porthal.bind("reference")).forward(list(TEXT))[-1]
    plain = porthal.model.load(DEMO, porthal.bind("reference")).forward(list(TEXT))[-1]
    assert np.abs(found - wanted).max() < near < 2 * np.abs(plain - wanted).max()


def test_codes_that_a_graph_cannot_hold_are_named(tmp_path, caplog):
    quantise(DEMO, tmp_path / "few", "mxfp4")
    expected = "is under mxfp4, which graphs have no codes for: expected a checkpoint of plain numbers or under int8_channel, "
    with pytest.raises(UsageError, match=expected):
        export(*opened(tmp_path / "few"), tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["few"]
    assert caplog.text == ""  # nothing is said of how they would be read
