"""FlashMLA as MATE ships it for Moore Threads: absorbed attention over chosen tokens, for prefill and for decode."""

import math
from dataclasses import dataclass

import torch

from porthal.backends.torch.emulation.stand_in import (
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

_WORKSPACE = 1 << 24  # gathered key elements held at once
_ROW = 656  # bytes of a packed key: 512 of float8_e4m3fn, 4 scales in float32, 64 of bfloat16


@dataclass
class FlashMLASchedMeta:
    """The schedule of `flash_mla_with_kvcache`, made by its first call and valid for equal shapes and lengths only."""

    @dataclass
    class Config:
        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None


def get_mla_metadata(*args, **kwargs):
    """An empty schedule and None. Arguments are those of an older interface, which this stand-in has not."""
    need(not args and not kwargs, "get_mla_metadata", "the call's arguments", [*args, *kwargs],
         "none: the schedule is made by the first flash_mla_with_kvcache")
    return FlashMLASchedMeta(), None


def _need_heads(op: str, heads: int) -> None:
    need(heads > 0 and heads % 64 == 0, op, "q's head count", heads,
         "a multiple of 64, since the kernel works on 64 heads at a time and checks no bound")


def _need_sink(op: str, sink: torch.Tensor | None, heads: int) -> None:
    if sink is not None:
        need_dtype(op, "attn_sink", sink, torch.float32)
        need_shape(op, "attn_sink", sink, [heads])


def _attend(q, keys, picked, length, scale, sink):
    """Attention of q[T, N, 576] over keys[picked[T, k]], of which the first length[T] count; -1 and numbers past the
    end are no keys. Returns o[T, N, 512], the largest logit and the natural log-sum-exp, -inf and +inf in an empty row.

    Columns behind the last key of the rows at hand are not gone through: most of a long selection is empty.
    A key behind the length is multiplied by zero, not skipped: the page says that its NaN is seen.
    """
    rows, heads, _ = q.shape
    out = torch.zeros(rows, heads, 512, dtype=q.dtype)
    largest, lse = torch.full((rows, heads), -math.inf), torch.full((rows, heads), math.inf)
    inside = (picked >= 0) & (picked < len(keys))
    counted = inside & (torch.arange(picked.shape[1]) < length[:, None])
    step = max(1, _WORKSPACE // (576 * max(1, picked.shape[1])))
    for a in range(0, rows, step):
        now = slice(a, a + step)
        held = inside[now].any(0).nonzero()
        at = now, slice(int(held[-1]) + 1 if len(held) else 1)
        k = torch.where(inside[at][..., None], keys[picked[at].clamp(0, max(0, len(keys) - 1))].float(), 0.0)
        logits = torch.einsum("tnd,tkd->tnk", q[now].float(), torch.where(counted[at][..., None], k, 0.0)) * scale
        logits = logits.masked_fill(~counted[at][:, None], -math.inf)
        top = logits.amax(-1)
        weight = torch.where(counted[at][:, None], (logits - top[..., None]).exp(), 0.0)
        total = weight.sum(-1)
        some = counted[at].any(1)[:, None].expand(-1, heads)
        o = torch.einsum("tnk,tkd->tnd", weight, k[..., :512]) / total[..., None]
        lse[now] = torch.where(some, top + total.log(), math.inf)
        largest[now] = torch.where(some, top, -math.inf)
        if sink is not None:
            o = o / (1 + (sink - lse[now]).exp())[..., None]
        out[now] = torch.where(some[..., None], o, 0.0).to(q.dtype)
    return out, largest, lse


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    """softmax(sm_scale q[s, h, 576] . kv[n, 1, 576]^T over indices[s, 1, k]) @ kv[..., :512]; max logits; natural lse."""
    op = "flash_mla_sparse_fwd"
    need(d_v == 512, op, "d_v", d_v, "512")
    for name, tensor in (("q", q), ("kv", kv), ("indices", indices)):
        need_rank(op, name, tensor, 3)
    need_dtype(op, "q", q, torch.bfloat16)
    need_dtype(op, "kv", kv, torch.bfloat16)
    need_dtype(op, "indices", indices, torch.int32)
    need_dense(op, q=q, kv=kv, indices=indices)
    rows, heads, width = q.shape
    need(width == 576, op, "q.shape[-1]", width, "576 (512 is another model's layout, which this stand-in has not)")
    need_shape(op, "kv", kv, [len(kv), 1, 576])
    topk = indices.shape[-1]
    need_shape(op, "indices", indices, [rows, 1, topk])
    need(topk > 0 and topk % 64 == 0, op, "indices.shape[-1]", topk, "a multiple of 64")
    _need_heads(op, heads)
    _need_sink(op, attn_sink, heads)
    length = torch.full((rows,), topk)
    if topk_length is not None:
        need_dtype(op, "topk_length", topk_length, torch.int32)
        need_shape(op, "topk_length", topk_length, [rows])
        length = topk_length
    out, largest, lse = _attend(q, kv[:, 0], indices[:, 0].long(), length, sm_scale, attn_sink)
    return out, largest, lse


def unpack(rows):
    """float32 keys [n, 576] of packed ones, uint8 [n, 656]: 512 codes, a scale for each 128 of them, 64 of bfloat16."""
    codes = rows[:, :512].contiguous().view(torch.float8_e4m3fn).float().view(-1, 4, 128)
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    return torch.cat([(codes * scales[..., None]).flatten(1), rows[:, 528:].contiguous().view(torch.bfloat16).float()], 1)


def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
                           softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None,
                           extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None):
    """Attention of q[b, s, h, 576] over indices[b, s, k], slots of a packed cache: out[b, s, h, 512], lse[b, h, s].

    `topk_length` is one number for each request, whatever s is. Source: MATE, flash_mla_interface.py.
    """
    op = "flash_mla_with_kvcache"
    schedule = tile_scheduler_metadata
    need(isinstance(schedule, FlashMLASchedMeta), op, "tile_scheduler_metadata", type(schedule).__name__,
         "the FlashMLASchedMeta of get_mla_metadata()")
    need_absent(op, "the schedule holds them", num_splits=num_splits)
    need(indices is not None, op, "indices", None, "a tensor (attention to every key is not in this stand-in)")
    need(not causal, op, "causal", causal, "False with indices")
    need(is_fp8_kvcache, op, "is_fp8_kvcache", is_fp8_kvcache, "True with indices: the sparse kernel reads packed keys only")
    need_absent(op, "keys of 576 have no second cache", extra_k_cache=extra_k_cache,
                extra_indices_in_kvcache=extra_indices_in_kvcache, extra_topk_length=extra_topk_length)
    need_rank(op, "q", q, 4)
    need_rank(op, "k_cache", k_cache, 4)
    need_rank(op, "indices", indices, 3)
    need_dtype(op, "q", q, torch.bfloat16)
    need_dtype(op, "k_cache", k_cache, torch.uint8, torch.int8, torch.float8_e4m3fn)
    need_dtype(op, "indices", indices, torch.int32)
    need_dense(op, q=q, k_cache=k_cache, indices=indices)
    requests, rows, heads, width = q.shape
    topk = indices.shape[-1]
    need(width == 576, op, "q.shape[-1]", width, "576 (512 is another model's layout, which this stand-in has not)")
    need(head_dim_v == 512, op, "head_dim_v", head_dim_v, "512")
    need_shape(op, "k_cache", k_cache, [*k_cache.shape[:2], 1, _ROW])
    need_shape(op, "indices", indices, [requests, rows, topk])
    need(topk > 0 and topk % 64 == 0, op, "indices.shape[-1]", topk, "a multiple of 64")
    _need_heads(op, heads)
    _need_sink(op, attn_sink, heads)
    length = torch.full((requests,), topk)
    if topk_length is not None:
        need_dtype(op, "topk_length", topk_length, torch.int32)
        need_shape(op, "topk_length", topk_length, [requests])
        length = topk_length
    config = FlashMLASchedMeta.Config(requests, rows, heads, k_cache.shape[1], 1, causal, is_fp8_kvcache, topk, None, None)
    if not schedule.have_initialized:
        schedule.have_initialized, schedule.config = True, config
        schedule.tile_scheduler_metadata, schedule.num_splits = length.clone(), torch.arange(requests + 1)
    need_one_of(op, "the call's shape", config, schedule.config)
    need(torch.equal(schedule.tile_scheduler_metadata, length), op, "topk_length", length.tolist(),
         f"the {schedule.tile_scheduler_metadata.tolist()} that the schedule was made for")
    out, _, lse = _attend(q.flatten(0, 1), unpack(k_cache.view(torch.uint8).view(-1, _ROW)),
                          indices.flatten(0, 1).long(), length.repeat_interleave(rows),
                          width**-0.5 if softmax_scale is None else softmax_scale, attn_sink)
    return out.unflatten(0, (requests, rows)), lse.unflatten(0, (requests, rows)).transpose(1, 2).contiguous()
