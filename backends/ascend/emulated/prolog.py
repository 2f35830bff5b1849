"""MLA's prolog in one call: both low ranks, their norms, the rotations and the write to the cache."""

import torch

from porthal.backends.ascend.emulated.products import need_nz, normed, rotated_halves, rounded
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_given,
    need_one_of,
    need_rank,
    need_shape,
)

_HIDDEN = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
_LATENT, _ROPE = 512, 64


def npu_mla_prolog_v3(token_x, weight_dq, weight_uq_qr, weight_uk, weight_dkv_kr, rmsnorm_gamma_cq, rmsnorm_gamma_ckv,
                      rope_sin, rope_cos, kv_cache, kr_cache, *, cache_index=None, dequant_scale_x=None,
                      dequant_scale_w_dq=None, dequant_scale_w_uq_qr=None, dequant_scale_w_dkv_kr=None, quant_scale_ckv=None,
                      quant_scale_ckr=None, smooth_scales_cq=None, actual_seq_len=None, k_nope_clip_alpha=None,
                      rmsnorm_epsilon_cq=1e-5, rmsnorm_epsilon_ckv=1e-5, cache_mode="PA_BSND", query_norm_flag=False,
                      weight_quant_mode=0, kv_cache_quant_mode=0, query_quant_mode=0, ckvkr_repo_mode=0,
                      quant_scale_repo_mode=0, tile_size=128, qc_qr_scale=1.0, kc_scale=1.0, token_x_dtype=None,
                      weight_dq_dtype=None, weight_uq_qr_dtype=None, weight_dkv_kr_dtype=None, kv_cache_dtype=None):
    """cq = norm(x dq); [qn, qr] = cq uq_qr per head; results qn uk, rotated qr, (none), cq if asked for, (none).

    norm(x dkv) goes to kv_cache and the rotated x kr to kr_cache at cache_index. Rotations leave numbers in
    npu_interleave_rope's order; x dq, cq and [qn, qr] are rounded to bfloat16. Results that were not asked for have no
    elements. Source: npu_mla_prolog_v3 page, unquantised; the heads' order and the roundings: the vendor's test of it,
    test_mla_prolog_v3.py.
    """
    op = "npu_mla_prolog_v3"
    need_absent(op, "this stand-in does not quantise", dequant_scale_x=dequant_scale_x, dequant_scale_w_dq=dequant_scale_w_dq,
                dequant_scale_w_uq_qr=dequant_scale_w_uq_qr, dequant_scale_w_dkv_kr=dequant_scale_w_dkv_kr,
                quant_scale_ckv=quant_scale_ckv, quant_scale_ckr=quant_scale_ckr, smooth_scales_cq=smooth_scales_cq,
                k_nope_clip_alpha=k_nope_clip_alpha, token_x_dtype=token_x_dtype, weight_dq_dtype=weight_dq_dtype,
                weight_uq_qr_dtype=weight_uq_qr_dtype, weight_dkv_kr_dtype=weight_dkv_kr_dtype, kv_cache_dtype=kv_cache_dtype)
    modes = (("weight_quant_mode", weight_quant_mode), ("kv_cache_quant_mode", kv_cache_quant_mode),
             ("query_quant_mode", query_quant_mode), ("ckvkr_repo_mode", ckvkr_repo_mode),
             ("quant_scale_repo_mode", quant_scale_repo_mode))
    for name, mode in modes:
        need_one_of(op, name, mode, 0)
    for name, factor in (("qc_qr_scale", qc_qr_scale), ("kc_scale", kc_scale)):
        need_one_of(op, name, factor, 1.0)
    need_absent(op, "the cache mode PA_BSND needs none", actual_seq_len=actual_seq_len)
    need_one_of(op, "cache_mode", cache_mode, "PA_BSND")
    need_given(op, cache_index=cache_index)

    need_rank(op, "token_x", token_x, 2, 3)
    *rows, hidden = token_x.shape
    rank = weight_dq.shape[-1]
    need_rank(op, "weight_uk", weight_uk, 3)
    heads, nope = weight_uk.shape[:2]
    need_one_of(op, "token_x.shape[-1]", hidden, *_HIDDEN)
    need_one_of(op, "weight_dq.shape[1]", rank, 1536, 2048)
    need_one_of(op, "weight_uk.shape[0]", heads, 1, 2, 4, 8, 16, 32, 64, 128)
    need_one_of(op, "weight_uk.shape[1]", nope, 128, 192)
    need(len(rows) == 1 or rows[0] <= 65536, op, "token_x.shape[0]", rows[0], "0 to 65536")
    shapes = {
        "token_x": (token_x, [*rows, hidden]), "weight_dq": (weight_dq, [hidden, rank]),
        "weight_uq_qr": (weight_uq_qr, [rank, heads * (nope + _ROPE)]), "weight_uk": (weight_uk, [heads, nope, _LATENT]),
        "weight_dkv_kr": (weight_dkv_kr, [hidden, _LATENT + _ROPE]), "rmsnorm_gamma_cq": (rmsnorm_gamma_cq, [rank]),
        "rmsnorm_gamma_ckv": (rmsnorm_gamma_ckv, [_LATENT]), "rope_sin": (rope_sin, [*rows, _ROPE]),
        "rope_cos": (rope_cos, [*rows, _ROPE]), "kv_cache": (kv_cache, [*kv_cache.shape[:2], 1, _LATENT]),
        "kr_cache": (kr_cache, [*kv_cache.shape[:2], 1, _ROPE]),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        need_dtype(op, name, tensor, torch.bfloat16)
        need_shape(op, name, tensor, shape)
        need_dense(op, **{name: tensor})
    for name, weight in (("weight_dq", weight_dq), ("weight_uq_qr", weight_uq_qr), ("weight_dkv_kr", weight_dkv_kr)):
        need_nz(op, name, weight)
    blocks, size = kv_cache.shape[:2]
    need(size % 16 == 0 and 16 <= size <= 1024, op, "kv_cache.shape[1]", size, "a multiple of 16 up to 1024")
    need_dtype(op, "cache_index", cache_index, torch.int64)
    need_shape(op, "cache_index", cache_index, rows)
    need_dense(op, cache_index=cache_index)
    at = cache_index.flatten()
    need(bool(((at >= 0) & (at < blocks * size)).all()), op, "cache_index", at.tolist(), f"slots 0 to {blocks * size - 1}")

    x, cos, sin = token_x.reshape(-1, hidden).float(), rope_cos.reshape(-1, 1, _ROPE), rope_sin.reshape(-1, 1, _ROPE)
    bf16 = torch.bfloat16
    cq = normed(rounded(x @ weight_dq.float(), bf16), rmsnorm_gamma_cq, rmsnorm_epsilon_cq)[0].to(bf16)
    q = rounded(cq.float() @ weight_uq_qr.float(), bf16).reshape(-1, heads, nope + _ROPE)
    query = torch.einsum("thd,hdc->thc", q[..., :nope], weight_uk.float())
    query_rope = rotated_halves(q[..., nope:], cos, sin)
    kv = x @ weight_dkv_kr.float()
    kv_cache.view(-1, _LATENT)[at] = normed(kv[:, :_LATENT], rmsnorm_gamma_ckv, rmsnorm_epsilon_ckv)[0].to(bf16)
    kr_cache.view(-1, _ROPE)[at] = rotated_halves(kv[:, _LATENT:], cos[:, 0], sin[:, 0]).to(bf16)
    none = garbage([0], torch.float32)
    return (query.to(bf16).reshape(*rows, heads, _LATENT), query_rope.to(bf16).reshape(*rows, heads, _ROPE), none,
            cq.reshape(*rows, rank) if query_norm_flag else garbage([0], bf16), none.clone())
