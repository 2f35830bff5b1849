"""Cambricon's own kernels: torch_mlu_ops, whose Python side, 1.12.1, states signatures, formulas and limits.

Arguments whose names differ from version to version go by place, as in vllm-mlu b992520, which calls older ones. Selections
are slots: pages of size one, for its attention.
"""

from __future__ import annotations

import torch
import torch_mlu  # noqa: F401  gives torch its device
from torch import Tensor

from porthal.backends.cambricon.calls import HALF, TMO, blocks, chosen, experts, product
from porthal.backends.cambricon.int8 import Int8
from porthal.backends.torch.interfaces.slots import Physical, int32_slots, joint, slots_of
from porthal.backends.torch.tables import StepPlan, angles, spliced
from porthal.backends.torch.vendor import Vendor
from porthal.hal import (
    Batch,
    Pages,
    Selection,
    Weight,
    any_of,
    at_least,
    at_most,
    limits,
    multiple_of,
    one_of,
    same_as,
)

HEADS = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}  # of one call of the attention, as vllm-mlu splits them


class Cambricon(Int8, Physical, Vendor):
    """An MLU. A cache lies as [pages, 1, size, width], of which the base's fields are views."""

    kind, engine = "mlu", "cncl"
    package, visible = "torch_mlu", "MLU_VISIBLE_DEVICES"

    # -- row by row --------------------------------------------------------------------------------------------------

    @limits(provider="torch_mlu_ops.fused_rms_norm", dtypes={"weight": same_as("x")})
    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        return TMO.fused_rms_norm(x, None, weight, None, None, eps, False, None, None, False)

    @limits(provider="torch_mlu_ops.fused_rms_norm", dtypes={"weight": same_as("x")})
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        y, r = TMO.fused_rms_norm(x, residual, weight, None, None, eps, True, None, None, False)
        return y, r

    @limits(provider="torch_mlu_ops.fused_layer_norm", dtypes={"weight": same_as("x"), "bias": same_as("x")})
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
        return TMO.fused_layer_norm(x, None, weight, bias, None, eps, False, None, None, False)

    @limits(provider="torch_mlu_ops.active")
    def silu_mul(self, x: Tensor) -> Tensor:
        return TMO.active(x, "silu", True)

    @limits(provider="torch_mlu_ops.apply_rotary", T=at_least(1), width=at_most(256))
    def rope(self, x: Tensor, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Tensor:
        """In float32, so that no table of bfloat16 is made of the angles, and on a copy, as it works in place. Sine first."""
        pairs = layout == "interleaved"
        sin, cos, place = batch.native.table(_turn, theta, width, pairs)
        part = x[None, :, :, start : start + width].to(torch.float32, copy=True)
        return spliced(x, TMO.apply_rotary(part, sin, cos, place, None, pairs, True, False, batch.T)[0], start)

    # -- experts -----------------------------------------------------------------------------------------------------

    @limits(provider="torch_mlu_ops.moe_sigmoid_topk", tie="any", n_group=1)
    def moe_route(
        self, logits: Tensor, bias: Tensor, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The sum, which may be 0, is divided by here, as the op adds nothing to it. Equal groups would be in its own order."""
        s, ids = TMO.moe_sigmoid_topk(logits.contiguous(), k, False, -1, 0, route_scale=1.0, score_bias=bias)
        return ids, scale * s / (s.sum(-1, keepdim=True) + 1e-20)

    @limits(provider="torch_mlu_ops.group_gemm")
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        return product(x, w, counts)

    @limits(provider="torch_mlu_ops.moe_combine_result", T=at_least(1))
    def moe_unpermute(self, sorted: Tensor, source: Tensor, weights: Tensor) -> Tensor:
        """A choice without a row takes a row that stands for none, which is zero then: what is behind the last is undefined."""
        M, filled = source.shape[0], source >= 0
        place = torch.where(filled, source, M).long()
        spare = (~filled).to(torch.int32).argmax().to(source.dtype)
        combine = spare.repeat(M + 1)
        combine[place] = torch.where(filled, torch.arange(M, dtype=source.dtype, device=source.device), spare)
        rows = torch.where(filled[:, None], sorted, 0)
        return TMO.moe_combine_result(
            rows, weights, combine[:-1], None, None, 0, 0, output=sorted.new_zeros(weights.shape[0], sorted.shape[1])
        )

    @limits(
        provider="torch_mlu_ops.moe_gen_idx+moe_expand_input+group_gemm+moe_active+moe_combine_result", T=at_least(1)
    )
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        return experts(x, w13, w2, ids - first_expert, weights)

    # -- paged cache -------------------------------------------------------------------------------------------------

    @limits(provider="torch_mlu_ops.reshape_paged_cache", T=at_least(1))
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        """Slots below 0 are passed over."""
        rows = first if second is None else torch.cat([first, second], dim=-1)
        [slots] = batch.native.table(int32_slots)
        TMO.reshape_paged_cache(rows[:, None].contiguous(), None, blocks(pages), None, slots)
        return pages

    # -- sparse attention --------------------------------------------------------------------------------------------

    @limits(
        provider="torch_mlu_ops.masked_indexer_select_paged_kv",
        tie="any",
        dtypes={"iq": HALF, "w": one_of("bfloat16", "float32"), "keys": same_as("iq")},
        G=at_most(64),
        D=128,
        block_size=any_of(one_of(1), multiple_of(16)),
    )
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        return chosen(iq, w, batch, k, scale, blocks(keys))

    @limits(provider="torch_mlu_ops.single_query_cached_kv_attn", C=512, R=64)
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        """Paged attention with pages of size one, of which each row has its own table."""
        slots, length = slots_of(sel, batch)
        slots = slots.clamp(min=0).contiguous()
        cache = joint(kv)[:, None, None]
        q = torch.cat([q_latent, q_rope], dim=-1)[:, None]
        out = torch.zeros_like(q_latent)[:, None]
        most = HEADS[q.dtype]
        for part, into in zip(q.split(most, dim=2), out.split(most, dim=2)):
            TMO.single_query_cached_kv_attn(
                part, cache, None, into, slots, length, None, None, None, sel.spec.k, -1, -1, scale, False,
                head_size_v=512, compute_dtype=torch.float32,
            )  # fmt: skip
        return torch.where(length[:, None, None] > 0, out[:, 0], 0)


def _turn(plan: StepPlan, theta: float, width: int, pairs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sines and cosines, float32 [T, width], and int32 [1, T]: which row of them is whose."""
    angle = angles(plan.positions, theta, width)
    angle = angle.repeat_interleave(2, dim=-1) if pairs else angle.repeat(1, 2)
    return angle.sin(), angle.cos(), torch.arange(len(angle), dtype=torch.int32, device=angle.device)[None]
