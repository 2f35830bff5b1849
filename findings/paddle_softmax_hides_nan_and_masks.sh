#!/usr/bin/env bash
# One would guess: softmax gives 0 for -inf, and NaN for a row with a NaN or +inf in it, as in PyTorch, NumPy and JAX.
# What happens in Paddle on the CPU: every logit is first raised to at least the row's largest minus 64, so that nothing is
#   0: a masked key (-inf) weighs exp(-64) = 1.6e-28, and log_softmax, too, ends at -64. In rows of 8 or more a NaN is taken
#   for such a small number, and the row sums to 1 as if nothing were wrong: anywhere if the width is a multiple of 8, else
#   but for the front and what is behind the last whole eight. +inf makes the row uniform; so does -inf throughout, if the
#   width is a multiple of 8. Narrower rows give NaN for all three, and log_softmax does for a NaN.
#   scaled_dot_product_attention is built on it: a NaN in one of 16 keys gives an ordinary result, and a masked key whose
#   value is 1e35 adds 1e6 to it.
# Version: paddlepaddle 3.3.1.
# Whom it hurts: a port to Kunlunxin, whose framework it is, with Paddle on the CPU as the golden one: a broken key or row of
#   logits is no longer seen in any result; p > 0 does not say which tokens a mask left; no token is less likely than exp(-64),
#   which flatters a loss; the garbage of unused cache slots comes through if it is large.
# How to live with it: golden values from another library; look for NaN in the logits, not in probabilities; select the
#   visible keys instead of masking them.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq setuptools==80.9.0 paddlepaddle==3.3.1 numpy==2.4.6
cd "$tmp"
"$tmp/venv/bin/python" - 2> "$tmp/log" <<'PY' || { tail -5 "$tmp/log"; exit 1; }
import sys

import numpy as np
import paddle
from paddle.nn import functional as F

print("paddle", paddle.__version__)
NAN, INF, ok = float("nan"), float("inf"), True


def softmax(row, of=F.softmax):
    return of(paddle.to_tensor(np.array([row], np.float32)), axis=-1).numpy()[0].astype(float)


few = softmax([0, -50, -70, -100, -INF])
print("of 0 -50 -70 -100 -inf:", *(f"{p:.3g}" for p in few))
logs = softmax([0, -50, -70, -100, -INF], F.log_softmax)
print("  log_softmax:", *(f"{v:.4g}" for v in logs))
ok &= few[2] == few[3] == few[4] > 0 and abs(np.log(few[4]) + 64) < 1e-3 and (abs(logs[2:] + 64) < 1e-3).all()
normal = np.random.default_rng(0).standard_normal(4097).astype(np.float32)
for width in (4, 7, 8, 12, 16, 100, 4096, 4097):
    parts = []
    for name, bad in (("NaN", NAN), ("+inf", INF)):
        row = normal[:width].copy()
        row[2] = bad
        p = softmax(row)
        if np.isnan(p).all():
            parts.append(f"{name}: NaN")
        else:
            parts.append(f"{name}: sums to {p.sum():.4f}, its own p is {p[2]:.2g}, the greatest {p.max():.2g}")
        ok &= np.isnan(p).all() == (width < 8)
        ok &= width < 8 or abs(p.sum() - 1) < 1e-4 and (p[2] < 1e-25 if name == "NaN" else p.max() == p.min())
    p = softmax(np.full(width, -INF))
    parts.append("all -inf: " + ("NaN" if np.isnan(p).all() else "uniform" if p.max() == p.min() else "else"))
    ok &= np.isnan(p).all() == (width % 8 > 0) and np.isnan(softmax(np.r_[NAN, normal[:width]], F.log_softmax)).all()
    print(f"width {width}:", ";  ".join(parts))
one, keys, values = np.ones((1, 1, 1, 8), np.float32), np.zeros((1, 16, 1, 8), np.float32), np.ones((1, 16, 1, 8), np.float32)
keys[0, 3] = NAN
got = F.scaled_dot_product_attention(*(paddle.to_tensor(x) for x in (one, keys, values))).numpy()
values[0, 5], mask = 1e35, np.zeros((1, 1, 1, 16), np.float32)
mask[..., 5] = -INF
operands = (paddle.to_tensor(x) for x in (one, np.zeros_like(keys), values, mask))
masked = F.scaled_dot_product_attention(*operands).numpy()
print(f"attention over 16 keys, values 1: one key NaN: {got.max():.4g}; one masked, its value 1e35: {masked.max():.4g}")
ok &= abs(got - 1).max() < 1e-5 and masked.min() > 1e5
sys.exit(0 if ok else "CHANGED: softmax treats NaN or -inf otherwise than described")
PY
# Seen 2026-11-28:
#   paddle 3.3.1
#   of 0 -50 -70 -100 -inf: 1 1.93e-22 1.6e-28 1.6e-28 1.6e-28
#     log_softmax: 0 -50 -64 -64 -64
#   width 4: NaN: NaN;  +inf: NaN;  all -inf: NaN
#   width 7: NaN: NaN;  +inf: NaN;  all -inf: NaN
#   width 8: NaN: sums to 1.0000, its own p is 5.2e-29, the greatest 0.32;  +inf: sums to 1.0000, its own p is 0.12, the greatest 0.12;  all -inf: uniform
#   width 12: NaN: sums to 1.0000, its own p is 4.3e-29, the greatest 0.27;  +inf: sums to 1.0000, its own p is 0.083, the greatest 0.083;  all -inf: NaN
#   width 16: NaN: sums to 1.0000, its own p is 3.8e-29, the greatest 0.24;  +inf: sums to 1.0000, its own p is 0.062, the greatest 0.062;  all -inf: uniform
#   width 100: NaN: sums to 1.0000, its own p is 7.1e-30, the greatest 0.044;  +inf: sums to 1.0000, its own p is 0.01, the greatest 0.01;  all -inf: NaN
#   width 4096: NaN: sums to 1.0000, its own p is 6.3e-31, the greatest 0.0039;  +inf: sums to 1.0000, its own p is 0.00024, the greatest 0.00024;  all -inf: uniform
#   width 4097: NaN: sums to 1.0000, its own p is 6.3e-31, the greatest 0.0039;  +inf: sums to 1.0000, its own p is 0.00024, the greatest 0.00024;  all -inf: NaN
#   attention over 16 keys, values 1: one key NaN: 1; one masked, its value 1e35: 1.069e+06
