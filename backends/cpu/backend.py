"""Native kernels for NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from porthal.backends.cpu import _native, policy
from porthal.backends.cpu.copies import Copies
from porthal.backends.cpu.elementwise import Elementwise
from porthal.backends.cpu.peaks import peaks
from porthal.backends.cpu.products import Products
from porthal.backends.cpu.routing import Routing
from porthal.backends.cpu.tokens import Tokens
from porthal.hal import (
    Batch,
    Peak,
    Rows,
    Selection,
    SelectionSpec,
    UsageError,
    limits,
    one_of,
)

Array = np.ndarray[Any, Any]
NATIVE = one_of("float32", "bfloat16")


class Cpu(Copies, Elementwise, Products, Routing, Tokens):
    """Native kernels; what is not packed lies as in the reference."""

    def __init__(self, device: str = "") -> None:
        if device:
            raise UsageError(f"{self.name} has no device {device!r}: expected {self.name!r} alone")
        super().__init__()
        policy.apply(_native)

    def describe(self) -> str:
        return f"{super().describe()} ({policy.text(_native)})"

    def peaks(self) -> Mapping[str, Peak]:
        return peaks()

    @limits(provider="C++", batch_invariant=True)
    def topk(self, scores: Array, batch: Batch, *, k: int) -> Selection:
        length = np.minimum(batch.visible, k)
        indices = self.empty((batch.T, k), "int32")
        self.native.topk(scores, batch.visible, k, indices)
        return Selection(SelectionSpec(batch.T, k), Rows(indices, length))
