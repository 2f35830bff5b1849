#!/usr/bin/env bash
# One would guess: a kernel that is run with TRITON_INTERPRET=1 computes what it computes on a chip, only slower, so a
#   test on a machine without the chip says something about its bfloat16 path.
# What happens: the interpreter keeps bfloat16 as NumPy uint16. `a + b` and `tl.dot(a, b)` of two bfloat16 blocks take the
#   BIT PATTERNS for integers: 2 + 1 is infinite, 32 ones times 32 ones are 8.5e9, and nothing is raised.
#   A store of float32 into bfloat16 cuts the low bits off instead of rounding to nearest even, as every compiled
#   target does: all results lie below the numbers they stand for. float32 and float16 are right.
# Version: triton 3.9.0 (3.7.1 and 3.8.0 did the same), torch 2.13.0 on a CPU.
# Whom it hurts: who tests vendors' Triton kernels (Ascend, Moore Threads, Cambricon ship forks of it) without the chip, and
#   takes a failure in bfloat16 for the kernel's, or loosens the tolerance until a truncation passes.
# How to live with it: in kernels widen with `.to(tl.float32)` right after each load, which costs nothing on a chip; judge
#   a bfloat16 result of the interpreter by one whole step, not by half of one.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
"$tmp/venv/bin/pip" install -qq --no-deps triton==3.9.0
cat > "$tmp/try.py" <<'PY'
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl

N = 32


@triton.jit
def add(a, b, c, WIDE: tl.constexpr):
    i = tl.arange(0, 32)
    x, y = tl.load(a + i), tl.load(b + i)
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(c + i, (x + y).to(tl.float32))


@triton.jit
def dot(a, b, c, WIDE: tl.constexpr):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(c + at, tl.dot(x, y))


@triton.jit
def cast(a, c):
    i = tl.arange(0, 1024)
    tl.store(c + i, tl.load(a + i).to(c.dtype.element_ty))


print("triton", triton.__version__, "torch", torch.__version__)
ok = True
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for wide in (False, True):
        two, one, out = torch.full((N,), 2.0, dtype=dtype), torch.ones(N, dtype=dtype), torch.empty(N)
        add[(1,)](two, one, out, wide)
        square, product = torch.ones(N, N, dtype=dtype), torch.empty(N, N)
        dot[(1,)](square, square, product, wide)
        right = out[0].item() == 3 and product[0, 0].item() == N
        print(f"{str(dtype)[6:]}{' widened first' if wide else ''}: 2 + 1 = {out[0].item():.4g}, 32 ones . 32 ones = {product[0, 0].item():.4g}")
        ok &= right == (dtype != torch.bfloat16 or wide)
x = torch.rand(1024, generator=torch.Generator().manual_seed(0)) + 1
for dtype in (torch.float16, torch.bfloat16):
    out = torch.empty(1024, dtype=dtype)
    cast[(1,)](x, out)
    rounded, low = (out == x.to(dtype)).double().mean().item(), (out.float() <= x).double().mean().item()
    print(f"float32 to {str(dtype)[6:]}: {rounded:.0%} are the nearest, {low:.0%} not above the number")
    ok &= rounded == 1 if dtype == torch.float16 else low == 1 and rounded < 0.6
sys.exit(0 if ok else "CHANGED: the interpreter treats bfloat16 otherwise than described")
PY
"$tmp/venv/bin/python" "$tmp/try.py"
# Seen 2026-11-28:
#   triton 3.9.0 torch 2.13.0+cpu
#   float32: 2 + 1 = 3, 32 ones . 32 ones = 32
#   float32 widened first: 2 + 1 = 3, 32 ones . 32 ones = 32
#   float16: 2 + 1 = 3, 32 ones . 32 ones = 32
#   float16 widened first: 2 + 1 = 3, 32 ones . 32 ones = 32
#   bfloat16: 2 + 1 = inf, 32 ones . 32 ones = 8.456e+09
#   bfloat16 widened first: 2 + 1 = 3, 32 ones . 32 ones = 32
#   float32 to float16: 100% are the nearest, 50% not above the number
#   float32 to bfloat16: 48% are the nearest, 100% not above the number
