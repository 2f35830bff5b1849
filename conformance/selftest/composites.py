"""Planted in fused kernels of the composites: mla_prolog, index_prolog, mla_output, mtp_input, moe_layer."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

BF16_ONLY = "in float32 the edit rounds to the dtype that the value has"
mla = partial(Defect, "mla_prolog", source="fused")
index = partial(Defect, "index_prolog", source="fused")
output = partial(Defect, "mla_output", source="fused")
mtp = partial(Defect, "mtp_input", source="fused")
layer = partial(Defect, "moe_layer", source="fused")
split = "q = _product(qr, q_b).unflatten(1, (heads, -1))\n"
angle = "angle = batch.native.positions[:, None, None].double() * theta ** (-i / width)\n"
turned = "turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).clone()) * torch.exp(1j * angle).to(torch.complex64)\n"
half = """first, second = x.chunk(2, -1)
    cos, sin = torch.cos(angle).float(), torch.sin(angle).float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    """
there = "pages[name][slots[there]] = rows[there].to(pages[name].dtype)"
key = "k = F.layer_norm(_product(h, wk), (size,), k_norm.float(), k_bias.float(), eps)\n"
halves = "halves = _rms_norm(e.float(), enorm, eps), _rms_norm(g.float(), hnorm, eps)\n"
values = 'values = torch.einsum("tnc,nvc->tnv", o.float(), w_uv.native.float())\n'
shared = "y = _gated(x.float(), shared13.native) @ shared2.native.float().T\n"
routed = "y.index_add_(0, rows, out * weights[rows, place, None])\n"

DEFECTS = [
    mla("rope-in-halves", "rope", turned, half + turned, discrepancy=31),
    mla("rope-part-first", "order", "torch.einsum(\"tnd,ncd->tnc\", q[..., :nope], w_uk.native.float())\n        q_rope = _turned(q[..., nope:], batch, theta)\n",
        "torch.einsum(\"tnd,ncd->tnc\", q[..., -nope:], w_uk.native.float())\n        q_rope = _turned(q[..., :-nope], batch, theta)\n"),
    mla("heads-inside", "heads", split, "q = _product(qr, q_b).unflatten(1, (-1, heads)).transpose(1, 2)\n", discrepancy=18),
    mla("first-head's-key-matrix", "heads", 'torch.einsum("tnd,ncd->tnc", q[..., :nope], w_uk.native.float())',
        'torch.einsum("tnd,cd->tnc", q[..., :nope], w_uk.native[0].float())'),
    mla("latent-not-normalised", "formula", "c = _rms_norm(a[:, :latent], kv_norm, eps)\n", "c = a[:, :latent]\n"),
    mla("norm-over-latent-and-rope", "formula", "c = _rms_norm(a[:, :latent], kv_norm, eps)\n",
        "c = a[:, :latent] * torch.rsqrt((a * a).mean(-1, keepdim=True) + eps) * kv_norm.float()\n"),
    mla("query-not-normalised", "formula", "qr = _rms_norm(_product(h, q_a), q_norm, eps)\n", "qr = _product(h, q_a)\n"),
    mla("key-not-turned", "rope", "kp = _turned(a[:, None, latent:], batch, theta)[:, 0]\n", "kp = a[:, latent:]\n"),
    mla("position-off-by-one", "off by one", angle, angle.replace(".double()", ".double().add(1)")),
    mla("tables-in-bfloat16", "rounding", turned, turned.replace("torch.exp(1j * angle).to(torch.complex64)",
        "torch.complex(torch.cos(angle).bfloat16().float(), torch.sin(angle).bfloat16().float())"), discrepancy=32,
        dtypes=("float32",), why="in bfloat16 such a table is an intermediate in the dtype of h, which this contract permits; rope does not"),
    mla("theta-hard-coded", "attribute", angle, angle.replace("theta **", "1e6 **"), discrepancy=36),
    mla("eps-hard-coded", "eps", "def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:\n",
        "def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:\n    eps = 1e-5\n", discrepancy=36),
    mla("eps-missing", "eps", "def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:\n",
        "def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:\n    eps = 0.0\n"),
    mla("padding-to-slot-0", "padding", there, "pages[name][slots.clamp(min=0)] = rows.to(pages[name].dtype)", discrepancy=8),
    mla("cache-written-before-the-norm", "order", "_write(kv, batch, c, kp)\n", "_write(kv, batch, a[:, :latent], kp)\n"),
    mla("scale-folded-in", "scale", "return q_latent.to(h.dtype), q_rope.to(h.dtype)", "return (q_latent / 16).to(h.dtype), q_rope.to(h.dtype)",
        discrepancy=33),
    index("rope-in-halves", "rope", turned, half + turned, discrepancy=31),
    index("rope-on-the-last", "rope", "iq = torch.cat([_turned(iq[..., :width], batch, theta), iq[..., width:]], dim=-1)\n",
          "iq = torch.cat([iq[..., :-width], _turned(iq[..., -width:], batch, theta)], dim=-1)\n", discrepancy=31),
    index("key-not-turned", "rope", "        k = torch.cat([_turned(k[:, None, :width], batch, theta)[:, 0], k[:, width:]], dim=-1)\n", ""),
    index("norm-without-mean", "formula", key, "k = _rms_norm(_product(h, wk), k_norm, eps) + k_bias.float()\n"),
    index("bias-missing", "optional", key, key.replace("k_bias.float()", "None")),
    index("eps-hard-coded", "eps", key, key.replace("eps)", "1e-6)"), discrepancy=36),
    index("head-weights-rounded", "rounding", "return iq.to(qr.dtype), _product(h, w_head), keys",
          "return iq.to(qr.dtype), _product(h, w_head).to(h.dtype).float(), keys", dtypes=("bfloat16",), why=BF16_ONLY, discrepancy=33),
    index("head-weights-scaled", "scale", "return iq.to(qr.dtype), _product(h, w_head), keys",
          "return iq.to(qr.dtype), _product(h, w_head) * 32**-0.5, keys"),
    index("head-weights-in-bfloat16", "dtype", "return iq.to(qr.dtype), _product(h, w_head), keys",
          "return iq.to(qr.dtype), _product(h, w_head).bfloat16(), keys"),
    index("heads-inside", "heads", "iq = _product(qr, wq_b).unflatten(1, (-1, size))\n",
          "iq = _product(qr, wq_b).unflatten(1, (size, -1)).transpose(1, 2)\n", discrepancy=18),
    index("positions-in-request-order", "rows", angle, angle.replace("batch.native.positions[:, None, None]", "torch.arange(len(x))[:, None, None]")),
    index("theta-hard-coded", "attribute", angle, angle.replace("theta **", "1e6 **"), discrepancy=36),
    output("heads-inside", "heads", "return _product(values.flatten(1), w_o).to(o.dtype)\n",
           "return _product(values.transpose(1, 2).flatten(1), w_o).to(o.dtype)\n", discrepancy=18),
    output("heads-reversed", "heads", values, values.replace("w_uv.native.float()", "w_uv.native.float().flip(0)")),
    output("last-head-dropped", "heads", values, values + "        values[:, -1] = 0\n"),
    output("sum-in-bfloat16", "accumulator", "return _product(values.flatten(1), w_o).to(o.dtype)\n", """y = 0
        for n, part in enumerate(w_o.native.float().split(values.shape[2], 1)):
            y = (y + F.linear(values[:, n], part)).bfloat16().float()
        return y.to(o.dtype)\n"""),
    output("values-in-float16", "rounding", values, values[:-1] + ".half().float()\n", dtypes=("float32",),
           why="float16 holds more digits than the rounding to bfloat16 that the contract permits there, and no value here "
           "leaves its range", discrepancy=34),
    mtp("halves-swapped", "order", "torch.cat(halves, dim=-1)", "torch.cat(halves[::-1], dim=-1)"),
    mtp("norms-swapped", "order", halves, "halves = _rms_norm(e.float(), hnorm, eps), _rms_norm(g.float(), enorm, eps)\n"),
    mtp("hidden-not-normalised", "formula", halves, "halves = _rms_norm(e.float(), enorm, eps), g.float()\n"),
    mtp("one-norm-over-both", "formula", halves, """both = torch.cat([e, g], -1).float()
        both = both * torch.rsqrt((both * both).mean(-1, keepdim=True) + eps)
        halves = [p * w.float() for p, w in zip(both.chunk(2, -1), (enorm, hnorm))]\n"""),
    mtp("eps-missing", "eps", halves, halves.replace("eps", "0.0")),
    mtp("eps-hard-coded", "eps", halves, halves.replace("eps", "1e-5"), discrepancy=36),
    mtp("first-position-zeroed", "formula", "e: Tensor, g: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Weight, *, eps: float\n    ) -> Tensor:\n",
        "e: Tensor, g: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Weight, *, eps: float\n    ) -> Tensor:\n"
        "        e = torch.cat([torch.zeros_like(e[:1]), e[1:]])\n"),
    layer("shared-missing", "formula", shared, "y = torch.zeros(x.shape)\n", discrepancy=44),
    layer("shared-twice", "formula", shared, shared.replace("y = ", "y = 2 * "), discrepancy=44),
    layer("shared-gate-and-up-swapped", "preparation", shared,
          shared.replace("shared13.native)", "torch.cat([*shared13.native.chunk(2)][::-1]))")),
    layer("weights-ignored", "formula", routed, "y.index_add_(0, rows, out)\n"),
    layer("minus-one-is-the-last-expert", "-1", "rows, place = torch.nonzero(ids == e, as_tuple=True)\n",
          "rows, place = torch.nonzero(ids % w13.spec.shape[0] == e, as_tuple=True)\n", discrepancy=9),
    layer("first-choice-only", "experts", "rows, place = torch.nonzero(ids == e, as_tuple=True)\n",
          "rows, place = torch.nonzero(ids[:, :1] == e, as_tuple=True)\n"),
    layer("sum-in-bfloat16", "accumulator", routed, """for r, j, term in zip(rows.tolist(), place.tolist(), out):
                y[r] = (y[r] + weights[r, j] * term).bfloat16().float()\n"""),
    layer("last-expert-left-out", "off by one", "for e in range(w13.spec.shape[0]):\n", "for e in range(max(1, w13.spec.shape[0] - 1)):\n"),
]
