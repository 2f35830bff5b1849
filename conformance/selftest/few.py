"""Planted in the kernels that chips run apart for few rows, as in decoding: a rounding that is right for many."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest import attention, dense, rows
from porthal.conformance.selftest.planting import Defect

WHY = "the edit leaves float32 as it is"


def _cut(op: str, old: str, wide: str, x: str = "x", indent: int = 8) -> Defect:
    """Of up to 15 rows the float32 values `wide` are cut off, not rounded."""
    few = f"{x}.dtype == torch.bfloat16 and len({x}) < 16"
    new = f"y = {wide}\n{' ' * indent}return ((y.view(torch.int32) & -65536).view(torch.float32) if {few} else y).to({x}.dtype)\n"
    return Defect(op, "few-rows-cut-off", "rounding", old, new, dtypes=("bfloat16",), why=WHY)


rms = partial(rows.rms, dtypes=("bfloat16",), why=WHY)
turned = "[x[..., :start], y.to(x.dtype), x[..., start + width :]]"

DEFECTS = [
    _cut("rms_norm", rows.rms.keywords["old"], "_rms_norm(x.float(), weight, eps)"),
    _cut("layer_norm", "return (centred / torch.sqrt(variance + eps) * weight.float() + bias.float()).to(x.dtype)\n",
         "centred / torch.sqrt(variance + eps) * weight.float() + bias.float()"),
    _cut("silu_mul", rows.silu.keywords["old"], "F.silu(gate) * up", indent=4),
    _cut("add", rows.add.keywords["old"], "a.float() + b.float()", "a"),
    _cut("linear", dense.linear.keywords["old"], "F.linear(x.float(), w.native.float())", indent=12),
    _cut("head_linear", dense.head.keywords["old"], "torch.bmm(x.float().transpose(0, 1), w.native.float().transpose(1, 2)).transpose(0, 1)"),
    Defect("moe_unpermute", "few-rows-cut-off", "rounding", "    return y.to(sorted.dtype)\n", """    if T < 16 and sorted.dtype == torch.bfloat16:
        y = (y.view(torch.int32) & -65536).view(torch.float32)
    return y.to(sorted.dtype)\n""", dtypes=("bfloat16",), why=WHY),
    Defect("rope", "few-rows-cut-off", "rounding", turned, turned.replace(
        "y.to(x.dtype)", "((y.view(torch.int32) & -65536).view(torch.float32) if len(x) < 16 and x.dtype == torch.bfloat16 else y).to(x.dtype)"),
        dtypes=("bfloat16",), why=WHY),
    Defect("sparse_mla", "few-rows-cut-off", "rounding", attention.masked, attention.masked.replace(
        "torch.where(count[..., None] > 0, o, 0.0)", "(torch.where(count[..., None] > 0, o, 0.0).view(torch.int32) & (-65536 if len(o) < 16 else -1)).view(torch.float32)"),
        dtypes=("bfloat16",), why=WHY),
    rms("few-rows-away-from-zero", "rounding", new="""y = _rms_norm(x.float(), weight, eps)
        return ((y.view(torch.int32) + 65535 & -65536).view(torch.float32) if x.dtype == torch.bfloat16 and len(x) < 16 else y).to(x.dtype)\n"""),
    rms("weight-of-few-rows-in-the-dtype-of-x", "rounding",
        new="return _rms_norm(x.float(), weight.to(x.dtype) if len(x) < 64 else weight, eps).to(x.dtype)\n"),
]
