#!/usr/bin/env bash
# One would guess: a Cast to bfloat16 or float16 in an ONNX model rounds to the nearest number, whatever the model's shapes
#   are.
# What happens: where a dimension is symbolic ("tokens", as exporters write it), and in every constant, OpenVINO rounds to
#   bfloat16 by a rule that adds half a step to numbers of odd last bit alone, so of the others all are cut off: 24% of the
#   results are not the nearest, all of these too near to zero. After 156 residual adds (78 layers) the stream has lost a
#   seventh of its norm. With fixed shapes the same model on the same CPU is right. A Cast to float16 and back is removed in
#   both: 100000 stays 100000 where it is infinite, and nothing is rounded. A Cast to float8e4m3fn goes through float16, which
#   rounds twice: 4 of 1000 are wrong.
# Version: openvino 2026.4.1, CPU, INFERENCE_PRECISION_HINT=f32; onnx 1.23.2. ONNX Runtime 1.31.1 is right in all of it.
# Whom it hurts: who exports a bfloat16 model with symbolic rows and compares it with another runtime; who tests with fixed
#   shapes and ships symbolic ones; weights that are cast in the graph, in any model.
# How to live with it: round weights before the export and store them as bfloat16; look at the mean SIGNED error beside the
#   largest one, with the shapes that will be shipped; take no float16 rounding for granted.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.31.1 openvino==2026.4.1
"$tmp/venv/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

print("openvino", ov.__version__, "onnx", onnx.__version__, "onnxruntime", ort.__version__)
TYPES = {
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "float16": (TensorProto.FLOAT16, np.float16),
    "float8e4m3fn": (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
}
draw = np.random.default_rng(0)


def rounding(source, target, small):
    between = f"{source}_{target}"
    cast = helper.make_node("Cast", [source], [between], to=TYPES[small][0])
    return [cast, helper.make_node("Cast", [between], [target], to=TensorProto.FLOAT)]


def run(nodes, feeds, rows, constants=()):
    """The output y by OpenVINO and by ONNX Runtime; `rows` is a number or a name."""
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [rows, *v.shape[1:]]) for n, v in feeds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 256])
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, [output], list(constants)),
                              opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    compiled = ov.Core().compile_model(ov.Core().read_model(data), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.array(compiled(feeds)[0]), session.run(None, feeds)[0]


ok = True
x = draw.standard_normal((16, 256)).astype(np.float32)
for small, (_, dtype) in TYPES.items():
    want = x.astype(dtype).astype(np.float32)
    for rows in (16, "tokens"):
        got, other = run(rounding("x", "y", small), {"x": x}, rows)
        off, inward = got != want, abs(got) < abs(want)
        print(f"{small}, {rows} rows: {off.mean():.1%} not the nearest ({inward.mean():.1%} too near to zero),"
              f" {(got == x).mean():.0%} not rounded at all; ONNX Runtime {(other != want).mean():.0%}")
        ok &= bool((other == want).all())
        if small == "bfloat16":
            ok &= not off.any() if rows == 16 else 0.2 < off.mean() < 0.3 and bool((inward == off).all())
        else:
            ok &= bool((got == x).all()) if small == "float16" else 0.001 < off.mean() < 0.01
weight = numpy_helper.from_array(x, "w")
nodes = [*rounding("w", "rounded", "bfloat16"), helper.make_node("Mul", ["rounded", "x"], ["y"])]
got, other = run(nodes, {"x": np.ones_like(x)}, 16, [weight])
want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
print(f"a constant cast to bfloat16, 16 rows: {(got != want).mean():.1%} not the nearest;"
      f" ONNX Runtime {(other != want).mean():.0%}")
ok &= 0.2 < (got != want).mean() < 0.3 and bool((other == want).all())
large = np.full((16, 256), 1e5, np.float32)
got, other = run(rounding("x", "y", "float16"), {"x": large}, 16)
print(f"100000 to float16 and back: {got[0, 0]:g}; ONNX Runtime {other[0, 0]:g}")
ok &= got[0, 0] == 1e5 and np.isinf(other[0, 0])

branches = {f"b{i}": (0.1 * draw.standard_normal((16, 256))).astype(np.float32) for i in range(156)}
nodes, stream = [], "x"
for i in range(156):
    after = f"s{i}" if i < 155 else "y"
    nodes += [helper.make_node("Add", [stream, f"b{i}"], [f"sum{i}"]), *rounding(f"sum{i}", after, "bfloat16")]
    stream = after
exact = x.astype(np.float64) + sum(b.astype(np.float64) for b in branches.values())
kept = {}
for rows in (16, "tokens"):
    got, other = run(nodes, {"x": x, **branches}, rows)
    kept[rows], by_other = (np.linalg.norm(y) / np.linalg.norm(exact) for y in (got, other))
    print(f"norm kept after 156 adds, {rows} rows: {kept[rows]:.3f}; ONNX Runtime {by_other:.3f}")
ok &= kept[16] > 0.99 and kept["tokens"] < 0.95
sys.exit(0 if ok else "CHANGED: casts round otherwise than described")
PY
# Seen 2026-11-28 on an Intel Xeon, family 6 model 207 (Emerald Rapids):
#   openvino 2026.4.1-22982-e213a147257-releases/2026/4 onnx 1.23.2 onnxruntime 1.31.1
#   bfloat16, 16 rows: 0.0% not the nearest (0.0% too near to zero), 0% not rounded at all; ONNX Runtime 0%
#   bfloat16, tokens rows: 23.9% not the nearest (23.9% too near to zero), 0% not rounded at all; ONNX Runtime 0%
#   float16, 16 rows: 100.0% not the nearest (48.6% too near to zero), 100% not rounded at all; ONNX Runtime 0%
#   float16, tokens rows: 100.0% not the nearest (48.6% too near to zero), 100% not rounded at all; ONNX Runtime 0%
#   float8e4m3fn, 16 rows: 0.4% not the nearest (0.3% too near to zero), 0% not rounded at all; ONNX Runtime 0%
#   float8e4m3fn, tokens rows: 0.4% not the nearest (0.3% too near to zero), 0% not rounded at all; ONNX Runtime 0%
#   a constant cast to bfloat16, 16 rows: 23.9% not the nearest; ONNX Runtime 0%
#   100000 to float16 and back: 100000; ONNX Runtime inf
#   norm kept after 156 adds, 16 rows: 1.000; ONNX Runtime 1.000
#   norm kept after 156 adds, tokens rows: 0.860; ONNX Runtime 1.000
