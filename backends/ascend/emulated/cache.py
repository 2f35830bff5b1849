"""Writing to a cache: rows by index, and the fused norm and rotation of MLA's keys."""

import torch

from porthal.backends.ascend.emulated.products import HALVES, normed, rotated_halves
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    need,
    need_absent,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

_LATENT, _ROPE = 512, 64


def npu_scatter_nd_update_(input, indices, updates):
    """input[indices[i]] = updates[i], in place; of rows that are written twice, one of them stays.

    Source: npu_scatter_nd_update_ page.
    """
    op = "npu_scatter_nd_update_"
    need_dtype(op, "input", input, torch.float32, *HALVES, torch.bool, torch.int64, torch.int8)
    need_dtype(op, "updates", updates, input.dtype)
    need_dtype(op, "indices", indices, torch.int32, torch.int64)
    need(1 <= input.dim() <= 8, op, "input.dim()", input.dim(), "1 to 8")
    need(indices.dim() >= 2, op, "indices.dim()", indices.dim(), "2 or more")
    depth = indices.shape[-1]
    need(1 <= depth <= input.dim(), op, "indices.shape[-1]", depth, f"1 to {input.dim()}")
    need_shape(op, "updates", updates, [*indices.shape[:-1], *input.shape[depth:]])
    at = indices.reshape(-1, depth).long()
    outside = ((at < 0) | (at >= torch.tensor(input.shape[:depth]))).any(1)
    need(not bool(outside.any()), op, "indices", at[outside].tolist(), f"within {list(input.shape[:depth])}")
    last = at.flip(0)  # the row with the lowest number is written last
    input.index_put_(tuple(last.unbind(1)), updates.reshape(len(at), *input.shape[depth:]).flip(0))
    return input


def npu_kv_rmsnorm_rope_cache(kv, gamma, cos, sin, index, k_cache, ckv_cache, *, k_rope_scale=None, c_kv_scale=None,
                              k_rope_offset=None, c_kv_offset=None, v=None, epsilon=1e-5, cache_mode="Norm",
                              is_output_kv=False):
    """As v2, and the two caches before its results: they are written although the schema does not say so.

    Source: npu_kv_rmsnorm_rope_cache page.
    """
    made = _kv_rmsnorm_rope_cache("npu_kv_rmsnorm_rope_cache", kv, gamma, cos, sin, index, k_cache, ckv_cache, k_rope_scale,
                                  c_kv_scale, k_rope_offset, c_kv_offset, v, epsilon, cache_mode, is_output_kv)
    return k_cache, ckv_cache, *made


def npu_kv_rmsnorm_rope_cache_v2(kv, gamma, cos, sin, index, k_cache, ckv_cache, *, k_rope_scale=None, c_kv_scale=None,
                                 k_rope_offset=None, c_kv_offset=None, v=None, epsilon=1e-5, cache_mode="Norm",
                                 is_output_kv=False, k_cache_dtype=None, ckv_cache_dtype=None):
    """Norm of kv[..., :512] to ckv_cache and rotation of kv[..., 512:] to k_cache at `index`; both again if asked for.

    The rotation leaves the numbers in npu_interleave_rope's order. Source: npu_kv_rmsnorm_rope_cache page and the
    vendor's test of it, test_npu_kv_rms_norm_rope_cache.py.
    """
    op = "npu_kv_rmsnorm_rope_cache_v2"
    need_absent(op, "not documented", k_cache_dtype=k_cache_dtype, ckv_cache_dtype=ckv_cache_dtype)
    return _kv_rmsnorm_rope_cache(op, kv, gamma, cos, sin, index, k_cache, ckv_cache, k_rope_scale, c_kv_scale,
                                  k_rope_offset, c_kv_offset, v, epsilon, cache_mode, is_output_kv)


def _kv_rmsnorm_rope_cache(op, kv, gamma, cos, sin, index, k_cache, ckv_cache, k_scale, c_scale, k_offset, c_offset, v,
                           epsilon, cache_mode, is_output_kv):
    need_absent(op, "documented, but this stand-in does not quantise", k_rope_scale=k_scale, c_kv_scale=c_scale)
    need_absent(op, "not supported yet", k_rope_offset=k_offset, c_kv_offset=c_offset)
    need_absent(op, "not documented", v=v)
    paged = cache_mode in ("PA", "PA_BNSD")
    need_one_of(op, "cache_mode", cache_mode, "Norm", "PA", "PA_BNSD")
    need(paged or not is_output_kv, op, "is_output_kv", is_output_kv, "False for the cache mode Norm")
    need_dtype(op, "kv", kv, *HALVES)
    need_rank(op, "kv", kv, 4)
    batch, _, length, _ = kv.shape
    need_shape(op, "kv", kv, [batch, 1, length, _LATENT + _ROPE])
    need_shape(op, "gamma", gamma, [_LATENT])
    for name, table in (("cos", cos), ("sin", sin)):
        need_shape(op, name, table, [batch, 1, length, _ROPE])
    caches = (("k_cache", k_cache, _ROPE), ("ckv_cache", ckv_cache, _LATENT))
    for name, tensor in (("gamma", gamma), ("cos", cos), ("sin", sin), ("k_cache", k_cache), ("ckv_cache", ckv_cache)):
        need_dtype(op, name, tensor, kv.dtype)
    need_dtype(op, "index", index, torch.int64)
    for name, cache, width in caches:
        need_rank(op, name, cache, 4)
        if paged:
            need_shape(op, name, cache, [*k_cache.shape[:2], 1, width])
        else:
            need_shape(op, name, cache, [batch, 1, k_cache.shape[2], width])
    at = index.flatten()
    if paged:
        blocks, size = k_cache.shape[:2]
        slots = blocks * size
        need(blocks >= -(-length // max(1, size)) * batch, op, "k_cache.shape[0]", blocks,
             f"{-(-length // max(1, size)) * batch} blocks or more: as many as {batch} sequences of {length} fill")
        need_shape(op, "index", index, [batch * length])
        place = (at // size, at % size)
    else:
        slots = k_cache.shape[2]
        need_shape(op, "index", index, [batch, length])
        place = (torch.arange(batch).repeat_interleave(length), at)
    need(bool(((at >= 0) & (at < slots)).all()), op, "index", index.tolist(), f"slots 0 to {slots - 1}")
    need(len(torch.stack(place).unique(dim=1).T) == len(at), op, "index", "twice the same slot",
         "each slot once, since what stays there is undefined")

    latent = normed(kv[..., :_LATENT].float(), gamma, epsilon)[0].to(kv.dtype)
    rope = rotated_halves(kv[..., _LATENT:], cos, sin).to(kv.dtype)
    for rows, (_, cache, width) in ((rope, caches[0]), (latent, caches[1])):
        (cache[:, :, 0] if paged else cache[:, 0])[place] = rows.reshape(-1, width)
    if is_output_kv:
        return rope, latent
    return garbage(rope.shape, kv.dtype), garbage(latent.shape, kv.dtype)
