#!/usr/bin/env bash
# One would guess: a product of float16 matrices is summed in float32, as by torch on every device, and rounded once.
# What happens: where the processor has AVX-512 for fp16, zentorch_linear_unary keeps the sums in float16. The error grows with
#   the number of columns, to 60 times that of torch at 2048, and a partial sum beyond 65504 is infinite: rows that sum to 0
#   come out as inf or NaN. zentorch_bmm and zentorch_fused_moe do the same. Nothing is printed.
# Version: zentorch 2.13.0.2, torch 2.13.0, Intel Emerald Rapids. bfloat16 and float32 are summed in float32. On a processor
#   without AVX-512 for fp16 the operator refuses float16.
# Whom it hurts: who runs float16 checkpoints there, or takes the plug-in as the peer of a port.
# How to live with it: bfloat16 or float32; in a test, operands whose partial sums exceed 65504 while the result does not.
set -euo pipefail
if ! grep -q avx512_fp16 /proc/cpuinfo; then echo "needs a processor with AVX-512 for fp16: nothing was run"; exit 0; fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 zentorch==2.13.0.2
cat > "$tmp/try.py" <<'PY'
import sys

import torch
import torch.nn.functional as F
import zentorch

print("torch", torch.__version__, "zentorch", zentorch.__version__)
draw = torch.Generator().manual_seed(0)
same = True
for dtype in (torch.float16, torch.bfloat16):
    x, w = torch.randn(7, 2048, generator=draw).to(dtype), (torch.randn(512, 2048, generator=draw) / 2048**0.5).to(dtype)
    exact = x.double() @ w.double().T
    rows = torch.cat([torch.full((2, 1024), 8.0), torch.full((2, 1024), -8.0)], 1).to(dtype)  # 65536, then back to 0
    eights = torch.full((64, 2048), 8.0).to(dtype)
    off, sums = {}, {}
    for name, linear in (("torch", F.linear), ("zentorch", torch.ops.zentorch.zentorch_linear_unary)):
        off[name] = ((linear(x, w.clone(), None).double() - exact).abs().max() / exact.abs().max()).item()
        sums[name] = linear(rows, eights.clone(), None).flatten()[0].item()
    print(f"{dtype}: relative error {off['torch']:.1e} by torch, {off['zentorch']:.1e}; sum of 1024 times 64 and -64: "
          f"{sums['torch']} by torch, {sums['zentorch']}")
    if dtype == torch.float16:
        same &= off["zentorch"] > 10 * off["torch"] and sums["torch"] == 0 and not abs(sums["zentorch"]) < 1e5
    else:
        same &= off["zentorch"] < 2 * off["torch"] and sums["zentorch"] == 0
sys.exit(0 if same else "CHANGED: float16 is summed otherwise than described")
PY
"$tmp/venv/bin/python" "$tmp/try.py"
# Seen 2026-11-28 on an Intel Xeon, family 6 model 207 (Emerald Rapids):
#   torch 2.13.0+cpu zentorch 2.13.0.2
#   torch.float16: relative error 2.7e-04 by torch, 1.8e-02; sum of 1024 times 64 and -64: 0.0 by torch, inf
#   torch.bfloat16: relative error 2.1e-03 by torch, 2.1e-03; sum of 1024 times 64 and -64: 0.0 by torch, 0.0
