"""Cambricon's own kernels: torch_mlu_ops, whose Python side, 1.12.1, states signatures, formulas and limits.

Arguments whose names differ from version to version go by place, as in vllm-mlu b992520, which calls older ones. Selections
are slots: pages of size one, for its attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch_mlu  # noqa: F401  gives torch its device
from torch import Tensor

from porthal.backends.torch.interfaces.library import Library
from porthal.backends.torch.interfaces.packed import Packed
from porthal.backends.torch.interfaces.slots import Physical, Slots, joint, slots_of
from porthal.backends.torch.tables import angles
from porthal.backends.torch.vendor import Vendor
from porthal.hal import (
    Batch,
    Pages,
    Selection,
    SelectionSpec,
    Weight,
    any_of,
    at_least,
    at_most,
    limits,
    multiple_of,
    one_of,
    same_as,
)

NORM = "x residual gamma beta bias eps store_output_before_norm quant_scale out dynamic_quant /"
TMO = Library(
    "torch_mlu_ops",
    fused_rms_norm=NORM,
    fused_layer_norm=NORM,
    apply_rotary="input sin_cache cos_cache position_ids cu_seqlens interleaved discrete dynamic_ntk max_seqlen /",
    active="input act_mode is_gated /",
    moe_sigmoid_topk="input topk normalize num_expert_group topk_group / route_scale score_bias",
    moe_gen_idx="expert_id expert_num /",
    moe_expand_input="input gather_idx cusum_token_count start_expert_id expert_size / output",
    moe_active="input act_mode is_gated output bias cusum_token_count start_expert_id expert_size /",
    group_gemm="a b group_list expand_idx c alpha beta max_in_group_list / d",
    moe_combine_result="input reduce_weight gather_ids residual cusum_token_count start_expert_id expert_size / output",
    reshape_paged_cache="k v k_cache v_cache slot_mapping /",
    masked_indexer_select_paged_kv="query k_cache weights kv_cache_block_table cu_seq_q_lens cu_seq_k_lens k_context_lens "
    "k_cache_block_table is_prefill index_topk kv_cache_block_size softmax_scale q_scale k_scale_cache sparse_block_table "
    "sparse_context_lens",
    single_query_cached_kv_attn="q k_cache v_cache out block_tables context_lens k_cache_quant_scale v_cache_quant_scale "
    "alibi_slopes max_context_len windows_size_left windows_size_right softmax_scale return_lse / head_size_v compute_dtype",
)
HALF = one_of("bfloat16", "float16")
HEADS = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}  # of one call of the attention, as vllm-mlu splits them


class Cambricon(Physical, Packed, Vendor):
    """An MLU. A cache lies as [pages, 1, size, width], of which the base's fields are views."""

    kind, engine = "mlu", "cncl"

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
        angle = angles(batch.native.positions, theta, width)
        pairs = layout == "interleaved"
        angle = angle.repeat_interleave(2, dim=-1) if pairs else angle.repeat(1, 2)
        place = torch.arange(batch.T, dtype=torch.int32, device=x.device)[None]
        part = x[None, :, :, start : start + width].to(torch.float32, copy=True)
        y = TMO.apply_rotary(part, angle.sin(), angle.cos(), place, None, pairs, True, False, batch.T)
        return torch.cat([x[..., :start], y[0].to(x.dtype), x[..., start + width :]], dim=-1)

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
        return _product(x, w, counts)

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
        """As vllm-mlu's fused_moe. Rows of other ranks belong to an expert behind the last one, which is left out. The order
        of an expert's rows is not stated, so that `moe_permute`, which promises one, is the base's."""
        E = w13.native.shape[0]
        expand, combine, counts, ends = TMO.moe_gen_idx(_local(ids, E, first_expert), E + 1)
        rows = TMO.moe_expand_input(x, expand, ends, 0, E, output=x.new_zeros(ids.numel(), x.shape[1]))
        h = _product(rows, w13, counts[:E])
        h = TMO.moe_active(h, "silu", True, h.new_zeros(h.shape[0], h.shape[1] // 2), None, ends, 0, E)
        y = _product(h, w2, counts[:E])
        return TMO.moe_combine_result(y, weights, combine, None, ends, 0, E, output=torch.zeros_like(x))

    # -- paged cache -------------------------------------------------------------------------------------------------

    @limits(provider="torch_mlu_ops.reshape_paged_cache", T=at_least(1))
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        """Slots below 0 are passed over."""
        rows = first if second is None else torch.cat([first, second], dim=-1)
        TMO.reshape_paged_cache(rows[:, None].contiguous(), None, _blocks(pages), None, batch.native.int32_slots)
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
        """Its form for decoding, in which each row is a request of one: it alone reads a paged cache. It has 32 or 64 heads,
        so others are filled up with zeros, of weight zero."""
        plan, more = batch.native, (32 if iq.shape[1] <= 32 else 64) - iq.shape[1]
        slots = torch.empty((batch.T, 1, k), dtype=torch.int32, device=iq.device)
        length = torch.zeros_like(plan.visible)
        name = "masked_indexer_select_paged_kv"
        precise: dict[str, Any] = {"is_score_float": True} if TMO.takes(name, "is_score_float") else {}
        TMO.masked_indexer_select_paged_kv(
            query=F.pad(iq, (0, 0, 0, more))[:, None].contiguous(),
            k_cache=_blocks(keys),
            weights=F.pad(w, (0, more))[:, None, :, None].contiguous(),
            kv_cache_block_table=plan.row_table,
            cu_seq_q_lens=None,
            cu_seq_k_lens=None,
            k_context_lens=plan.visible,
            k_cache_block_table=plan.row_table,
            is_prefill=False,
            index_topk=k,
            kv_cache_block_size=batch.block_size,
            softmax_scale=scale,
            q_scale=None,
            k_scale_cache=None,
            sparse_block_table=slots,
            sparse_context_lens=length,
            **precise,
        )
        length = torch.minimum(length, plan.visible.clamp(max=k))  # what it says of a row without keys is not known
        return Selection(SelectionSpec(batch.T, k), Slots(slots[:, 0], length, plan.row_table, batch.block_size))

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


def _local(ids: Tensor, E: int, first_expert: int) -> Tensor:
    """int32 ids of the E local experts; E for any other."""
    local = ids - first_expert
    return torch.where((local >= 0) & (local < E), local, E).contiguous()


def _product(x: Tensor, w: Weight, counts: Tensor) -> Tensor:
    """Rows by expert, all of which may go to one; rows of none are zero."""
    out = x.new_zeros(x.shape[0], w.native.shape[1])
    return TMO.group_gemm(x.contiguous(), w.native, counts, None, None, None, None, x.shape[0], d=out)


def _blocks(pages: Pages) -> Tensor:
    """[pages, 1, size, width]: all fields of a slot side by side."""
    rows: Tensor = joint(pages) if len(pages.spec.fields) > 1 else pages[pages.spec.fields[0][0]]
    return rows.unflatten(0, (pages.spec.n_blocks, 1, pages.spec.block_size))
