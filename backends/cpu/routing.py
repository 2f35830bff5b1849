"""Which experts rows go to, and their way there and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.reference.backend import Reference
from porthal.hal import dtype, limits

Array = np.ndarray[Any, Any]
ROWS = limits(provider="C++", batch_invariant=True)
WHOLE = limits(provider="C++")


class Routing(Reference):
    """Choices are exact for the float32 scores that are computed."""

    native: Any

    @ROWS
    def moe_route(
        self, logits: Array, bias: Array, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1
    ) -> tuple[Array, Array]:
        ids, weights = self.empty((logits.shape[0], k), "int32"), self.empty((logits.shape[0], k), "float32")
        self.native.moe_route(logits, bias, k, scale, n_group, topk_group, ids, weights)
        return ids, weights

    @WHOLE
    def moe_permute(self, x: Array, ids: Array, *, E: int, first_expert: int = 0) -> tuple[Array, Array, Array]:
        places = ids.shape[0] * ids.shape[1]
        rows, counts = self.empty((places, x.shape[1]), dtype(x)), self.empty((E,), "int32")
        source = self.empty((places,), "int32")
        self.native.moe_permute(x, ids, first_expert, rows, counts, source)
        return rows, counts, source

    @WHOLE
    def moe_unpermute(self, sorted: Array, source: Array, weights: Array) -> Array:
        y = self.empty((weights.shape[0], sorted.shape[1]), dtype(sorted))
        self.native.moe_unpermute(sorted, source, weights, y)
        return y
