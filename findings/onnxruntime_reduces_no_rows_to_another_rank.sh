#!/usr/bin/env bash
# One would guess: a reduction over the last axis of [0, 256] without kept dims gives [0], as of [n, 256] it gives [n].
# What happens: ArgMax, ReduceMax, ReduceSum and ReduceMean of ONNX Runtime on CPU give [0, 256]: where another axis is
#   empty the one that is reduced stays. There is a warning and no error, so what follows has one dimension too many; with
#   an output whose memory was bound beforehand the call fails. onnx's own reference evaluator gives [0].
# Version: onnxruntime 1.31.1, onnx 1.23.2.
# Whom it hurts: who exports a decode step and runs it on a rank, an expert or a request without rows: the argmax of no
#   logits, the sum over no tokens of an expert, a batch whose requests are all finished.
# How to live with it: run nothing where a step has no rows, or Reshape the result to the shape that is meant.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1
"$tmp/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
from onnx import TensorProto, helper

print("onnx", onnx.__version__, "onnxruntime", ort.__version__)
ort.set_default_logger_severity(3)
ok = True
for op in ("ArgMax", "ReduceMax", "ReduceSum", "ReduceMean"):
    by_attribute = op == "ArgMax"
    axes = [] if by_attribute else [helper.make_tensor("axes", TensorProto.INT64, [1], [-1])]
    given = {"axis": -1} if by_attribute else {}
    node = helper.make_node(op, ["x", *(a.name for a in axes)], ["y"], keepdims=0, **given)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 256])
    y = helper.make_tensor_value_info("y", TensorProto.INT64 if by_attribute else TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([node], "g", [x], [y], axes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = {}
    for rows in (2, 0):
        data = np.zeros((rows, 256), np.float32)
        shapes[rows] = session.run(None, {"x": data})[0].shape, onnx.reference.ReferenceEvaluator(model).run(None, {"x": data})[0].shape
    print(f"{op:10s} of [2, 256]: {shapes[2][0]}, of [0, 256]: {shapes[0][0]}; the reference: {shapes[2][1]}, {shapes[0][1]}")
    ok &= shapes == {2: ((2,), (2,)), 0: ((0, 256), (0,))}
sys.exit(0 if ok else "the behaviour has changed")
PY
