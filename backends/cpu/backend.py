"""Native kernels for float32 and bfloat16 NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.cpu import _native
from porthal.backends.cpu.attention import Attention
from porthal.hal import Weight, WeightSpec, limits, numpy_dtype, one_of

Array = np.ndarray[Any, Any]
NATIVE = one_of("float32", "bfloat16")


class Cpu(Attention):
    """Expert weights are packed for the instruction set in use; everything else lies as in the reference."""

    native = _native

    def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
        if spec.op != "moe_experts":
            return super().prepare(spec, read, into)
        experts, rows, columns = spec.shape
        gated = spec.operand == "w13"
        packed = into.native if into else self.native.PackedExperts(experts, rows, columns, numpy_dtype(spec.dtype), gated)
        for e in range(experts):  # one expert at a time: a model's experts need not fit twice
            packed.set(e, read(e))
        return into or Weight(spec, packed)

    def to_logical(self, operand: Any) -> dict[str, Array]:
        if not isinstance(operand, Weight) or operand.spec.op != "moe_experts":
            return super().to_logical(operand)
        experts, *shape = operand.spec.shape
        w = np.empty((experts, *shape), numpy_dtype(operand.spec.dtype))
        for e in range(experts):
            operand.native.get(e, w[e])
        return {"w": w}

    @limits(provider="C++", batch_invariant=True, dtypes={"x": NATIVE, "weight": NATIVE})
    def rms_norm(self, x: Array, weight: Array, *, eps: float = 1e-5) -> Array:
        y = self.empty(x.shape, x.dtype.name)
        self.native.rms_norm(x, weight, y, eps)
        return y

    @limits(provider="C++", dtypes={"x": NATIVE})
    def moe_experts(
        self, x: Array, w13: Weight, w2: Weight, ids: Array, weights: Array, *, first_expert: int = 0
    ) -> Array:
        y = self.empty(x.shape, x.dtype.name)
        self.native.moe_experts(x, ids, weights, w13.native, w2.native, first_expert, y)
        return y
