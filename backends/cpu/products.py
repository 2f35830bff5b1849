"""Products with weights that are packed once, at load, for the instruction set in use."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.cpu import _native
from porthal.backends.reference.backend import Reference
from porthal.hal import Weight, WeightSpec, limits, numpy_dtype, one_of
from porthal.hal.scheme import NONE, WEIGHTS

Array = np.ndarray[Any, Any]
PACKED = {
    "grouped_gemm", "head_linear", "index_prolog", "linear", "mla_output", "mla_prolog", "moe_experts", "moe_layer",
    "mtp_input",
}  # fmt: skip
GATED = {"w13", "shared13"}  # gate rows, then up rows
ROWS = limits(provider="C++", batch_invariant=True, schemes=one_of(NONE, *WEIGHTS))


class Products(Reference):
    """A weight of one matrix is packed as one of one expert."""

    native = _native

    def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
        if not _packs(spec):
            return super().prepare(spec, read, into)
        shape, gated = (1, 1, *spec.shape)[-3:], spec.operand in GATED and spec.op != "grouped_gemm"
        packed = into.native if into else self.native.Packed(*shape, numpy_dtype(spec.dtype), gated, spec.scheme)
        for e in range(shape[0]):  # one expert at a time: a model's experts need not fit twice
            part = read(slice(None) if len(spec.shape) == 2 else e)
            if spec.quantised:
                packed.set_codes(e, **part)
            else:
                packed.set(e, part)
        return into or Weight(spec, packed)

    def to_logical(self, operand: Any) -> dict[str, Array]:
        if not isinstance(operand, Weight) or not _packs(operand.spec):
            return super().to_logical(operand)
        spec, packed = operand.spec, operand.native
        parts = {name: np.empty(shape, numpy_dtype(dtype)) for name, (shape, dtype) in Weight.form(spec).items()}
        for e in range(packed.shape[0]):
            of_one = [part[e] if len(spec.shape) == 3 else part for part in parts.values()]
            (packed.get_codes if spec.quantised else packed.get)(e, *of_one)
        return parts

    @ROWS
    def linear(self, x: Array, w: Weight, *, out: str = "x") -> Array:
        y = self.empty((x.shape[0], w.spec.shape[0]), w.spec.dtype if out == "x" else out)
        self.native.linear(x, w.native, y)
        return y

    @ROWS
    def head_linear(self, x: Array, w: Weight) -> Array:
        y = self.empty((*x.shape[:2], w.spec.shape[1]), w.spec.dtype)
        self.native.head_linear(x, w.native, y)
        return y

    @ROWS
    def grouped_gemm(self, x: Array, w: Weight, counts: Array) -> Array:
        y = self.empty((x.shape[0], w.spec.shape[1]), w.spec.dtype)
        self.native.grouped_gemm(x, w.native, counts, y)
        return y

    @ROWS
    def moe_experts(
        self, x: Array, w13: Weight, w2: Weight, ids: Array, weights: Array, *, first_expert: int = 0
    ) -> Array:
        y = self.empty(x.shape, w2.spec.dtype)
        self.native.moe_experts(x, ids, weights, w13.native, w2.native, first_expert, False, y)
        return y


def _packs(spec: WeightSpec) -> bool:
    return spec.op in PACKED
