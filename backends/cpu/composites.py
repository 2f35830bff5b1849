"""Operators that are made of others, in one call each."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.cpu.products import ROWS, Products
from porthal.hal import Batch, Pages, Weight

Array = np.ndarray[Any, Any]


class Composites(Products):
    """Between their parts nothing comes back to Python."""

    @ROWS
    def mla_prolog(
        self,
        h: Array,
        q_a: Weight,
        q_norm: Array,
        q_b: Weight,
        kv_a: Weight,
        kv_norm: Array,
        w_uk: Weight,
        kv: Pages,
        batch: Batch,
        *,
        theta: float,
        eps: float,
    ) -> tuple[Array, Array, Array, Pages]:
        heads, latent, _ = w_uk.spec.shape
        (c, _), (kp, width) = kv.spec.fields
        rows, dtype = h.shape[0], q_a.spec.dtype
        q_latent, q_rope = self.empty((rows, heads, latent), dtype), self.empty((rows, heads, width), dtype)
        qr = self.empty((rows, q_a.spec.shape[0]), dtype)
        self.native.mla_prolog(
            h, q_a.native, q_norm, q_b.native, kv_a.native, kv_norm, w_uk.native, kv.native[c], kv.native[kp], batch.slots,
            batch.positions, theta, eps, q_latent, q_rope, qr,
        )  # fmt: skip
        return q_latent, q_rope, qr, kv

    @ROWS
    def index_prolog(
        self,
        qr: Array,
        h: Array,
        wq_b: Weight,
        wk: Weight,
        k_norm: Array,
        k_bias: Array,
        w_head: Weight,
        keys: Pages,
        batch: Batch,
        *,
        theta: float,
        width: int,
        eps: float = 1e-6,
    ) -> tuple[Array, Array, Pages]:
        ((field, size),) = keys.spec.fields
        rows, dtype = h.shape[0], wk.spec.dtype
        iq = self.empty((rows, wq_b.spec.shape[0] // size, size), dtype)
        w = self.empty((rows, w_head.spec.shape[0]), "float32")
        self.native.index_prolog(
            qr, h, wq_b.native, wk.native, k_norm, k_bias, w_head.native, keys.native[field], batch.slots, batch.positions,
            theta, width, eps, iq, w,
        )  # fmt: skip
        return iq, w, keys

    @ROWS
    def mla_output(self, o: Array, w_uv: Weight, w_o: Weight) -> Array:
        y = self.empty((o.shape[0], w_o.spec.shape[0]), w_o.spec.dtype)
        self.native.mla_output(o, w_uv.native, w_o.native, y)
        return y

    @ROWS
    def mtp_input(self, e: Array, g: Array, enorm: Array, hnorm: Array, eh_proj: Weight, *, eps: float) -> Array:
        u = self.empty(e.shape, eh_proj.spec.dtype)
        self.native.mtp_input(e, g, enorm, hnorm, eh_proj.native, eps, u)
        return u

    @ROWS
    def moe_layer(
        self, x: Array, w13: Weight, w2: Weight, ids: Array, weights: Array, shared13: Weight, shared2: Weight
    ) -> Array:
        y = self.empty(x.shape, w2.spec.dtype)
        self.native.moe_experts(x, None, None, shared13.native, shared2.native, 0, False, y)
        self.native.moe_experts(x, ids, weights, w13.native, w2.native, 0, True, y)
        return y
