"""Norms and what is computed element by element."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.reference.backend import Reference
from porthal.hal import Batch, dtype, limits

Array = np.ndarray[Any, Any]
ROWS = limits(provider="C++", batch_invariant=True)  # of float32, bfloat16 and float16: all that the contracts have


class Elementwise(Reference):
    """Each row by itself, in float32, rounded once."""

    native: Any

    @ROWS
    def rms_norm(self, x: Array, weight: Array, *, eps: float = 1e-5) -> Array:
        y = self.empty(x.shape, dtype(x))
        self.native.rms_norm(x, weight, y, eps)
        return y

    @ROWS
    def add_rms_norm(self, x: Array, residual: Array, weight: Array, *, eps: float = 1e-5) -> tuple[Array, Array]:
        y, r = self.empty(x.shape, dtype(x)), self.empty(x.shape, dtype(x))
        self.native.add_rms_norm(x, residual, weight, y, r, eps)
        return y, r

    @ROWS
    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float = 1e-6) -> Array:
        y = self.empty(x.shape, dtype(x))
        self.native.layer_norm(x, weight, bias, y, eps)
        return y

    @ROWS
    def add(self, a: Array, b: Array) -> Array:
        y = self.empty(a.shape, dtype(a))
        self.native.add(a, b, y)
        return y

    @ROWS
    def silu_mul(self, x: Array) -> Array:
        y = self.empty((x.shape[0], x.shape[1] // 2), dtype(x))
        self.native.silu_mul(x, y)
        return y

    @ROWS
    def cast(self, x: Array, *, to: str) -> Array:
        y = self.empty(x.shape, to)
        self.native.cast(x, y)
        return y

    @ROWS
    def rope(self, x: Array, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Array:
        y = self.empty(x.shape, dtype(x))
        self.native.rope(x, batch.positions, theta, layout == "interleaved", start, width, y)
        return y
