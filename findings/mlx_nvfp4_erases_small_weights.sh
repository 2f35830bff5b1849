#!/usr/bin/env bash
# One would guess: mode="nvfp4" is NVIDIA's two-level format, so the size of a weight matters as little as in MXFP4.
# What happens: mlx.core.quantize(w, mode="nvfp4") writes no global scale unless it is given one. A block scale is
#   amax / 6 in e4m3, whose smallest number is 2^-9: a block whose largest element is below 0.0059 becomes ALL ZERO,
#   without a warning. Weights of standard deviation 0.003 lose half of their elements, 0.0016 (0.02 / sqrt(2 * 78),
#   the usual initialisation of output projections in 78 layers) lose everything; mxfp4 has 12% error at all sizes.
#   nn.quantize(model, mode="nvfp4") has no argument for a global scale: the layer then answers about 0.
#   And global_scale is the largest element itself, where modelopt 0.47.0 and torchao 0.18.0 keep amax / 2688 (a
#   factor) and compressed-tensors 0.20.0 keeps 2688 / amax (a divisor). Either one, passed on as it is, ruins it.
# Version: mlx and mlx-cpu 0.32.4 (CPU). The helper layers of the pure Python part are the same on every device.
# Whom it hurts: who takes mlx as a peer for NVFP4, who converts a checkpoint to or from it.
# How to live with it: pass global_scale = max(abs(w)) in float32 to quantize and dequantize; after packing, count the
#   zero blocks that were not zero before; never copy a "global scale" by its name.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq numpy==2.4.6 mlx==0.32.4 mlx-cpu==0.32.4
"$tmp/venv/bin/python" - <<'PY'
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np

mx.set_default_device(mx.cpu)
print("mlx", mx.__version__)
draw = np.random.default_rng(0)


def weight(deviation):
    return mx.array(draw.normal(0, deviation, (256, 512)).astype(np.float32))


def error(got, want):
    return float(mx.linalg.norm(got - want) / mx.linalg.norm(want))


def back(w, mode, scale=None):
    return mx.dequantize(*mx.quantize(w, mode=mode, global_scale=scale), mode=mode, global_scale=scale)


ok = True
print("deviation   nvfp4 error, zeros   mxfp4 error, zeros   nvfp4 with global_scale = amax")
for deviation in (0.02, 0.005, 0.003, 0.0016):
    w = weight(deviation)
    n, m, g = back(w, "nvfp4"), back(w, "mxfp4"), back(w, "nvfp4", mx.abs(w).max())
    zeros = [float((x == 0).mean()) for x in (n, m)]
    errors = [f"{error(x, w):9.3f}" for x in (n, m, g)]
    print(f"{deviation:9}", errors[0], f"{zeros[0]:6.1%}", errors[1], f"{zeros[1]:6.1%}", errors[2], sep="   ")
    ok &= error(m, w) < 0.15 and error(g, w) < 0.15 and zeros[1] < 0.15
    ok &= {0.02: zeros[0] < 0.1, 0.005: True, 0.003: zeros[0] > 0.4, 0.0016: zeros[0] > 0.99}[deviation]

layer = nn.Linear(512, 256, bias=False)
layer.weight, x = w, mx.array(draw.normal(0, 1, (4, 512)).astype(np.float32))
want = layer(x)
got = layer.to_quantized(mode="nvfp4")(x)
print(f"Linear(0.0016).to_quantized(mode='nvfp4'): error of the output {error(got, want):.3f}")
ok &= error(got, want) > 0.9

amax = mx.abs(w).max()
as_factor, as_divisor = error(back(w, "nvfp4", amax / 2688), w), error(back(w, "nvfp4", 2688 / amax), w)
print(f"global_scale = amax / 2688 (factor): error {as_factor:.3f}; 2688 / amax (divisor): {as_divisor:.3f}")
ok &= as_factor > 0.9 and as_divisor > 0.9
sys.exit(0 if ok else "CHANGED: mlx packs nvfp4 otherwise than described")
PY
# Seen 2026-11-27:
#   mlx 0.32.4
#   deviation   nvfp4 error, zeros   mxfp4 error, zeros   nvfp4 with global_scale = amax
#        0.02       0.103     6.8%       0.119    11.2%       0.095
#       0.005       0.136     8.9%       0.118    11.3%       0.095
#       0.003       0.583    50.5%       0.117    11.6%       0.095
#      0.0016       0.996    99.6%       0.117    11.7%       0.095
#   Linear(0.0016).to_quantized(mode='nvfp4'): error of the output 0.995
#   global_scale = amax / 2688 (factor): error 0.999; 2688 / amax (divisor): 1.000
