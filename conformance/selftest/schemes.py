"""Planted in codes and scales: weights, caches and activations of few bits."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from collections.abc import Iterator

from porthal.conformance.selftest.planting import Defect

BF16_ONLY = "in float32 the edit rounds to the dtype that the value has"
said8 = "return codes.view(torch.float8_e4m3fn).float()\n"
power = "return torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.int() - 127)\n"
said4 = "return torch.where(codes > 7, -size, size)\n"
plain = "    return codes.float()\n"
number = "return _said(self.scheme.codes, self.codes) * _spread(self.scheme, scale, self.codes.shape)\n"
whole = "scale = scale * self.whole[..., None]\n"
spread = "scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])\n"
axes = "for axis, size in zip((-2, -1), scheme.block):\n"
kept = "if not scheme.other:\n"
heads = "heads = taken(scheme_of(w.spec.scheme), x).unbind(1)\n"
matrix = "return Coded(scheme_of(w.spec.scheme), **{name: part[e] for name, part in w.native.items()}).numbers()\n"
experts = "made = [F.linear(part, _matrix(w, e)) for e, part in enumerate(rows[:-1]) if len(part)]\n"
linear = "found.append(F.linear(wide, part.numbers()).to(dtype))\n"
padded = "blocks = F.pad(wide, (0, -wide.shape[-1] % columns)).unflatten(-1, (-1, columns))\n"
largest = "amax, top = blocks.abs().amax(-1), TOP[scheme.codes]\n"
floor = "held = (torch.frexp(amax).exponent - 1 - 2 + 127)"
scaled = "scale = torch.where(amax > 0, amax / top, 1.0)\n"
ratio = "ratio = (blocks / scale.float()[..., None])"
nearest = "return ratio.round().to(torch.int8)\n"
coded8 = "return ratio.to(torch.float8_e4m3fn).view(torch.uint8)\n"
coded4 = "at = torch.ldexp(ratio.abs(), 1 - exponent).round() + 2 * exponent\n"
written = "pages[scale].index_copy_(0, slots, held[scale])\n"
cached = 'return cls(scheme, pages[name], pages[f"{name}_scale"])\n'
chosen = "return Coded(self.scheme, *(x.index_select(axis, at) for x in (self.codes, self.scale))).numbers()\n"
result = 'return {"codes": _code(scheme.codes, ratio), "scale": held}\n'

WEIGHTS = ("linear", "head_linear", "grouped_gemm")
READERS = (*WEIGHTS, "indexer_scores", "sparse_mla", "dequantize")
WRITERS = ("quantize", "kv_write")
ROWS = (*WEIGHTS, "indexer_scores")  # of products whose other operand is quantised

# Name, kind, the edit, and the ops in which it is planted.
EDITS = (
    ("e4m3-as-e5m2", "format", said8, "return codes.view(torch.float8_e5m2).float()\n", ("linear", "sparse_mla", "indexer_scores", "dequantize")),
    ("e4m3-with-the-other-bias", "format", said8, "return codes.view(torch.float8_e4m3fnuz).float()\n", ("grouped_gemm", "sparse_mla", "dequantize")),
    ("denormal-codes-flushed", "format", said8, "y = codes.view(torch.float8_e4m3fn).float()\n        return torch.where(y.abs() < 2**-6, 0.0, y)\n", ("dequantize", "linear")),
    ("e8m0-off-by-one", "format", power, power.replace("127", "128"), ("linear", "dequantize", "quantize")),
    ("e8m0-in-float16", "overflow", power, power.replace("codes.int() - 127", "(codes.int() - 127).clamp(-24, 15)"), ("dequantize",)),
    ("sign-of-e2m1-lost", "format", said4, "return size\n", ("linear", "grouped_gemm", "dequantize")),
    ("e2m1-as-int4", "format", said4, "return ((codes.int() + 8) % 16 - 8).float()\n", ("linear", "head_linear", "dequantize")),
    ("int8-as-uint8", "format", plain, "    return codes.view(torch.uint8).float() if codes.dtype == torch.int8 else codes.float()\n", ("linear", "indexer_scores", "sparse_mla", "dequantize")),
    ("scale-in-bfloat16", "scale", plain, "    return codes.bfloat16().float()\n", READERS),
    ("scale-in-float16", "scale", plain, "    return codes.half().float()\n", ("linear", "dequantize")),
    ("scale-to-a-power-of-two", "scale", plain, "    return codes.float() if codes.dtype != torch.float32 else torch.ldexp(torch.ones_like(codes), torch.frexp(codes).exponent - 1)\n", READERS),
    ("second-scale-ignored", "scale", whole, "scale = scale * 1\n", ("linear", "grouped_gemm")),
    ("second-scale-of-the-first-row", "scale", whole, "scale = scale * self.whole[..., :1, None]\n", ("linear", "grouped_gemm")),
    ("second-scale-divides", "scale", whole, "scale = scale / self.whole[..., None]\n", ("linear", "head_linear")),
    ("divided-by-the-scale", "scale", number, number.replace(") * _spread", ") / _spread"), ("linear", "sparse_mla", "dequantize")),
    ("numbers-in-bfloat16", "rounding", number, f"return ({number[7:-1]}).bfloat16().float()\n", ("linear", "grouped_gemm", "indexer_scores")),
    ("codes-unscaled", "scale", number, "return _said(self.scheme.codes, self.codes) * scale.mean()\n", ("linear", "sparse_mla")),
    ("scales-transposed", "block", axes, "for axis, size in zip((-1, -2), scheme.block):\n", ("linear", "grouped_gemm")),
    ("blocks-from-the-end", "ragged", spread, spread.replace("narrow(axis, 0, shape[axis])", "narrow(axis, scale.shape[axis] * size - shape[axis], shape[axis])"), ("linear", "grouped_gemm", "dequantize", "sparse_mla")),
    ("ragged-block-of-the-one-before", "ragged", spread, "full = max(1, shape[axis] // size)\n            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, min(shape[axis], full * size))\n            scale = torch.cat([scale, *[scale.narrow(axis, -1, 1)] * (shape[axis] - scale.shape[axis])], axis)\n", ("linear", "head_linear", "dequantize")),
    ("first-block-for-all", "block", spread, "scale = scale.narrow(axis, 0, 1).repeat_interleave(shape[axis], axis)\n", ("linear", "sparse_mla", "dequantize", "head_linear")),
    ("blocks-in-turns", "block", spread, spread.replace("repeat_interleave(size, axis)", "repeat(*[size if a == scale.ndim + axis else 1 for a in range(scale.ndim)])"), ("linear", "grouped_gemm", "sparse_mla", "dequantize")),
    ("activations-not-quantised", "activations", kept, "if True:\n", ROWS),
    ("heads-share-a-scale", "activations", heads, "heads = taken(scheme_of(w.spec.scheme), x.flatten(1)).view(x.shape).unbind(1)\n", ("head_linear",)),
    ("scale-of-another-matrix", "experts", matrix, matrix.replace("part[e]", "part[e - (name == 'scale')]"), ("grouped_gemm", "head_linear")),
    ("scale-of-the-first-matrix", "experts", matrix, matrix.replace("part[e]", "part[e * (name != 'scale')]"), ("grouped_gemm", "head_linear")),
    ("empty-experts-passed-over", "experts", experts, experts.replace("enumerate(rows[:-1]) if len(part)", "enumerate([r for r in rows[:-1] if len(r)])"), ("grouped_gemm",)),
    ("multiplied-in-bfloat16", "accumulator", linear, "found.append(F.linear(wide.bfloat16(), part.numbers().bfloat16()).to(dtype))\n", ("linear",)),
    ("last-column-dropped", "dropped", linear, "found.append(F.linear(wide[:, :-1], part.numbers()[:, :-1]).to(dtype))\n", ("linear",)),
    ("padding-counts", "padding", padded, padded.replace("% columns)", "% columns), value=9.0"), ("quantize", "kv_write", "linear")),
    ("largest-positive", "scale", largest, largest.replace("blocks.abs()", "blocks"), (*WRITERS, "linear")),
    ("scale-for-the-whole-tensor", "block", largest, "amax, top = blocks.abs().amax().expand(blocks.shape[:-1]) if blocks.numel() else blocks.abs().amax(-1), TOP[scheme.codes]\n", (*WRITERS, *ROWS)),
    ("one-more-than-the-largest-code", "scale", scaled, scaled.replace("amax / top", "amax / (top + 1)"), (*WRITERS, "linear")),
    ("half-a-code-more", "scale", scaled, scaled.replace("amax / top", "amax / (top + 0.5)"), WRITERS),
    ("least-scale", "scale", scaled, scaled.replace("amax / top", "amax.clamp(min=1e-4) / top"), (*WRITERS, "indexer_scores")),
    ("scale-stored-in-bfloat16", "scale", scaled, scaled.replace("amax / top, 1.0)", "amax / top, 1.0).bfloat16().float()"), WRITERS),
    ("scale-rounded-up-to-a-power", "scale", scaled, "scale = torch.where(amax > 0, torch.exp2(torch.ceil(torch.log2(amax / top))), 1.0)\n", (*WRITERS, *ROWS)),
    ("ceiling-rule", "scale", floor, floor.replace("exponent - 1", "exponent"), ("quantize",)),
    ("rounding-rule", "scale", floor, "held = (torch.frexp(amax).exponent - 1 + (torch.frexp(amax).mantissa >= 0.875) - 2 + 127)", ("quantize",)),
    ("quotient-by-a-reciprocal-in-bfloat16", "rounding", ratio, "ratio = (blocks * (1 / scale.float()).bfloat16().float()[..., None])", (*WRITERS, "linear")),
    ("quotient-in-the-dtype-of-x", "rounding", ratio, "ratio = (blocks / scale.float()[..., None]).to(x.dtype).float()", WRITERS),
    ("codes-cut-off", "rounding", nearest, "return ratio.trunc().to(torch.int8)\n", (*WRITERS, "linear", "indexer_scores")),
    ("codes-rounded-down", "rounding", nearest, "return ratio.floor().to(torch.int8)\n", ("quantize", "grouped_gemm")),
    ("half-away-from-zero", "ties", nearest, "return (ratio.sign() * (ratio.abs() + 0.5).floor()).to(torch.int8)\n", WRITERS),
    ("seven-bits", "format", nearest, "return (ratio / 2).round().mul(2).clamp(-126, 126).to(torch.int8)\n", ("quantize", "indexer_scores")),
    ("e4m3-cut-off", "rounding", coded8, "y = ratio.to(torch.float8_e4m3fn).float()\n        bits = ratio.to(torch.float8_e4m3fn).view(torch.uint8)\n        return torch.where(y.abs() > ratio.abs(), bits - 1, bits)\n", (*WRITERS, "linear")),
    ("denormals-coded-as-zero", "format", coded8, "return torch.where(ratio.abs() < 2**-6, 0.0, ratio).to(torch.float8_e4m3fn).view(torch.uint8)\n", WRITERS),
    ("e2m1-ties-to-zero", "ties", coded4, coded4.replace(".round()", ".sub(0.5).ceil()"), ("quantize",)),
    ("e2m1-ties-away", "ties", coded4, coded4.replace(".round()", ".add(0.5).floor()"), ("quantize",)),
    ("scales-not-written", "outside", written, "pass\n", ("kv_write",)),
    ("scale-of-the-row-before", "rows", written, written.replace("held[scale])", "held[scale].roll(1, 0))"), ("kv_write",)),
    ("scale-one-slot-on", "off by one", written, written.replace("slots, ", '(slots + 1) % pages.spec.slots, '), ("kv_write",)),
    ("tiles-reversed", "block", cached, cached.replace('_scale"])', '_scale"].flip(-1))'), ("sparse_mla",)),
    ("scale-of-the-first-row", "rows", chosen, "codes, scale = (x.index_select(axis, at) for x in (self.codes, self.scale))\n        return Coded(self.scheme, codes, scale[:1].expand(scale.shape)).numbers()\n", ("sparse_mla", "indexer_scores")),
    ("scales-of-the-next-row", "rows", result, 'return {"codes": _code(scheme.codes, ratio), "scale": held.roll(1, 0)}\n', ("quantize", "linear")),
)  # fmt: skip
IN_BFLOAT16 = ("quotient-in-the-dtype-of-x",)


def _planted() -> Iterator[Defect]:
    for name, kind, old, new, ops in EDITS:
        one = {"dtypes": ("bfloat16",), "why": BF16_ONLY} if name in IN_BFLOAT16 else {}
        for op in ops:
            yield Defect(op, f"scheme-{name}", kind, old, new, source="schemes", **one)  # type: ignore[arg-type]


DEFECTS = list(_planted())
