#!/usr/bin/env bash
# One would guess: jnp.max gives NaN for a row that has one, as NumPy does and as StableHLO says of `maximum`, so that
#   isfinite(x.max()) finds numbers gone wrong.
# What happens: on a CPU it does so for one row of 256 numbers and not for 17 of them: there the maximum of a row with a NaN
#   is the highest of its other numbers. jnp.min is alike, sum and any(isnan(x)) are right. Nothing warns, and the flag
#   xla_cpu_enable_fast_min_max changes nothing.
# Version: jax 0.10.2 (jaxlib 0.10.2), CPU.
# Whom it hurts: checks for overflow on logits, losses and gradients, which pass; softmax and quantisation scales
#   that are developed on a CPU; tests with a single row, which are right.
# How to live with it: any(isnan(x)), or where(isnan(x), inf, x).max().
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -qq jax==0.10.2 jaxlib==0.10.2
"$tmp/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, jax.default_backend())
seen = {}
for rows in (1, 17, 256):
    x = np.random.default_rng(0).standard_normal((rows, 256)).astype(np.float32)
    x[np.arange(rows), np.arange(rows)] = np.nan
    found = {
        name: int(np.isnan(np.asarray(f(jnp.asarray(x)), np.float32)).sum())
        for name, f in (("max", lambda a: a.max(1)), ("min", lambda a: a.min(1)), ("sum", lambda a: a.sum(1)))
    }
    found["any(isnan)"] = int(jnp.isnan(jnp.asarray(x)).any(1).sum())
    seen[rows] = found
    print(f"{rows} rows with a NaN each: NumPy's max is NaN in {int(np.isnan(x.max(1)).sum())} of them; JAX: {found}")
ok = all(found["sum"] == found["any(isnan)"] == rows for rows, found in seen.items())
ok &= seen[1]["max"] == 1 and seen[17]["max"] == seen[256]["max"] == 0
sys.exit(0 if ok else "CHANGED: the maximum of rows with NaN is another one")
PY
# Seen 2026-11-27:
#   jax 0.10.2 cpu
#   1 rows with a NaN each: NumPy's max is NaN in 1 of them; JAX: {'max': 1, 'min': 1, 'sum': 1, 'any(isnan)': 1}
#   17 rows with a NaN each: NumPy's max is NaN in 17 of them; JAX: {'max': 0, 'min': 0, 'sum': 17, 'any(isnan)': 17}
#   256 rows with a NaN each: NumPy's max is NaN in 256 of them; JAX: {'max': 0, 'min': 0, 'sum': 256, 'any(isnan)': 256}
