#!/usr/bin/env bash
# One would guess: NumPy treats a bfloat16 array (ml_dtypes) like a float16 one: sums in float32, NaN sorted last.
# What happens: NumPy's special cases are for its own dtypes. sum adds one by one IN bfloat16 and stops at 256: the mean
#   of 4096 ones is 0.0625 (float16: 1.0), in float8_e4m3fn 0.0039. sum(axis=0) of the same numbers as 64 x 64 and
#   then sum() gives 4096. sort leaves finite numbers unsorted once a NaN is among them, so argsort and argpartition
#   take wrong positions; assert_array_equal calls an array with a NaN different from itself; 300 ones counted up
#   (cumsum) end at 256. Nothing warns.
# Version: numpy 2.4.6, ml_dtypes 0.6.0.
# Whom it hurts: NumPy oracles for bf16 and fp8 kernels (norms, log-softmax, top-k, means of errors), and statistics on
#   checkpoints read by safetensors.numpy or JAX.
# How to live with it: astype(float32) or float64 before any reduction, sort or comparison; look for it in the code,
#   since small arrays without NaN come out right.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq numpy==2.4.6 ml_dtypes==0.6.0
"$tmp/venv/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np

print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__)
seen = {}
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    ones = np.ones(4096, dtype)
    mixed = np.array([5, np.nan, 1, 4, 2, np.nan, 3, 0]).astype(dtype)
    try:
        np.testing.assert_array_equal(mixed, mixed)
        same = True
    except AssertionError:
        same = False
    with np.errstate(all="ignore"):
        top = np.argsort(-mixed)[:2].tolist()
        seen[np.dtype(dtype).name] = facts = (
            float(ones.mean()), float(ones.reshape(64, 64).sum(0).sum()), float(np.cumsum(ones[:300])[-1]),
            [float(v) for v in np.sort(mixed)], top, same,
        )  # fmt: skip
    print(f"{np.dtype(dtype).name}: mean of 4096 ones {facts[0]:.4g}; by columns first, the sum is {facts[1]:g};"
          f" cumsum of 300 ones {facts[2]:g}")
    print(f"    sort of 5 nan 1 4 2 nan 3 0: {facts[3]}; best two (argsort): {top}; equal to itself: {same}")
half, brain, eight = seen.values()
ordered = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
ok = half[0] == 1 and half[2] == 300 and half[3][:6] == ordered and half[4] == [0, 3] and half[5]
ok &= brain[0] == 0.0625 and brain[1] == 4096 and brain[2] == 256 and eight[0] == 16 / 4096
ok &= all([v for v in x[3] if v == v] != ordered and not x[5] for x in (brain, eight))
sys.exit(0 if ok else "CHANGED: NumPy treats these types otherwise than described")
PY
# Seen 2026-11-27:
#   numpy 2.4.6 ml_dtypes 0.6.0
#   float16: mean of 4096 ones 1; by columns first, the sum is 4096; cumsum of 300 ones 300
#       sort of 5 nan 1 4 2 nan 3 0: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, nan, nan]; best two (argsort): [0, 3]; equal to itself: True
#   bfloat16: mean of 4096 ones 0.0625; by columns first, the sum is 4096; cumsum of 300 ones 256
#       sort of 5 nan 1 4 2 nan 3 0: [5.0, nan, 1.0, 2.0, 4.0, nan, 0.0, 3.0]; best two (argsort): [0, 1]; equal to itself: False
#   float8_e4m3fn: mean of 4096 ones 0.003906; by columns first, the sum is 256; cumsum of 300 ones 16
#       sort of 5 nan 1 4 2 nan 3 0: [5.0, nan, 1.0, 2.0, 4.0, nan, 0.0, 3.0]; best two (argsort): [0, 1]; equal to itself: False
