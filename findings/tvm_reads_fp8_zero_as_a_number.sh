#!/usr/bin/env bash
# One would guess: 8-bit floats that a compiler accepts are read as the formats are defined; above all, 0 is 0.
# What happens: without hardware for them TVM widens the codes itself, and takes every code for a NORMAL number: in e4m3fn
#   the code 0 is read as 0.0078125, all subnormals come out too large, and NaN is 480. Writing fails where reading does:
#   results below 0.0151 go to wrong codes. The kinds of AMD (e4m3fnuz, e5m2fnuz) have another exponent, which is not known
#   here: all 256 codes are read doubled, nearly all numbers are written halved, so that a round trip looks well. A row of
#   6144 zeros times ones is 48. It compiles and runs without a word.
# Version: apache-tvm 0.27.0.post1, target llvm on x86. float16 and bfloat16 are right.
# Whom it hurts: who compiles an FP8 checkpoint (weights of pruned or padded rows are 0, those cast without a scale are
#   mostly subnormal), or tests a lowering for a chip with FP8 on the CPU, where round trips of larger numbers pass.
# How to live with it: read all 256 codes once and compare them with ml_dtypes, and write back what was read; or convert to
#   bfloat16 before the compiler.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq numpy==2.4.6 ml_dtypes==0.6.0 apache-tvm==0.27.0.post1
"$tmp/venv/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np
import tvm
from tvm import relax
from tvm.script import relax as R

print("tvm", tvm.__version__, "ml_dtypes", ml_dtypes.__version__)


def run(compute, *arrays):
    """A Relax function of these arrays, compiled for the CPU."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", R.Tensor(a.shape, a.dtype.name)) for i, a in enumerate(arrays)]
    with builder.function("main", inputs):
        with builder.dataflow():
            out = builder.emit_output(compute(*inputs))
        builder.emit_func_output(out)
    machine = relax.VirtualMachine(tvm.compile(builder.get(), "llvm"), tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()


def differ(a, b):
    return ~((a == b) | (np.isnan(a) & np.isnan(b)))


codes, ok = np.arange(256, dtype=np.uint8), True
draw = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32)
for name, wrong_codes in (("float8_e4m3fn", 18), ("float8_e5m2", 16), ("float8_e4m3fnuz", 256), ("float8_e5m2fnuz", 256)):
    dtype = np.dtype(getattr(ml_dtypes, name))
    want = codes.view(dtype).astype(np.float32)
    got = run(lambda x: relax.op.astype(x, "float32"), codes.view(dtype))
    small = np.float32(0.01 if "e4m3" in name else 1e-5) * draw
    written = run(lambda x, name=name: relax.op.astype(x, name), small).view(dtype).astype(np.float32)
    off = differ(written, small.astype(dtype).astype(np.float32))
    reads = int(differ(got, want).sum())
    print(f"{name}: {reads} of 256 codes read wrong, 0 as {got[0]:g}, 1 ({want[1]:g}) as {got[1]:g}, 0x7f ({want[127]:g}) as"
          f" {got[127]:g}; of small numbers {off.mean():.0%} written wrong, the largest {abs(small[off]).max():g}")
    ok &= reads == wrong_codes and got[0] > 0 and off.mean() > 0.2
zeros, ones = np.zeros((1, 6144), ml_dtypes.float8_e4m3fn), np.ones((6144, 1), np.float32)
product = run(lambda a, b: relax.op.matmul(relax.op.astype(a, "float32"), b), zeros, ones)[0, 0]
print(f"a row of 6144 zeros in float8_e4m3fn, times ones: {product:g}")
for name in ("float16", "bfloat16"):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    back = run(lambda x, name=name: relax.op.astype(relax.op.astype(x, name), "float32"), draw)
    ok &= not differ(back, draw.astype(dtype).astype(np.float32)).any()
sys.exit(0 if ok and product == 48 else "CHANGED: 8-bit floats are read or written otherwise than described")
PY
# Seen 2026-11-28:
#   tvm 0.27.0.post1 ml_dtypes 0.6.0
#   float8_e4m3fn: 18 of 256 codes read wrong, 0 as 0.0078125, 1 (0.00195312) as 0.00878906, 0x7f (nan) as 480; of small numbers 79% written wrong, the largest 0.0151336
#   float8_e5m2: 16 of 256 codes read wrong, 0 as 3.05176e-05, 1 (1.52588e-05) as 3.8147e-05, 0x7f (nan) as 114688; of small numbers 45% written wrong, the largest 4.02316e-05
#   float8_e4m3fnuz: 256 of 256 codes read wrong, 0 as 0.0078125, 1 (0.000976562) as 0.00878906, 0x7f (240) as 480; of small numbers 96% written wrong, the largest 0.0402316
#   float8_e5m2fnuz: 256 of 256 codes read wrong, 0 as 3.05176e-05, 1 (7.62939e-06) as 3.8147e-05, 0x7f (57344) as 114688; of small numbers 70% written wrong, the largest 4.02316e-05
#   a row of 6144 zeros in float8_e4m3fn, times ones: 48
