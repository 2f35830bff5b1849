"""Activations as codes, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.reference.backend import Reference
from porthal.hal import Quantised, QuantisedSpec, limits, numpy_dtype, one_of, scheme_of

Array = np.ndarray[Any, Any]
SCHEMES = one_of("int8_token", "fp8_group")


class Quantising(Reference):
    """Each row by itself."""

    native: Any

    @limits(provider="C++", batch_invariant=True, scheme=SCHEMES)
    def quantize(self, x: Array, *, scheme: str) -> Quantised:
        spec, rule = QuantisedSpec(x.shape, scheme), scheme_of(scheme)
        parts = {name: np.empty(shape, numpy_dtype(dtype)) for name, (shape, dtype) in Quantised.form(spec).items()}
        self.native.quantize(x, parts["codes"], parts["scale"], rule.block[1])
        return Quantised(spec, parts)

    @limits(provider="C++", batch_invariant=True, schemes=SCHEMES)
    def dequantize(self, q: Quantised, *, out: str) -> Array:
        y = self.empty(q.spec.shape, out)
        self.native.dequantize(q.native["codes"], q.native["scale"], scheme_of(q.spec.scheme).block[1], y)
        return y
