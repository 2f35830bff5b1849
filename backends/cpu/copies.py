"""What moves rows bit for bit: gathers, and writes to a paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.cpu.attention import LATENTS, coded
from porthal.backends.reference.backend import Reference
from porthal.hal import Batch, Pages, Rows, Selection, SelectionSpec, Weight, dtype, limits, one_of
from porthal.hal.scheme import NONE

Array = np.ndarray[Any, Any]
ROWS = limits(provider="C++", batch_invariant=True)
CACHES = one_of(NONE, "int8_keys", "fp8_keys", *LATENTS)
DERIVED = ("q_len", "row_request", "last_rows", "n_decode")  # from a batch, when they are asked for


class Copies(Reference):
    """Caches and tables lie in their own dtype."""

    native: Any
    widens = False

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        """The batch, which then need not find out with NumPy what its kernels ask: that takes longer than they do."""
        planned = into or batch.owned()
        held = vars(planned)  # where cached properties are kept
        if into:
            for array, new in zip(into.leaves(), batch.leaves()):
                array[...] = new
            for name in DERIVED:
                held.pop(name, None)
        else:
            rows = {name: np.empty(batch.T, np.int32) for name in ("positions", "visible")}
            held.update(rows, slots=np.empty(batch.T, np.int64), max_kv=batch.max_kv)  # of which kernels have at most so many
        p = planned
        self.native.plan(p.cu_q, p.kv_len, p.block_table, p.block_size, p.positions, p.visible, p.slots)
        return planned

    @ROWS
    def concat(self, a: Array, b: Array) -> Array:
        y = self.empty((a.shape[0], a.shape[1] + b.shape[1]), dtype(a))
        self.native.concat(a, b, y)
        return y

    @ROWS
    def take_rows(self, x: Array, rows: Array) -> Array:
        y = self.empty((rows.shape[0], x.shape[1]), dtype(x))
        self.native.take_rows(x, rows, y)
        return y

    @ROWS
    def embedding(self, ids: Array, table: Weight) -> Array:
        x = self.empty((ids.shape[0], table.spec.shape[1]), table.spec.dtype)
        self.native.embedding(ids, table.native, x)
        return x

    @ROWS
    def select_rows(self, sel: Selection, rows: Array) -> Selection:
        indices, length = self.rows(sel)
        out, out_length = self.empty((rows.shape[0], sel.spec.k), "int32"), self.empty((rows.shape[0],), "int32")
        self.native.select_rows(indices, length, rows, out, out_length)
        return Selection(SelectionSpec(rows.shape[0], sel.spec.k), Rows(out, out_length))

    @limits(provider="C++", batch_invariant=True, schemes=CACHES)
    def kv_write(self, pages: Pages, batch: Batch, first: Array, second: Array | None = None) -> Pages:
        scale, group = coded(pages)
        for (name, _), rows in zip(pages.spec.fields, (first, second)):
            if scale is None:
                self.native.kv_write(pages.native[name], batch.slots, rows)
            else:
                self.native.kv_write_codes(pages.native[name], scale, batch.slots, rows, group)
            scale = None  # only the first field is codes
        return pages

    @limits(provider="C++", schemes=CACHES)
    def page_copy(self, pages: Pages, source: Array, target: Array) -> Pages:
        for name in pages.form(pages.spec):
            self.native.page_copy(pages.native[name], source, target, pages.spec.block_size)
        return pages
