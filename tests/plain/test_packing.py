"""A weight is packed by the class that owns the kernel it is for, not by the most derived one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.hal import CallSpec, Weight, WeightSpec, at_most, bind, limits


class Transposing:
    """A library whose linear takes weights as [K, N], for at most four rows."""

    def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
        return Weight(spec, np.ascontiguousarray(read(slice(None)).T))

    @limits(T=at_most(4))
    def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
        return x @ w.native


class Chip(Transposing, Reference):
    """Its kernels stand in a mixin."""

    name = "chip"


@pytest.mark.parametrize(("rows", "status"), [(4, "own"), (5, "inherited")])
def test_weights_are_packed_for_the_kernel_that_was_chosen(rows: int, status: str) -> None:
    x, w = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3), np.arange(9, dtype=np.float32).reshape(3, 3)
    calls = [CallSpec({"T": rows, "K": 3, "N": 3}, {"x": "float32", "w": "float32"}, {"out": "x"}, {"w": "none"})]
    ops = bind(backend=Chip(), profile={"linear": calls})
    assert ops.choices["linear"].status == status
    packed = ops.prepare(WeightSpec("linear", "w", (3, 3), "float32"), w.__getitem__)
    assert np.array_equal(ops.linear(x, packed), x @ w.T)  # small integers: exact
