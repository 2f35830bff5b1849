"""Products with weights that are packed once, at load, for the instruction set in use."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.cpu import _native
from porthal.backends.reference.backend import Reference
from porthal.hal import Weight, WeightSpec, limits, numpy_dtype

Array = np.ndarray[Any, Any]
PACKED = {
    "grouped_gemm", "head_linear", "index_prolog", "linear", "mla_output", "mla_prolog", "moe_experts", "moe_layer",
    "mtp_input",
}  # fmt: skip
GATED = {"w13", "shared13"}  # gate rows, then up rows


class Products(Reference):
    """A weight of one matrix is packed as one of one expert."""

    native = _native

    def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
        if spec.op not in PACKED:
            return super().prepare(spec, read, into)
        shape = (1, 1, *spec.shape)[-3:]
        if into:
            packed = into.native
        else:
            packed = self.native.Packed(*shape, numpy_dtype(spec.dtype), spec.operand in GATED and spec.op != "grouped_gemm")
        if len(spec.shape) == 2:
            packed.set(0, read(slice(None)))
        else:
            for e in range(shape[0]):  # one expert at a time: a model's experts need not fit twice
                packed.set(e, read(e))
        return into or Weight(spec, packed)

    def to_logical(self, operand: Any) -> dict[str, Array]:
        if not isinstance(operand, Weight) or operand.spec.op not in PACKED:
            return super().to_logical(operand)
        packed = operand.native
        w = np.empty(packed.shape, numpy_dtype(operand.spec.dtype))
        for e in range(len(w)):
            packed.get(e, w[e])
        return {"w": w.reshape(operand.spec.shape)}

    @limits(provider="C++", batch_invariant=True)
    def linear(self, x: Array, w: Weight, *, out: str = "x") -> Array:
        y = self.empty((x.shape[0], w.spec.shape[0]), w.spec.dtype if out == "x" else out)
        self.native.linear(x, w.native, y)
        return y

    @limits(provider="C++", batch_invariant=True)
    def head_linear(self, x: Array, w: Weight) -> Array:
        y = self.empty((*x.shape[:2], w.spec.shape[1]), w.spec.dtype)
        self.native.head_linear(x, w.native, y)
        return y

    @limits(provider="C++", batch_invariant=True)
    def grouped_gemm(self, x: Array, w: Weight, counts: Array) -> Array:
        y = self.empty((x.shape[0], w.spec.shape[1]), w.spec.dtype)
        self.native.grouped_gemm(x, w.native, counts, y)
        return y

    @limits(provider="C++", batch_invariant=True)
    def moe_experts(
        self, x: Array, w13: Weight, w2: Weight, ids: Array, weights: Array, *, first_expert: int = 0
    ) -> Array:
        y = self.empty(x.shape, w2.spec.dtype)
        self.native.moe_experts(x, ids, weights, w13.native, w2.native, first_expert, False, y)
        return y
