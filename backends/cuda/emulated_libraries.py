"""Stand-ins of DeepGEMM and FlashMLA as modules, on tensors of the CPU: a GPU of compute capability 9.0 that is not here.

Signatures and checks are those of deepseek-ai/DeepGEMM 0274ad7 (csrc/apis/gemm.hpp, layout.hpp, attention.hpp) and
deepseek-ai/FlashMLA 02fe0d0 (flash_mla_interface.py, README). Where Moore Threads' MATE ships the same function, that
stand-in computes it. What is left undefined comes back as NaN. Results are from an emulation, never from hardware.
"""

import torch

from porthal.backends.moore_threads.emulated import attention, indexer, products
from porthal.backends.torch.emulation.stand_in import (
    counted,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_rank,
    need_shape,
    publish,
)

PROCESSORS = 132
_BF16 = torch.bfloat16
_E4M3 = torch.float8_e4m3fn


def get_num_sms():
    return PROCESSORS


def get_mk_alignment_for_contiguous_layout():
    return 128


def _rows_of_16_bytes(op, **tensors):
    """TMA reads rows that begin at multiples of 16 bytes."""
    for name, x in tensors.items():
        need(x.stride(-2) * x.element_size() % 16 == 0, op, f"{name}.stride(-2)", x.stride(-2), "whole blocks of 16 bytes")


def m_grouped_bf16_gemm_nt_contiguous(a, b, d, grouped_layout, compiled_dims="nk", use_psum_layout=False,
                                      ensure_zero_padding=True, expected_m_for_psum_layout=None):
    """Rows of an expert begin at multiples of 128; what belongs to rows of -1 is left undefined."""
    op = "m_grouped_bf16_gemm_nt_contiguous"
    need(not use_psum_layout, op, "use_psum_layout", use_psum_layout, "False (not in this stand-in)")
    for name, x in (("a", a), ("b", b), ("d", d)):
        need_dtype(op, name, x, _BF16)
    _rows_of_16_bytes(op, a=a, b=b, d=d)
    products.m_grouped_bf16_gemm_nt_contiguous(a, b, d, grouped_layout, alignment_m=128)


def _eight_bits(op, a, b, d, c, others, disable_ue8m0_cast, *of_d):
    need_absent(op, "not in this stand-in", c=c, **others)
    need(isinstance(disable_ue8m0_cast, bool), op, "disable_ue8m0_cast", disable_ue8m0_cast, "a bool")
    need_dtype(op, "a[0]", a[0], _E4M3)
    need_dtype(op, "b[0]", b[0], _E4M3)
    need_dtype(op, "d", d, *of_d)
    _rows_of_16_bytes(op, **{"a[0]": a[0], "b[0]": b[0], "d": d})


def fp8_gemm_nt(a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk", disable_ue8m0_cast=False,
                alpha=None):
    """d[m, n] of codes with a float32 scale for 128 of a row of `a` and for 128 x 128 of `b`."""
    op, (codes, _) = "fp8_gemm_nt", a
    others = {"recipe": recipe, "recipe_a": recipe_a, "recipe_b": recipe_b, "alpha": alpha}
    _eight_bits(op, a, b, d, c, others, disable_ue8m0_cast, _BF16, torch.float32)
    if len(codes):  # nothing is looked at, and nothing done, where there are no rows
        made = torch.empty(d.shape, dtype=_BF16)
        products.fp8_gemm_nt(a, b, made)
        d.copy_(made)


def m_grouped_fp8_gemm_nt_contiguous(a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk",
                                     disable_ue8m0_cast=False, use_psum_layout=False, ensure_zero_padding=True,
                                     expected_m_for_psum_layout=None):
    op = "m_grouped_fp8_gemm_nt_contiguous"
    need(not use_psum_layout, op, "use_psum_layout", use_psum_layout, "False (not in this stand-in)")
    others = {"recipe": recipe, "recipe_a": recipe_a, "recipe_b": recipe_b}
    _eight_bits(op, a, b, d, None, others, disable_ue8m0_cast, _BF16)
    products.m_grouped_fp8_gemm_nt_contiguous(a, b, d, grouped_layout, alignment_m=128)


def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices=None):
    """The schedule of these lengths, [b, next_n]; int32 [num_sms + 1, 2]."""
    op = "get_paged_mqa_logits_metadata"
    need_absent(op, "not in this stand-in", indices=indices)
    need_rank(op, "context_lens", context_lens, 2)
    need_dtype(op, "context_lens", context_lens, torch.int32)
    need_dense(op, context_lens=context_lens)
    need(block_kv == 64, op, "block_kv", block_kv, "64 (32 is not in this stand-in)")
    need(num_sms > 0, op, "num_sms", num_sms, "1 or more")
    return indexer._schedule(indexer._largest(context_lens), num_sms)


def fp8_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits=False,
                         indices=None):
    """Lengths have two axes, a schedule is that of get_num_sms(), and nothing is cleaned."""
    op = "fp8_paged_mqa_logits"
    need_absent(op, "not in this stand-in", indices=indices)
    need(clean_logits is False, op, "clean_logits", clean_logits, "False: cleaning is not supported for paged logits")
    need_rank(op, "context_lens", context_lens, 2)
    need_shape(op, "schedule_meta", schedule_meta, [PROCESSORS + 1, 2])
    return indexer.fp8_paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, False)


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    """64 or 128 heads, and whole blocks of 128 places."""
    op = "flash_mla_sparse_fwd"
    need(q.shape[1] in (64, 128), op, "q's head count", q.shape[1], "64 or 128")
    need(indices.shape[-1] % 128 == 0, op, "indices.shape[-1]", indices.shape[-1], "a multiple of 128")
    return attention.flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink, topk_length)


def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
                           softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None,
                           extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None):
    op = "flash_mla_with_kvcache"
    need(q.shape[2] in (64, 128), op, "q's head count", q.shape[2], "64 or 128")
    return attention.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale, causal,
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)


def install():
    """Put both modules where imports find them."""
    deep_gemm = (get_num_sms, get_mk_alignment_for_contiguous_layout, m_grouped_bf16_gemm_nt_contiguous, fp8_gemm_nt,
                 m_grouped_fp8_gemm_nt_contiguous, get_paged_mqa_logits_metadata, fp8_paged_mqa_logits)
    flash_mla = (flash_mla_sparse_fwd, flash_mla_with_kvcache, attention.get_mla_metadata)
    for name, functions in (("deep_gemm", deep_gemm), ("flash_mla", flash_mla)):
        publish(name, __doc__, {f.__name__: counted(f.__name__, f) for f in functions})
