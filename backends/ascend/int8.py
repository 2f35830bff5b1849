"""Products of int8 codes: rows quantised one by one (int8_token), weights with a scale for each output (int8_channel)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from porthal.backends.ascend.calls import HALVES, NPU
from porthal.backends.ascend.experts import ENDS, GROUPS, INNER, PLACES, combined, groups_of, routed
from porthal.backends.ascend.prolog import in_tiles
from porthal.backends.ascend.rows import SOME
from porthal.hal import Quantised, QuantisedSpec, Weight, WeightSpec, at_most, limits, one_of
from porthal.hal.backend import Read

CHANNEL = "int8_channel"
TILES = "tiles"
GROUPED = "torch_npu.npu_dynamic_quant+npu_grouped_matmul"
EXPERTS = (
    "torch_npu.npu_moe_init_routing_v2+npu_grouped_matmul_swiglu_quant_v2+npu_format_cast+npu_grouped_matmul"
    "+npu_moe_token_unpermute"
)


class Int8:
    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        """Codes lie as [in, out], of which they are a view [out, in]; those of the experts' first product in tiles."""
        if spec.scheme != CHANNEL:
            weight: Weight = super().prepare(spec, read, into)  # type: ignore[misc]
            return weight
        native = super().prepare(spec, read).native  # type: ignore[misc]
        lying = native["codes"].transpose(-1, -2).contiguous()
        if (spec.op, spec.operand) == ("moe_experts", "w13"):
            packed = {TILES: in_tiles(lying), "scale": native["scale"]}
        else:
            packed = {"codes": lying.transpose(-1, -2), "scale": native["scale"]}
            if len(spec.shape) == 3 and spec.dtype == "bfloat16":
                packed |= _parted(native["codes"], native["scale"][..., 0])
        if into is None:
            return Weight(spec, packed)
        for name, part in packed.items():
            into.native[name].copy_(part)
        return into

    def to_logical(self, operand: Any) -> dict[str, np.ndarray[Any, Any]]:
        logical: dict[str, np.ndarray[Any, Any]] = super().to_logical(operand)  # type: ignore[misc]
        if isinstance(operand, Weight) and operand.spec.scheme == CHANNEL:
            codes = logical[TILES].swapaxes(-1, -2) if TILES in logical else logical["codes"]
            return {"codes": codes, "scale": logical["scale"]}
        return logical

    @limits(provider="torch_npu.npu_dynamic_quant", dtypes={"x": HALVES}, T=SOME, scheme="int8_token")
    def quantize(self, x: Tensor, *, scheme: str) -> Quantised:
        codes, scale = coded(x)
        return Quantised(QuantisedSpec(tuple(x.shape), scheme), {"codes": codes, "scale": scale[:, None]})

    @limits(
        provider="torch_npu.npu_dynamic_quant+npu_quant_matmul",
        schemes=CHANNEL,
        dtypes={"x": HALVES},
        T=SOME,
        K=INNER,
        N=INNER,
        out=one_of("x", "bfloat16", "float16"),
    )
    def linear(self, x: Tensor, w: Weight, *, out: str = "x") -> Tensor:
        codes, scale = quantised(x)
        y: Tensor = NPU.npu_quant_matmul(
            x1=codes,
            x2=w.native["codes"].transpose(0, 1),
            scale=w.native["scale"][:, 0],
            pertoken_scale=scale,
            output_dtype=x.dtype if out == "x" else getattr(torch, out),
        )
        return y

    @limits(provider=GROUPED, schemes=CHANNEL, dtypes={"x": HALVES}, T=SOME, N=GROUPS, K=INNER, M=INNER)
    def head_linear(self, x: Tensor, w: Weight) -> Tensor:
        """A head is a group, and all have as many rows."""
        T, heads, _ = x.shape
        codes, scale = quantised(x.transpose(0, 1).flatten(0, 1))
        ends = torch.arange(T, (heads + 1) * T, T, device=x.device)
        return _grouped(codes, scale, w, ends, x.dtype).unflatten(0, (heads, T)).transpose(0, 1)

    @limits(provider=GROUPED, schemes=CHANNEL, dtypes={"x": HALVES}, M=SOME, E=GROUPS, K=INNER, N=INNER)
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        return _grouped(*quantised(x), w, groups_of(counts.cumsum(0), len(x)), x.dtype)

    @limits(provider=EXPERTS, schemes=CHANNEL, dtypes={"x": "bfloat16"}, T=SOME, E=GROUPS, H=INNER, I=at_most(5120))
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        rows, places, ends, scale = routed(x, ids, w13.spec.shape[0], first_expert, PLACES, ENDS, quantised=True)
        M = len(rows)
        nobodys = torch.arange(M, device=x.device) >= ends[-1]
        groups = groups_of(ends, M)
        h, each = NPU.npu_grouped_matmul_swiglu_quant_v2(
            x=rows,
            weight=[w13.native[TILES]],
            weight_scale=[w13.native["scale"][..., 0]],
            x_scale=scale,
            group_list=groups,
            dequant_mode=0,
            dequant_dtype=0,  # this and the next: the schema's defaults are another product's
            quant_mode=0,
            quant_dtype=0,
            group_list_type=ENDS,
        )
        made = _grouped(h, each, w2, groups, x.dtype).masked_fill_(nobodys[:, None], 0)
        return combined(made, places % M, weights)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of rows and their float32 scales, for products: codes of a row of zeros are undefined, its scale is 0."""
    codes, scale = NPU.npu_dynamic_quant(input=x.contiguous())
    return codes, scale


def coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same to be kept: codes of a row of zeros, which say 0 whatever they are, are 0, so that a call repeats to the bit."""
    codes, scale = quantised(x)
    return codes.masked_fill_((scale == 0)[..., None], 0), scale


def _parted(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Scales [groups, out] as a column's largest, times what a float16 result has room for. A group whose scale is less than a
    millionth of another's in its column loses bits."""
    used = torch.where((codes == 0).all(-1), 0.0, scale)  # a column of zeros has any scale
    largest = torch.where(used.amax(0) > 0, used.amax(0), 1.0)
    return {"largest": largest, "part": (scale / largest).clamp(max=1.0) * (2 / codes.shape[-1])}


def _grouped(codes: Tensor, scale: Tensor, w: Weight, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """For bfloat16 results the op wants scales in bfloat16, which is too little: they are made of float16 ones, within whose
    range 2 / K keeps sums of K products."""
    wide = dtype == torch.bfloat16
    [y] = NPU.npu_grouped_matmul(
        x=[codes],
        weight=[w.native["codes"].transpose(1, 2)],
        scale=[w.native["part"] if wide else w.native["scale"][..., 0]],
        per_token_scale=None if wide else [scale],
        group_list=ends,
        split_item=2,
        group_type=0,
        group_list_type=ENDS,
        output_dtype=torch.float16,
    )
    made: Tensor = y
    if wide:
        made = y.float().mul_(codes.shape[1] / 2).mul_(w.native["largest"]).mul_(scale[:, None]).to(dtype)
    return made
