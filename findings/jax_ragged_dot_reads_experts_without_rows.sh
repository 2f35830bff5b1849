#!/usr/bin/env bash
# One would guess: jax.lax.ragged_dot multiplies each row by the matrix of its own group, so that a group without rows
#   is neither read nor paid for, as in torch._grouped_mm or DeepGEMM.
# What happens: on a CPU it is lowered to ONE product over groups and inner dim together, with zeros in place of the rows of
#   other groups. Each row is multiplied by every matrix, and 0 times infinity or NaN is NaN: one weight that is not
#   finite, in an expert that nobody chose, makes every row NaN. Eight rows that go to 2 of 64 experts cost as much
#   as if they went to all. Nothing warns.
# Version: jax 0.10.2 (jaxlib 0.10.2), CPU.
# Whom it hurts: MoE layers tested on a CPU before they run on a TPU or GPU; weights with an overflow or a slice that was
#   not loaded, where the fault then shows far from its expert; decoding, which should read 8 experts of 256.
# How to live with it: a loop over the experts with lax.cond, as in examples/jax, or gather the chosen matrices.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq jax==0.10.2 jaxlib==0.10.2
"$tmp/venv/bin/python" - <<'PY'
import sys
import time

import jax
import jax.numpy as jnp

print("jax", jax.__version__, jax.default_backend())
product = jax.jit(jax.lax.ragged_dot)


def seconds(experts):
    w, counts = jnp.ones((experts, 1024, 512)), jnp.zeros(experts, jnp.int32).at[jnp.array([1, 2])].set(4)
    product(x, w, counts).block_until_ready()  # compiled
    start = time.perf_counter()
    for _ in range(5):
        product(x, w, counts).block_until_ready()
    return (time.perf_counter() - start) / 5


x = jnp.ones((8, 1024))
w, counts = jnp.ones((64, 1024, 512)), jnp.zeros(64, jnp.int32).at[jnp.array([1, 2])].set(4)
rows = {}
for bad in (jnp.nan, jnp.inf):
    y = product(x, w.at[5, 0, 0].set(bad), counts)  # expert 5 has no row
    rows[str(bad)] = int(jnp.isnan(y).any(1).sum())
    print(f"one weight of expert 5, which has no row, is {bad}: {rows[str(bad)]} of 8 rows have a NaN")
few, many = seconds(4), seconds(64)
print(f"8 rows to 2 of 4 experts: {1e3 * few:.1f} ms; to 2 of 64: {1e3 * many:.1f} ms")
ok = rows == {"nan": 8, "inf": 8} and many > 4 * few
sys.exit(0 if ok else "CHANGED: ragged_dot leaves experts without rows alone")
PY
# Seen 2026-11-27:
#   jax 0.10.2 cpu
#   one weight of expert 5, which has no row, is nan: 8 of 8 rows have a NaN
#   one weight of expert 5, which has no row, is inf: 8 of 8 rows have a NaN
#   8 rows to 2 of 4 experts: 6.0 ms; to 2 of 64: 556.2 ms
