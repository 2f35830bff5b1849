"""torch_mlu_ops as kernels call it, and what kernels of numbers and of codes share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.torch.interfaces.library import Library
from porthal.backends.torch.interfaces.slots import Slots, joint, row_table
from porthal.hal import Batch, Pages, Selection, SelectionSpec, Weight, one_of

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
    scaled_quantize="x / quant_type quant_mode",
    scaled_matmul="a b a_scale b_scale output_dtype / a_quant_bit_size",
    smooth_quant_group_gemm="a b m_list expand_idx c alpha beta a_scale b_scale dtype max_m / d",
    quant_to_paged_cache="k v k_cache v_cache k_cache_quant_scale v_cache_quant_scale slot_mapping /",
    masked_indexer_select_paged_kv="query k_cache weights kv_cache_block_table cu_seq_q_lens cu_seq_k_lens k_context_lens "
    "k_cache_block_table is_prefill index_topk kv_cache_block_size softmax_scale q_scale k_scale_cache sparse_block_table "
    "sparse_context_lens",
    single_query_cached_kv_attn="q k_cache v_cache out block_tables context_lens k_cache_quant_scale v_cache_quant_scale "
    "alibi_slopes max_context_len windows_size_left windows_size_right softmax_scale return_lse / head_size_v compute_dtype",
)
HALF = one_of("bfloat16", "float16")
EXPERTS = "torch_mlu_ops.moe_gen_idx+moe_expand_input+{}+moe_active+moe_combine_result"


def experts(x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor) -> Tensor:
    """As vllm-mlu's fused_moe. Rows of other ranks belong to an expert behind the last one, which is left out. The order
    of an expert's rows is not stated, so that `moe_permute`, which promises one, is the base's."""
    E = w13.spec.shape[0]
    expand, combine, counts, ends = TMO.moe_gen_idx(_local(ids, E), E + 1)
    rows = TMO.moe_expand_input(x, expand, ends, 0, E, output=x.new_zeros(ids.numel(), x.shape[1]))
    h = product(rows, w13, counts[:E])
    h = TMO.moe_active(h, "silu", True, h.new_zeros(h.shape[0], h.shape[1] // 2), None, ends, 0, E)
    y = product(h, w2, counts[:E])
    return TMO.moe_combine_result(y, weights, combine, None, ends, 0, E, output=torch.zeros_like(x))


def _local(ids: Tensor, E: int) -> Tensor:
    """int32 ids of the E local experts; E for any other."""
    return torch.where((ids >= 0) & (ids < E), ids, E).contiguous()


def product(x: Tensor, w: Weight, counts: Tensor) -> Tensor:
    """Rows by expert, all of which may go to one; rows of none are zero."""
    M = x.shape[0]
    out = x.new_zeros(M, w.spec.shape[1])
    if w.spec.quantised:
        codes, scale = codes_of(x)
        held = w.native["codes"], w.native["scale"][..., 0].contiguous()
        return TMO.smooth_quant_group_gemm(codes, held[0], counts, None, None, None, None, scale, held[1], x.dtype, M, d=out)
    return TMO.group_gemm(x.contiguous(), w.native, counts, None, None, None, None, M, d=out)


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of rows, and a float32 scale for each."""
    codes, scale = TMO.scaled_quantize(x.contiguous(), quant_type=torch.int8, quant_mode="dynamic_per_token")
    return codes, scale


def blocks(pages: Pages) -> Tensor:
    """[pages, 1, size, width]: all fields of a slot side by side."""
    rows: Tensor = joint(pages) if len(pages.spec.fields) > 1 else pages[pages.spec.fields[0][0]]
    return by_block(pages, rows)


def by_block(pages: Pages, rows: Tensor) -> Tensor:
    return rows.unflatten(0, (pages.spec.n_blocks, 1, pages.spec.block_size))


def chosen(
    iq: Tensor, w: Tensor, batch: Batch, k: int, scale: float, cache: Tensor, key_scale: Tensor | None = None
) -> Selection:
    """The indexer's form for decoding, in which each row is a request of one: it alone reads a paged cache. It has 32 or 64
    heads, so others are filled up with zeros, of weight zero. Where keys are codes, with scales, queries are too."""
    plan, more = batch.native, (32 if iq.shape[1] <= 32 else 64) - iq.shape[1]
    [pages] = plan.table(row_table)
    query, query_scale = F.pad(iq, (0, 0, 0, more))[:, None].contiguous(), None
    if key_scale is not None:
        query, query_scale = codes_of(query)
        query_scale = query_scale[..., None]
    slots = torch.empty((batch.T, 1, k), dtype=torch.int32, device=iq.device)
    length = torch.zeros_like(plan.visible)
    name = "masked_indexer_select_paged_kv"
    precise: dict[str, Any] = {"is_score_float": True} if TMO.takes(name, "is_score_float") else {}
    TMO.masked_indexer_select_paged_kv(
        query=query,
        k_cache=cache,
        weights=F.pad(w, (0, more))[:, None, :, None].contiguous(),
        kv_cache_block_table=pages,
        cu_seq_q_lens=None,
        cu_seq_k_lens=None,
        k_context_lens=plan.visible,
        k_cache_block_table=pages,
        is_prefill=False,
        index_topk=k,
        kv_cache_block_size=batch.block_size,
        softmax_scale=scale,
        q_scale=query_scale,
        k_scale_cache=key_scale,
        sparse_block_table=slots,
        sparse_context_lens=length,
        **precise,
    )
    length = torch.minimum(length.clamp(min=0), plan.visible.clamp(max=k))  # what it says of a row without keys is not known
    return Selection(SelectionSpec(batch.T, k), Slots(slots[:, 0], length, pages, batch.block_size))
