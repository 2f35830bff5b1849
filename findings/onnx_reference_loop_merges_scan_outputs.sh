#!/usr/bin/env bash
# One would guess: onnx's reference evaluator, which is what runtimes are compared with, stacks what a Loop scans: rows of
#   [3, 4] in two rounds give [2, 3, 4], as the operator's text and ONNX Runtime have it.
# What happens: it puts them one below the other, [6, 4]. Scanned numbers and vectors come out right, so a Loop that was
#   tried with those is taken for proven; with matrices (attention per row gives heads x width) the rank is one less than the
#   model states, and what follows fails, or computes along another axis. The checker, with full shape inference, is content.
# Version: onnx 1.23.2; onnxruntime 1.31.1 is right.
# Whom it hurts: who writes an operator as an ONNX function with a Loop, and proves it with the reference evaluator.
# How to live with it: scan vectors (Reshape to [-1] inside, back to the full shape behind the Loop), which both do alike.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1
"$tmp/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnxruntime as ort

print("onnx", onnx.__version__, "onnxruntime", ort.__version__)


def shapes(rank):
    names = ["N", "C", "D"][:rank]
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[{", ".join(["T", *names])}] x) => (float[{", ".join("abcd"[: rank + 1])}] y)
        {{
          n0 = Shape <end = 1> (x)
          n = Squeeze (n0)
          always = Constant <value = bool {{1}}> ()
          y = Loop (n, always) <body = each (int64 i, bool c) => (bool more, float[{", ".join(names)}] row) {{
            more = Identity (c)
            row = Gather (x, i)
          }}>
        }}""")
    onnx.checker.check_model(model, full_check=True)
    x = np.arange(2 * 3**rank, dtype=np.float32).reshape(2, *[3] * rank)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0].shape, onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})[0].shape
    print(f"two rounds of rows of rank {rank}: onnxruntime {found[0]}, the reference {found[1]}")
    return found


ok = shapes(1) == ((2, 3), (2, 3)) and shapes(2) == ((2, 3, 3), (6, 3)) and shapes(3) == ((2, 3, 3, 3), (6, 3, 3))
sys.exit(0 if ok else "the behaviour has changed")
PY
