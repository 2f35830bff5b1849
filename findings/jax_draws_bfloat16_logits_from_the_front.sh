#!/usr/bin/env bash
# One would guess: jax.random.categorical draws token i with probability softmax(logits)[i], as exactly as the logits' dtype
#   allows.
# What happens: its noise has the dtype of the logits, made from 7 random bits in bfloat16 and 10 in float16, so that it
#   takes 128 (1024) values and never exceeds 4.84 (6.93). Of 4096 equal logits in bfloat16 98% of the draws fall on the first
#   512 tokens and none on the last 2048: the highest noise is a tie, which the first wins. A token of probability 0.0008
#   beside one of 0.86 is drawn 30 times too rarely. random.uniform and bernoulli have the same grid: u < 0.001 holds for 0.8%
#   of draws, so a speculative step accepts drafts that it should refuse. mode="high" mends categorical alone.
#   torch.multinomial, F.gumbel_softmax (torch 2.13.0) and mlx.random.categorical (mlx 0.32.4) draw evenly from bfloat16.
# Version: jax 0.10.2 (jaxlib 0.10.2). The rule is the same on every device.
# Whom it hurts: sampling from a bfloat16 head, RL rollouts and synthetic data (length and vocabulary drift to low token
#   ids), drafts that are verified by u < p.
# How to live with it: logits.astype(float32) before categorical, u in float32; a test of EQUAL logits over a large
#   vocabulary, where greedy tests and tests of a few tokens see nothing.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0
"$tmp/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, jax.default_backend())
N, KEY = 1 << 18, jax.random.key(0)
logits = np.array([0, -2, -4, -5, -7])
p = np.exp(logits) / np.exp(logits).sum()
found = {}
for name in ("float32", "bfloat16", "float16"):
    for mode in ("default", "high"):
        how = {} if mode == "default" else {"mode": "high"}
        equal = np.asarray(jax.random.categorical(KEY, jnp.zeros(4096, name), shape=(4096,), **how))
        drawn = np.asarray(jax.random.categorical(KEY, jnp.asarray(logits, name), shape=(N,), **how))
        front, back, ratio = (equal < 512).mean(), (equal >= 2048).mean(), np.bincount(drawn, minlength=5) / N / p
        found[name, mode] = front, ratio[4]
        print(f"{name}, mode {mode}: of 4096 equal tokens the first 512 get {front:.1%}, the last 2048 {back:.1%};"
              f" p = {p[4]:.5f} is drawn {ratio[4]:.2f} times as often as it should")
    u = np.asarray(jax.random.uniform(KEY, (N,), name)).astype(np.float64)
    below = np.asarray(jax.random.bernoulli(KEY, jnp.asarray(0.001, name), (N,))).mean()
    found[name, "u"] = len(np.unique(u)), below
    print(f"    uniform takes {len(np.unique(u)):,} values; bernoulli(0.001) is true in {below:.2%}")
ok = all(abs(found["float32", mode][0] - 0.125) < 0.03 for mode in ("default", "high"))
ok &= found["bfloat16", "default"][0] > 0.95 and found["bfloat16", "default"][1] < 0.1 and found["float16", "default"][0] > 0.3
ok &= abs(found["bfloat16", "high"][0] - 0.125) < 0.05
ok &= found["bfloat16", "u"][0] == 128 and found["bfloat16", "u"][1] > 0.005 and 0.0005 < found["float32", "u"][1] < 0.002
sys.exit(0 if ok else "CHANGED: draws from 16-bit logits are distributed otherwise than described")
PY
# Seen 2026-11-28:
#   jax 0.10.2 cpu
#   float32, mode default: of 4096 equal tokens the first 512 get 12.2%, the last 2048 50.9%; p = 0.00079 is drawn 0.90 times as often as it should
#   float32, mode high: of 4096 equal tokens the first 512 get 13.0%, the last 2048 49.1%; p = 0.00079 is drawn 0.98 times as often as it should
#       uniform takes 258,054 values; bernoulli(0.001) is true in 0.10%
#   bfloat16, mode default: of 4096 equal tokens the first 512 get 98.1%, the last 2048 0.0%; p = 0.00079 is drawn 0.03 times as often as it should
#   bfloat16, mode high: of 4096 equal tokens the first 512 get 14.1%, the last 2048 47.7%; p = 0.00079 is drawn 1.02 times as often as it should
#       uniform takes 128 values; bernoulli(0.001) is true in 0.77%
#   float16, mode default: of 4096 equal tokens the first 512 get 40.0%, the last 2048 11.7%; p = 0.00079 is drawn 0.56 times as often as it should
#   float16, mode high: of 4096 equal tokens the first 512 get 12.4%, the last 2048 51.0%; p = 0.00079 is drawn 0.93 times as often as it should
#       uniform takes 1,024 values; bernoulli(0.001) is true in 0.20%
