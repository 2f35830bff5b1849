"""Attention over a paged cache, and the indexer that chooses its keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from porthal.backends.cpu import _native
from porthal.backends.reference.backend import Reference
from porthal.hal import Backend, Batch, Pages, PagesSpec, Rows, Selection, SelectionSpec, limits, numpy_dtype, one_of
from porthal.hal.scheme import NONE

Array = np.ndarray[Any, Any]
LINE = 64  # bytes of a cache line
KEYS = "int8_keys", "fp8_keys"
LATENTS = "int8_latents", "int8_tile_latents", "fp8_latents"


def coded(pages: Pages) -> tuple[Array | None, int]:
    """Of a cache under a scheme the scales, and how many codes share one, 0: all of a row; else nothing."""
    if not pages.spec.quantised:
        return None, 0
    field, scheme = pages.spec.quantised
    return pages[f"{field}_scale"], scheme.block[1]


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros that begin with a cache line."""
    memory = np.zeros(math.prod(shape) * dtype.itemsize + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + len(memory) - LINE].view(dtype).reshape(shape)


class Attention(Reference):
    """Pages keep their dtype. The fields of a slot are beside each other, so that its key is one run of memory."""

    native = _native

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        if spec.quantised:  # codes and scales apart
            return Pages(spec, {name: zeros(shape, numpy_dtype(dtype)) for name, (shape, dtype) in Pages.form(spec).items()})
        slots = zeros((spec.slots, sum(width for _, width in spec.fields)), numpy_dtype(spec.dtype))
        ends = np.cumsum([width for _, width in spec.fields])
        return Pages(spec, {name: slots[:, end - width : end] for (name, width), end in zip(spec.fields, ends)})

    def from_logical(self, spec: Any, arrays: Any, into: Any = None) -> Any:
        if not isinstance(spec, PagesSpec) or spec.quantised:
            return super().from_logical(spec, arrays, into)
        return Backend.from_logical(self, spec, arrays, into or self.alloc_pages(spec))

    @limits(provider="C++", batch_invariant=True, schemes=one_of(NONE, *LATENTS))
    def sparse_mla(
        self, q_latent: Array, q_rope: Array, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Array:
        o = self.empty(q_latent.shape, q_latent.dtype.name)
        (c, _), (kp, _) = kv.spec.fields
        self.native.sparse_mla(
            q_latent, q_rope, kv[c], *coded(kv), kv[kp], *sel.native, batch.cu_q, batch.block_table, batch.block_size, scale, o
        )
        return o

    @limits(provider="C++", batch_invariant=True, schemes=one_of(NONE, *KEYS))
    def indexer_scores(self, iq: Array, w: Array, keys: Pages, batch: Batch, *, scale: float) -> Array:
        scores, ((field, _),) = self.empty((batch.T, batch.max_kv), "float32"), keys.spec.fields
        self.native.indexer_scores(
            iq, w, keys[field], coded(keys)[0], batch.visible, batch.cu_q, batch.block_table, batch.block_size, scale, scores
        )
        return scores

    @limits(provider="C++", batch_invariant=True)
    def topk(self, scores: Array, batch: Batch, *, k: int) -> Selection:
        indices = self.empty((batch.T, k), "int32")
        self.native.topk(scores, batch.visible, k, indices)
        return self._selection(indices, batch)

    @limits(provider="C++", batch_invariant=True, schemes=one_of(NONE, *KEYS))
    def indexer_topk(self, iq: Array, w: Array, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        indices, ((field, _),) = self.empty((batch.T, k), "int32"), keys.spec.fields
        self.native.indexer_topk(
            iq, w, keys[field], coded(keys)[0], batch.visible, batch.cu_q, batch.block_table, batch.block_size, scale, k,
            indices,
        )  # fmt: skip
        return self._selection(indices, batch)

    def _selection(self, indices: Array, batch: Batch) -> Selection:
        T, k = indices.shape
        length = self.empty((T,), "int32")
        self.native.selected(batch.visible, k, length)
        return Selection(SelectionSpec(T, k), Rows(indices, length))
