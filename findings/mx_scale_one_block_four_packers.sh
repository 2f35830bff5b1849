#!/usr/bin/env bash
# One would guess: MXFP4 and MXFP8 are OCP formats with an 8-bit power-of-two scale, so packers write the same scale.
# What happens: four packers follow three rules for the rounding up of amax, and which blocks saturate differs. The
#   largest element of a block, 7.0 in MXFP4, reads back as 6 (torchao's default, modelopt, mlx) or 8
#   (compressed-tensors), from three different pairs of scale and code. 448, the largest e4m3 number, keeps scale 1
#   everywhere but in compressed-tensors, which takes 2 and gives one exponent away. torchao alone has four rules.
#   Tiny blocks: the scale's lowest byte is 0, that is 2^-127. mlx on CPU does not stop there, the byte wraps: a
#   float32 block of 1e-36 in MXFP8 gets byte 255 and reads back as infinity, one of 1e-39 as 1e38. Rows of an
#   embedding that was never trained, shrunk by weight decay, get there. torchao's default divides by 2^-126 where
#   2^-127 is stored: 1e-36 in MXFP8 reads back as half.
# Version: torchao 0.18.0, nvidia-modelopt 0.47.0, compressed-tensors 0.20.0 (its caller picks amax), mlx-cpu 0.32.4.
# Whom it hurts: who compares packed bytes of two tools under one format name; who packs denormal-sized weights.
# How to live with it: write the scale rule into the contract (floor, even or ceiling, and the clamp to 0..254);
#   compare values within the coarsest rule, not bytes; refuse byte 255 and infinite weights after packing.
#   (modelopt imports requests without asking for it, so it is installed here by hand.)
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 torchao==0.18.0 nvidia-modelopt==0.47.0 \
  compressed-tensors==0.20.0 transformers==5.24.0 requests==2.34.2 mlx==0.32.4 mlx-cpu==0.32.4
"$tmp/venv/bin/python" - 2> "$tmp/log" <<'PY' || { tail -5 "$tmp/log"; exit 1; }
import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

mx.set_default_device(mx.cpu)
print(*(f"{p} {version(p)}" for p in ("torch", "torchao", "nvidia-modelopt", "compressed-tensors", "mlx")), sep=", ")
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def block(value):
    x = torch.zeros(1, 32)
    x[0, 0] = value
    return x


def element(code, bits):
    """The value of an element code; positive numbers only are packed here."""
    if bits == 4:
        return E2M1[code & 7]
    return torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()


def torchao(value, bits, mode=ScaleCalculationMode.FLOOR):
    dtype = torch.float4_e2m1fn_x2 if bits == 4 else torch.float8_e4m3fn
    scale, data = to_mx(block(value), dtype, 32, mode)
    byte, code = (int(t.view(torch.uint8).flatten()[0]) for t in (scale, data))
    return byte, 2.0 ** (byte - 127) * element(code & (15 if bits == 4 else 255), bits)


def modelopt(value, bits):
    data, scale = MXFP4QTensor.quantize(block(value), 32) if bits == 4 else MXFP8QTensor.quantize(block(value))
    byte, code = int(scale.flatten()[0]), int(data._quantized_data.view(torch.uint8).flatten()[0])
    return byte, 2.0 ** (byte - 127) * element(code & (15 if bits == 4 else 255), bits)


def compressed(value, bits):
    scheme = preset_name_to_scheme(f"MXFP{bits}", ["Linear"]).weights
    scale, zero = calculate_qparams(torch.zeros(1, 1), torch.full((1, 1), value), scheme)
    return int(scale.log2().round()) + 127, fake_quantize(block(value), scale, zero, scheme)[0, 0].item()


def mlx(value, bits):
    mode = f"mxfp{bits}"
    packed = mx.quantize(mx.array(block(value).numpy()), mode=mode)
    return int(np.array(packed[1]).flat[0]), float(mx.dequantize(*packed, mode=mode).astype(mx.float32)[0, 0])


PACKERS = (torchao, modelopt, compressed, mlx)
WANT = {  # amax, bits: scale byte and value read back, in the order of PACKERS
    (6.5, 4): [(127, 6), (128, 6), (127, 6), (128, 6)],
    (7.0, 4): [(127, 6), (128, 6), (128, 8), (128, 6)],
    (7.5, 4): [(127, 6), (128, 8), (128, 8), (128, 8)],
    (448.0, 8): [(127, 448), (127, 448), (128, 448), (127, 448)],
    (480.0, 8): [(127, 448), (128, 480), (128, 480), (128, 480)],
}
ok = True
print("scale byte and value read back:", *(f.__name__ for f in PACKERS))
for (value, bits), want in WANT.items():
    got = [f(value, bits) for f in PACKERS]
    print(f"  MXFP{bits}, amax {value}:", *(f"{b} -> {v:g}" for b, v in got), sep="   ")
    ok &= got == want
modes = {m.name: torchao(7.0, 4, m) for m in ScaleCalculationMode}
print("  torchao's modes, MXFP4, amax 7.0:", modes)
ok &= set(modes.values()) == {(127, 6.0), (128, 8.0)} and modes["FLOOR"] == (127, 6.0)
for value, bits in ((1e-38, 4), (1e-36, 8), (1e-39, 8)):
    got = [f(value, bits) for f in PACKERS]
    print(f"  MXFP{bits}, amax {value}:", *(f"{b} -> {v:.3g}" for b, v in got), sep="   ")
    ok &= got[3][1] > 1e30 and all(b == 0 and v < 2e-36 for b, v in got[:3]) and got[0][1] < 0.7 * value
sys.exit(0 if ok else "CHANGED: a packer follows another rule than described")
PY
# Seen 2026-11-27:
#   torch 2.13.0+cpu, torchao 0.18.0, nvidia-modelopt 0.47.0, compressed-tensors 0.20.0, mlx 0.32.4
#   scale byte and value read back: torchao modelopt compressed mlx
#     MXFP4, amax 6.5:   127 -> 6   128 -> 6   127 -> 6   128 -> 6
#     MXFP4, amax 7.0:   127 -> 6   128 -> 6   128 -> 8   128 -> 6
#     MXFP4, amax 7.5:   127 -> 6   128 -> 8   128 -> 8   128 -> 8
#     MXFP8, amax 448.0:   127 -> 448   127 -> 448   128 -> 448   127 -> 448
#     MXFP8, amax 480.0:   127 -> 448   128 -> 480   128 -> 480   128 -> 480
#     torchao's modes, MXFP4, amax 7.0: {'FLOOR': (127, 6.0), 'RCEIL': (128, 8.0), 'CEIL': (128, 8.0), 'EVEN': (128, 8.0)}
#     MXFP4, amax 1e-38:   0 -> 5.88e-39   0 -> 8.82e-39   0 -> 8.82e-39   255 -> inf
#     MXFP8, amax 1e-36:   0 -> 5.17e-37   0 -> 1.03e-36   0 -> 1.03e-36   255 -> inf
#     MXFP8, amax 1e-39:   0 -> 5.05e-40   0 -> 1.01e-39   0 -> 1.01e-39   245 -> 1.17e+38
