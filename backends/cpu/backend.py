"""Native kernels for float32 and bfloat16 NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.cpu.products import Products
from porthal.hal import Batch, Rows, Selection, SelectionSpec, limits, one_of

Array = np.ndarray[Any, Any]
NATIVE = one_of("float32", "bfloat16")


class Cpu(Products):
    """Native kernels; what is not packed lies as in the reference."""

    @limits(provider="C++", batch_invariant=True, dtypes={"x": NATIVE, "weight": NATIVE})
    def rms_norm(self, x: Array, weight: Array, *, eps: float = 1e-5) -> Array:
        y = self.empty(x.shape, x.dtype.name)
        self.native.rms_norm(x, weight, y, eps)
        return y

    @limits(provider="C++", batch_invariant=True)
    def topk(self, scores: Array, batch: Batch, *, k: int) -> Selection:
        length = np.minimum(batch.visible, k)
        indices = self.empty((batch.T, k), "int32")
        self.native.topk(scores, batch.visible, k, indices)
        return Selection(SelectionSpec(batch.T, k), Rows(indices, length))
