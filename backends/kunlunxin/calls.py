"""kunlun_ops and xspeedgate_ops as kernels call them, and what kernels of numbers and of codes share."""

from __future__ import annotations

import torch
from torch import Tensor

from porthal.backends.torch.backend import Torch
from porthal.backends.torch.interfaces.library import Library
from porthal.hal import Weight, one_of

OPS = Library(
    "kunlun_ops",
    rmsnorm="x weight output eps /",
    add_rmsnorm="x y / residual_output weight eps output",
    swiglu="x y",
    rotary_embedding="positions query key head_size cos_sin_cache is_neox",
    moe_sigmoid_group_topk_norm="x norm_score topk_index block_static bias n_group topk_group scale",
    gen_block_statistic="topk_ids block_statistic /",
    moe_pre_sorted="x topk_index block_statistic moe_expand moe_index expert_m sorted_tokens_num_lod /",
    moe_fc="x weight sorted_tokens_num_lod sorted_tokens_idx moe_topk y x_perchannel_max w_perchannel_max",
    moe_post="x moe_index normed_scale dequant_scale y /",
    concat_and_cache_mla="kv_c k_pe slot_mapping kv_cache",
    fast_topkv2="score lengths topk",
    quant2d="x y max force_sdnn",
    matmul="x w out x_trans w_trans alpha beta x_pc_max w_pc_max",
    I8_paged_mqa_logits="q fused_kv_cache weights context_lens block_table max_context_len clean_logits out use_xfa_boost",
    fwd_kvcache_mla="q_c kv_cache indices kv_lod_cpu out max_logits p_sums softmax_scale max_seq_kv kv_lod_xpu",
)
GATE = Library(
    "xspeedgate_ops",
    moe_pre_small="topk_ids global_num_experts / index_have_neg sort_mode x",
    convert_req_index_to_global_index="req_id block_table token_indices block_size num_topk_tokens",
    indexer_k_quant_and_cache="k kv_cache slot_mapping quant_block_size scale_fmt /",
)
HALF = one_of("bfloat16", "float16")
SORTED = "kunlun_ops.gen_block_statistic+moe_pre_sorted+xspeedgate_ops.moe_pre_small+kunlun_ops"
UNITS = 12  # of a chip, each of which counts the rows per expert for itself
SMALL = 768  # rows up to which one call sorts them


def experts(chip: Torch, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor) -> Tensor:
    """Every place goes to an expert, as in vLLM-Kunlun: rows of an id of -1 would not be written. Places of other ranks
    are spread over the local ones and count nothing. The gate is a call of its own: act="SWISH_GLU" is wrong."""
    (T, k), E = ids.shape, w13.spec.shape[0]
    local = ids.remainder(E).contiguous()
    kept = local == ids
    x, weights = x.contiguous(), weights.contiguous()  # and so what is made like them
    place, ends, rows = _sorted(x, local, E)
    h = _product(rows, w13, ends, place, k)
    y = _product(chip.silu_mul(h), w2, ends, place, k)
    counted = torch.zeros_like(kept.flatten()).index_copy_(0, place.long(), kept.flatten())
    y = torch.where(counted[:, None], y, 0).view(T, k, -1)
    out = torch.zeros_like(x)
    OPS.moe_post(y, place.view(T, k), weights, torch.ones_like(weights), out)
    return out


def _sorted(x: Tensor, ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [T*k], the sorted place of each choice; int32 [E+1], where an expert's rows begin; the rows by expert."""
    if ids.numel() <= SMALL:
        place, ends, rows = GATE.moe_pre_small(ids, E, index_have_neg=False, sort_mode=True, x=x)
        return place, ends, rows.reshape(ids.numel(), x.shape[1])
    statistic = ids.new_zeros(UNITS, E)
    OPS.gen_block_statistic(ids, statistic)
    rows = x.new_empty(ids.numel(), x.shape[1])
    place, per_expert, ends = ids.new_zeros(ids.numel()), ids.new_zeros(E), ids.new_zeros(E + 1)
    OPS.moe_pre_sorted(x, ids, statistic, rows, place, per_expert, ends)
    return place, ends, rows


def _product(rows: Tensor, w: Weight, ends: Tensor, place: Tensor, k: int) -> Tensor:
    y = rows.new_zeros(rows.shape[0] // k, k, w.spec.shape[1])
    weight, tops = w.native, {"x_perchannel_max": None, "w_perchannel_max": None}
    if w.spec.quantised:
        rows, top = codes_of(rows)
        weight, tops = weight["codes"], {"x_perchannel_max": top, "w_perchannel_max": largest(w)}
    OPS.moe_fc(x=rows, weight=weight, sorted_tokens_num_lod=ends, sorted_tokens_idx=place, moe_topk=k, y=y, **tops)
    return y.flatten(0, 1)


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of rows, and the largest magnitude of each, float32: not a scale, which is 127 times smaller."""
    codes, top = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
    OPS.quant2d(x=x.contiguous(), y=codes, max=top, force_sdnn=False)
    return codes, top


def largest(w: Weight) -> Tensor:
    """Of each row of a weight's matrices."""
    return (w.native["scale"][..., 0] * 127).contiguous()
