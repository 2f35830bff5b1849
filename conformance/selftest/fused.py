"""The composites as single kernels in plain PyTorch, with nothing rounded between the steps.

Honest, and another of the roundings that contracts permit; as text it is what defects of fused kernels are planted in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.torch.backend import Torch
from porthal.hal import Batch, Pages, Weight


class Fused(Torch):
    def mla_prolog(
        self,
        h: Tensor,
        q_a: Weight,
        q_norm: Tensor,
        q_b: Weight,
        kv_a: Weight,
        kv_norm: Tensor,
        w_uk: Weight,
        kv: Pages,
        batch: Batch,
        *,
        theta: float,
        eps: float,
    ) -> Any:
        heads, latent, nope = w_uk.spec.shape
        qr = _rms_norm(_product(h, q_a), q_norm, eps)
        q = _product(qr, q_b).unflatten(1, (heads, -1))
        a = _product(h, kv_a)
        c = _rms_norm(a[:, :latent], kv_norm, eps)
        kp = _turned(a[:, None, latent:], batch, theta)[:, 0]
        q_latent = torch.einsum("tnd,ncd->tnc", q[..., :nope], w_uk.native.float())
        q_rope = _turned(q[..., nope:], batch, theta)
        _write(kv, batch, c, kp)
        return q_latent.to(h.dtype), q_rope.to(h.dtype), qr.to(h.dtype), kv

    def index_prolog(
        self,
        qr: Tensor,
        h: Tensor,
        wq_b: Weight,
        wk: Weight,
        k_norm: Tensor,
        k_bias: Tensor,
        w_head: Weight,
        keys: Pages,
        batch: Batch,
        *,
        theta: float,
        width: int,
        eps: float = 1e-6,
    ) -> Any:
        size = keys.spec.fields[0][1]
        iq = _product(qr, wq_b).unflatten(1, (-1, size))
        iq = torch.cat([_turned(iq[..., :width], batch, theta), iq[..., width:]], dim=-1)
        k = F.layer_norm(_product(h, wk), (size,), k_norm.float(), k_bias.float(), eps)
        k = torch.cat([_turned(k[:, None, :width], batch, theta)[:, 0], k[:, width:]], dim=-1)
        _write(keys, batch, k)
        return iq.to(qr.dtype), _product(h, w_head), keys

    def mla_output(self, o: Tensor, w_uv: Weight, w_o: Weight) -> Tensor:
        values = torch.einsum("tnc,nvc->tnv", o.float(), w_uv.native.float())
        return _product(values.flatten(1), w_o).to(o.dtype)

    def mtp_input(
        self, e: Tensor, g: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Weight, *, eps: float
    ) -> Tensor:
        halves = _rms_norm(e.float(), enorm, eps), _rms_norm(g.float(), hnorm, eps)
        return _product(torch.cat(halves, dim=-1), eh_proj).to(e.dtype)

    def moe_layer(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, shared13: Weight, shared2: Weight
    ) -> Tensor:
        y = _gated(x.float(), shared13.native) @ shared2.native.float().T
        for e in range(w13.spec.shape[0]):
            rows, place = torch.nonzero(ids == e, as_tuple=True)
            out = _gated(x[rows].float(), w13.native[e]) @ w2.native[e].float().T
            y.index_add_(0, rows, out * weights[rows, place, None])
        return y.to(x.dtype)


def _product(x: Tensor, w: Weight) -> Tensor:
    return F.linear(x.float(), w.native.float())


def _gated(x: Tensor, w13: Tensor) -> Tensor:
    gate, up = F.linear(x, w13.float()).chunk(2, dim=-1)
    return F.silu(gate) * up


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()


def _turned(x: Tensor, batch: Batch, theta: float) -> Tensor:
    """x [T, N, R] with neighbouring elements rotated as pairs."""
    width = x.shape[-1]
    i = torch.arange(0, width, 2, dtype=torch.float64)
    angle = batch.native.positions[:, None, None].double() * theta ** (-i / width)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).clone()) * torch.exp(1j * angle).to(torch.complex64)
    return torch.view_as_real(turned).flatten(-2)


def _write(pages: Pages, batch: Batch, *parts: Tensor) -> None:
    slots = batch.native.slots
    there = slots >= 0
    for (name, _), rows in zip(pages.spec.fields, parts):
        pages[name][slots[there]] = rows[there].to(pages[name].dtype)
