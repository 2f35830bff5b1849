#!/usr/bin/env bash
# One would guess: row i of F.linear(x, w) is made of row i of x and of w, and of nothing that is no part of x.
# What happens: on a processor with AMX, in bfloat16, the kernel loads rows of x in whole tiles and lets the weight's zero
#   padding erase what it loaded too much. 0 * NaN is NaN. So for many K that are no multiple of 32 a NaN, or an infinity,
#   that stands beside a row turns the row into NaN:
#   - x is a slice of columns of a wider tensor, as the parts of a fused projection are: 48 of 64 rows become NaN from the
#     neighbours' columns, x itself being finite (K = 100, 386, 578; not 96, 576).
#   - x is dense and K is odd: a row of NaN makes the row before it NaN. One broken request spoils another one's result.
#   Finite neighbours change nothing, and few rows take another kernel, so small tests do not see it.
# Version: torch 2.13.0 (oneDNN 3.12), Intel Emerald Rapids. float16, float32, and ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 are
#   right; so is every processor without AMX.
# Whom it hurts: who pads with NaN to find uses of padding, masks a cache by -inf and slices it, batches requests of which
#   one may go wrong; and who moves a test from AMD to Intel.
# How to live with it: x.contiguous() before the product where K is even; K padded to a multiple of 32; or the variable.
set -euo pipefail
if ! grep -q amx_bf16 /proc/cpuinfo; then echo "needs a processor with AMX: nothing was run"; exit 0; fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cat > "$tmp/try.py" <<'PY'
import os
import sys

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
print("torch", torch.__version__, "AMX", torch.cpu._is_amx_tile_supported(), "ONEDNN_MAX_CPU_ISA", isa)
draw = torch.Generator().manual_seed(0)
found = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for K in (96, 100, 386, 576, 578):
        wide = torch.full((64, K + 16), float("nan"), dtype=dtype)
        wide[:, :K] = torch.randn(64, K, generator=draw).to(dtype)
        x, w = wide[:, :K], torch.randn(256, K, generator=draw).to(dtype)
        assert x.isfinite().all()
        found[dtype, "slice", K] = int(F.linear(x, w).isnan().any(1).sum())
    for K in (3, 33, 64):
        x, w = torch.randn(770, K, generator=draw).to(dtype), torch.randn(32, K, generator=draw).to(dtype)
        x[385] = float("nan")
        found[dtype, "dense", K] = int(F.linear(x, w).isnan().any(1).sum())
    said = [f"{kind} K={K}: {n}" for (t, kind, K), n in found.items() if t == dtype]
    print(f"{dtype}, rows of NaN (0 is right for slices, 1 for dense): {', '.join(said)}")
right = {(t, kind, K): int(kind == "dense") for t, kind, K in found}
wrong = {key: n for key, n in found.items() if n != right[key]}
beside = {(torch.bfloat16, "slice", K) for K in (100, 386, 578)} | {(torch.bfloat16, "dense", K) for K in (3, 33)}
same = set(wrong) == (beside if isa == "all" else set())
sys.exit(0 if same else f"CHANGED: {wrong}")
PY
"$tmp/venv/bin/python" "$tmp/try.py"
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 "$tmp/venv/bin/python" "$tmp/try.py"
# Seen 2026-11-28 on an Intel Xeon, family 6 model 207 (Emerald Rapids):
#   torch 2.13.0+cpu AMX True ONEDNN_MAX_CPU_ISA all
#   torch.bfloat16, rows of NaN (0 is right for slices, 1 for dense): slice K=96: 0, slice K=100: 48, slice K=386: 48, slice K=576: 0, slice K=578: 48, dense K=3: 2, dense K=33: 2, dense K=64: 1
#   torch.float16, rows of NaN (0 is right for slices, 1 for dense): slice K=96: 0, slice K=100: 0, slice K=386: 0, slice K=576: 0, slice K=578: 0, dense K=3: 1, dense K=33: 1, dense K=64: 1
#   torch.float32: as float16; with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 torch.bfloat16 as well
