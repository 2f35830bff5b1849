#!/usr/bin/env bash
# One would guess: a NaN stays one through element-wise operators, softmax and casts to a format that has NaN, as in PyTorch
#   and NumPy, so that it is still there where somebody looks for it.
# What happens, on the CPU, without a warning:
#   Paddle casts NaN to float8_e4m3fn as 448, the largest number, though it reads the code 127 as NaN; relu of NaN is 0 (relu6
#   keeps it); argmax never takes the NaN that max returns.
#   MindSpore's relu and clamp of NaN give a bound, maximum(0, NaN) is NaN but maximum(NaN, 0) is 0, and relu6 goes by the
#   place: 0 in whole groups of four, NaN in the rest of the row. Its softmax over the last axis of float32 is NaN in the NaN's
#   place alone and 0 in all others, log_softmax -inf; over another axis, or in float16, all are NaN. amax keeps a NaN only if
#   it comes first.
# Version: paddlepaddle 3.3.1; mindspore 2.10.0 with numpy 1.26.4.
# Whom it hurts: ports to Kunlunxin and Ascend, whose frameworks these are, with such a framework as the golden one: the
#   indexer's ReLU, a cache in FP8 with scales of its own, clamps before a cast and argmax turn a broken row into a plausible
#   one, and a check for NaN behind them finds nothing.
# How to live with it: look for NaN before such an operator, not behind; where(isnan(x), x, relu(x)); compare NaN masks first.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
for package in paddlepaddle==3.3.1 "mindspore==2.10.0 numpy==1.26.4"; do
  python3 -m venv "$tmp/${package%%=*}"
  # shellcheck disable=SC2086
  "$tmp/${package%%=*}/bin/pip" install -qq setuptools==80.9.0 $package
done
cat > "$tmp/say.py" <<'PY'
def say(name, functions, expected):
    ok = True
    for what, made in functions.items():
        got = str([round(float(v), 3) for v in made.flatten()])
        print(f"{name} {what}: {got}")
        ok &= got == expected[what]
    return ok
PY
cd "$tmp"
"$tmp/paddlepaddle/bin/python" - 2> "$tmp/log" <<'PY' || { tail -5 "$tmp/log"; exit 1; }
import sys

import paddle
from paddle.nn import functional as F
from say import say

print("paddle", paddle.__version__)
x = paddle.to_tensor([1.0, float("nan"), 3.0, 2.0])
e4m3 = x.astype("float8_e4m3fn").astype("float32")
code = paddle.to_tensor([127], dtype="uint8").view("float8_e4m3fn").astype("float32")
found = {"relu": F.relu(x), "relu6": F.relu6(x), "to e4m3": e4m3, "code 127 of e4m3": code,
         "max": x.max(), "argmax": x.argmax()}  # fmt: skip
expected = {"relu": "[1.0, 0.0, 3.0, 2.0]", "relu6": "[1.0, nan, 3.0, 2.0]", "to e4m3": "[1.0, 448.0, 3.0, 2.0]",
            "code 127 of e4m3": "[nan]", "max": "[nan]", "argmax": "[2.0]"}  # fmt: skip
sys.exit(0 if say("paddle", found, expected) else "CHANGED: paddle treats NaN otherwise than described")
PY
GLOG_v=3 "$tmp/mindspore/bin/python" - 2> "$tmp/log" <<'PY' || { tail -5 "$tmp/log"; exit 1; }
import sys

import mindspore
import numpy as np
from mindspore import ops
from say import say

print("mindspore", mindspore.__version__)
mindspore.set_device("CPU")
row = np.array([[1, np.nan, 3, 2]], np.float32)
x, turned, half = mindspore.Tensor(row), mindspore.Tensor(row.T.copy()), mindspore.Tensor(row.astype(np.float16))
first, six, zero = (mindspore.Tensor(v) for v in (np.roll(row, -1), np.full(6, np.nan, np.float32), np.zeros_like(row)))
found = {
    "relu": ops.relu(x), "relu6 of six NaN": ops.relu6(six), "clamp to 0, 5": ops.clamp(x, 0, 5),
    "maximum(x, 0)": ops.maximum(x, zero), "maximum(0, x)": ops.maximum(zero, x),
    "softmax": ops.softmax(x, -1), "log_softmax": ops.log_softmax(x, -1), "softmax over axis 0": ops.softmax(turned, 0),
    "softmax in float16": ops.softmax(half, -1), "amax": ops.amax(x, -1), "amax, NaN first": ops.amax(first, -1),
}  # fmt: skip
found = {what: made.asnumpy() for what, made in found.items()}
nan = "[nan, nan, nan, nan]"
expected = {
    "relu": "[1.0, 0.0, 3.0, 2.0]", "relu6 of six NaN": "[0.0, 0.0, 0.0, 0.0, nan, nan]",
    "clamp to 0, 5": "[1.0, 0.0, 3.0, 2.0]", "maximum(x, 0)": "[1.0, 0.0, 3.0, 2.0]",
    "maximum(0, x)": "[1.0, nan, 3.0, 2.0]", "softmax": "[0.0, nan, 0.0, 0.0]", "log_softmax": "[-inf, nan, -inf, -inf]",
    "softmax over axis 0": nan, "softmax in float16": nan, "amax": "[3.0]", "amax, NaN first": "[nan]",
}  # fmt: skip
sys.exit(0 if say("mindspore", found, expected) else "CHANGED: mindspore treats NaN otherwise than described")
PY
# Seen 2026-11-28:
#   paddle 3.3.1
#   paddle relu: [1.0, 0.0, 3.0, 2.0]
#   paddle relu6: [1.0, nan, 3.0, 2.0]
#   paddle to e4m3: [1.0, 448.0, 3.0, 2.0]
#   paddle code 127 of e4m3: [nan]
#   paddle max: [nan]
#   paddle argmax: [2.0]
#   mindspore 2.10.0
#   mindspore relu: [1.0, 0.0, 3.0, 2.0]
#   mindspore relu6 of six NaN: [0.0, 0.0, 0.0, 0.0, nan, nan]
#   mindspore clamp to 0, 5: [1.0, 0.0, 3.0, 2.0]
#   mindspore maximum(x, 0): [1.0, 0.0, 3.0, 2.0]
#   mindspore maximum(0, x): [1.0, nan, 3.0, 2.0]
#   mindspore softmax: [0.0, nan, 0.0, 0.0]
#   mindspore log_softmax: [-inf, nan, -inf, -inf]
#   mindspore softmax over axis 0: [nan, nan, nan, nan]
#   mindspore softmax in float16: [nan, nan, nan, nan]
#   mindspore amax: [3.0]
#   mindspore amax, NaN first: [nan]
