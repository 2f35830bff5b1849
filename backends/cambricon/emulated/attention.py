"""torch_mlu_ops: attention of single queries to a paged cache, and the indexer's choice of what they attend to."""

import math
from itertools import pairwise

import torch

from porthal.backends.cambricon.emulated.vectors import FLOATS
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    highest,
    lengths,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

_WORKSPACE = 1 << 24  # scores, or gathered key elements, held at once


def single_query_cached_kv_attn(q, k_cache, v_cache, out, block_tables, context_lens, k_cache_quant_scale,
                                v_cache_quant_scale, alibi_slopes, max_context_len, windows_size_left, windows_size_right,
                                softmax_scale, return_lse=False, kv_cache_quant_bit_size=-1, q_quant_scale=None,
                                out_quant_scale=None, out_dtype=torch.float16, compute_dtype=torch.float32, head_size_v=-1,
                                mask=None, cu_seq_q=None, max_seq_q=-1, sink=None):
    """softmax(softmax_scale q[b, 1, N, D] . k^T) v over the first context_lens[b] tokens of block_tables[b].

    Without v_cache the values are the first elements of the keys, as many as `out` is wide, or head_size_v without `out`.
    A row without tokens, and one of more than max_context_len, is left undefined. Log-sum-exp is natural, [b, N, 1].
    """
    op = "single_query_cached_kv_attn"
    need_absent(op, "not in this stand-in", v_cache=v_cache, v_cache_quant_scale=v_cache_quant_scale,
                alibi_slopes=alibi_slopes, q_quant_scale=q_quant_scale, mask=mask, cu_seq_q=cu_seq_q, sink=sink)
    need_absent(op, "it is reserved", out_quant_scale=out_quant_scale)
    need_rank(op, "q", q, 4)
    need_rank(op, "k_cache", k_cache, 4)
    need_dtype(op, "q", q, *FLOATS)
    requests, rows, heads, width = q.shape
    need(rows == 1, op, "q.shape[1]", rows, "1 (more queries of a request are not in this stand-in)")
    blocks, kv_heads, size, _ = k_cache.shape
    need(kv_heads == 1, op, "k_cache.shape[1]", kv_heads, "1 (more key heads are not in this stand-in)")
    need_shape(op, "k_cache", k_cache, [blocks, 1, size, width])
    need_one_of(op, "k_cache.shape[2]", size, 1, 2, 4, 8, 16, 32, 64)
    most = 256 if k_cache.dtype == torch.bfloat16 else 128
    need(heads <= most, op, "q's head count", heads, f"{most} at most with keys of {k_cache.dtype}: split the heads")
    need_dense(op, k_cache=k_cache, block_tables=block_tables)
    if k_cache.dtype == torch.int8:
        need(kv_cache_quant_bit_size == 8, op, "kv_cache_quant_bit_size", kv_cache_quant_bit_size, "8 for keys of int8")
        need(k_cache_quant_scale is not None, op, "k_cache_quant_scale", None, "a tensor for keys of int8")
        need_dtype(op, "k_cache_quant_scale", k_cache_quant_scale, torch.float32)
        need_shape(op, "k_cache_quant_scale", k_cache_quant_scale, [blocks, 1, size])
        keys = k_cache.float() * k_cache_quant_scale[..., None]
    else:
        need_dtype(op, "k_cache", k_cache, q.dtype)
        need(kv_cache_quant_bit_size == -1, op, "kv_cache_quant_bit_size", kv_cache_quant_bit_size, "-1 for keys like q")
        need_absent(op, "keys are like q", k_cache_quant_scale=k_cache_quant_scale)
        keys = k_cache
    need(windows_size_left == -1, op, "windows_size_left", windows_size_left, "-1 (no window is in this stand-in)")
    need(windows_size_right == -1, op, "windows_size_right", windows_size_right, "-1: it is reserved")
    need_one_of(op, "compute_dtype", compute_dtype, torch.float32, torch.float16)
    need_dtype(op, "block_tables", block_tables, torch.int32)
    need_shape(op, "block_tables", block_tables, [requests, block_tables.shape[-1]])
    counts = lengths(op, "context_lens", context_lens)
    need(len(counts) == requests, op, "context_lens.shape", [len(counts)], f"[{requests}]")
    if out is None:
        need(0 < head_size_v <= width, op, "head_size_v", head_size_v, f"1 to {width} without out")
        out = torch.empty(requests, 1, heads, head_size_v, dtype=q.dtype)
    value = out.shape[-1]
    need_dtype(op, "out", out, q.dtype)
    need_shape(op, "out", out, [requests, 1, heads, value])
    need(value <= width and head_size_v in (-1, value), op, "head_size_v", head_size_v, f"-1 or out's {value}")
    need(max(counts, default=0) <= block_tables.shape[1] * size, op, "context_lens", max(counts, default=0),
         f"at most the {block_tables.shape[1] * size} tokens of block_tables")

    lse = torch.full((requests, heads, 1), math.nan)
    keys = keys.view(-1, width)
    for i, count in enumerate(counts):
        if count <= 0 or 0 < max_context_len < count:
            out[i] = math.nan
            continue
        used = block_tables[i, : -(-count // size)].long()
        need(bool(((used >= 0) & (used < blocks)).all()), op, f"block_tables[{i}]", used.tolist(), f"blocks 0 to {blocks - 1}")
        k = keys[(used[:, None] * size + torch.arange(size)).flatten()[:count]].float()
        logits = (q[i, 0].float() @ k.T * softmax_scale).to(compute_dtype).float()
        lse[i, :, 0] = logits.logsumexp(-1)
        out[i, 0] = (torch.softmax(logits, -1) @ k[:, :value]).to(out.dtype)
    return (out, lse) if return_lse else out


def _codes(op, name, x, scale, scale_name, shape):
    """float32 of x and the scale of its rows, or 1."""
    need_dtype(op, name, x, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
    if x.dtype in (torch.bfloat16, torch.float16):
        need_absent(op, f"{name} has no codes", **{scale_name: scale})
        return x.float(), None
    need(scale is not None, op, scale_name, None, f"a tensor for {name} of {x.dtype}")
    need_dtype(op, scale_name, scale, torch.float32)
    need_shape(op, scale_name, scale, shape)
    need_dense(op, **{scale_name: scale})
    return x.float(), scale[..., 0]


def masked_indexer_select_paged_kv(query, k_cache, weights, kv_cache_block_table, cu_seq_q_lens, cu_seq_k_lens,
                                   k_context_lens, k_cache_block_table, is_prefill, index_topk, kv_cache_block_size,
                                   softmax_scale, q_scale=None, k_scale_cache=None, sparse_block_table=None,
                                   sparse_context_lens=None, is_score_float=False, compress_ratio=1,
                                   kv_cache_block_table_offset=None):
    """For each query the slots of its index_topk best visible keys, int32 [.., index_topk], and how many they are, [T].

    score = softmax_scale sum over heads of weights[.., H, 1] relu(q[.., H, 128] . k), times the scales of codes; in
    bfloat16, unless is_score_float. Queries are the last of each sequence's keys. Prefill takes query [T, H, 128] and
    dense keys, both with their cumulative rows; decode takes [b, s, H, 128] and a paged cache [blocks, 1, size, 128] with
    its table and the lengths. A slot is kv_cache_block_table[b, j // block] * block + j % block of the key's place j.
    What stands behind the count is undefined; the chosen are in no order.
    """
    op = "masked_indexer_select_paged_kv"
    need(compress_ratio == 1, op, "compress_ratio", compress_ratio, "1 (not in this stand-in)")
    need_absent(op, "not in this stand-in", kv_cache_block_table_offset=kv_cache_block_table_offset)
    need(index_topk > 0, op, "index_topk", index_topk, "1 or more")
    need(kv_cache_block_size == 1 or (kv_cache_block_size > 0 and kv_cache_block_size % 16 == 0), op, "kv_cache_block_size",
         kv_cache_block_size, "1 or a multiple of 16")
    need_rank(op, "query", query, 3 if is_prefill else 4)
    *lead, heads, width = query.shape
    need_one_of(op, "query's head count", heads, 32, 64)
    need(width == 128, op, "query.shape[-1]", width, "128")
    need_dtype(op, "weights", weights, torch.bfloat16, torch.float32)
    need_shape(op, "weights", weights, [*lead, heads, 1])
    need(weights.stride(-2) == 1, op, "weights.stride(-2)", weights.stride(-2), "1")
    need_dense(op, query=query, kv_cache_block_table=kv_cache_block_table)
    need_dtype(op, "kv_cache_block_table", kv_cache_block_table, torch.int32)
    need_rank(op, "kv_cache_block_table", kv_cache_block_table, 2)
    q, row_scale = _codes(op, "query", query, q_scale, "q_scale", [*lead, heads, 1])
    need_dtype(op, "k_cache", k_cache, query.dtype)
    need_dense(op, k_cache=k_cache)
    requests = len(kv_cache_block_table)
    if is_prefill:
        need_shape(op, "k_cache", k_cache, [len(k_cache), 128])
        keys, key_scale = _codes(op, "k_cache", k_cache, k_scale_cache, "k_scale_cache", [len(k_cache), 1])
        need(cu_seq_q_lens is not None and cu_seq_k_lens is not None, op, "cu_seq_q_lens or cu_seq_k_lens", None,
             "tensors in prefill")
        first, ends = lengths(op, "cu_seq_q_lens", cu_seq_q_lens), lengths(op, "cu_seq_k_lens", cu_seq_k_lens)
        for name, values, last in (("cu_seq_q_lens", first, len(query)), ("cu_seq_k_lens", ends, len(k_cache))):
            need(values[0] == 0 and values == sorted(values) and values[-1] <= last and len(values) == requests + 1, op, name,
                 values, f"{requests + 1} cumulative rows from 0 to {last} at most")
        seen = [slice(a, b) for a, b in pairwise(ends)]
    else:
        need_rank(op, "k_cache", k_cache, 4)
        blocks, _, size, _ = k_cache.shape
        need_shape(op, "k_cache", k_cache, [blocks, 1, size, 128])
        keys, key_scale = _codes(op, "k_cache", k_cache, k_scale_cache, "k_scale_cache", [blocks, 1, size, 1])
        need(k_context_lens is not None and k_cache_block_table is not None, op, "k_context_lens or k_cache_block_table", None,
             "tensors in decode")
        need_dtype(op, "k_cache_block_table", k_cache_block_table, torch.int32)
        need_shape(op, "k_cache_block_table", k_cache_block_table, [requests, k_cache_block_table.shape[-1]])
        need_dense(op, k_cache_block_table=k_cache_block_table)
        counts = lengths(op, "k_context_lens", k_context_lens)
        need(len(counts) == requests == lead[0], op, "query.shape[0]", lead[0], f"{requests} requests")
        first, seen = list(range(0, requests * lead[1] + 1, lead[1])), []
        for count, table in zip(counts, k_cache_block_table):
            used = table[: -(-count // size)].long()
            need(0 <= count <= len(table) * size, op, "k_context_lens", count, f"0 to {len(table) * size}")
            need(bool(((used >= 0) & (used < blocks)).all()), op, "k_cache_block_table", used.tolist(),
                 f"blocks 0 to {blocks - 1}")
            seen.append((used[:, None] * size + torch.arange(size)).flatten()[:count])
        keys, key_scale = keys.view(-1, 128), None if key_scale is None else key_scale.flatten()
    total = math.prod(lead)
    made = (sparse_block_table, sparse_context_lens)
    table = garbage([*lead, index_topk], torch.int32) if made[0] is None else made[0]
    counts_out = garbage([total], torch.int32) if made[1] is None else made[1]
    for name, tensor, shape in (("sparse_block_table", table, [*lead, index_topk]),
                                ("sparse_context_lens", counts_out, [total])):
        need_dtype(op, name, tensor, torch.int32)
        need_shape(op, name, tensor, shape)
        need_dense(op, **{name: tensor})
        tensor.copy_(garbage(shape, torch.int32))
    flat, q = table.view(total, index_topk), q.reshape(total, heads, 128)
    w = weights.float().reshape(total, heads) * softmax_scale
    w = w if row_scale is None else w * row_scale.reshape(total, heads)
    for i, (a, b) in enumerate(pairwise(first)):
        k = keys[seen[i]]
        count, rows = len(k), b - a
        places = torch.arange(count)
        need(-(-count // kv_cache_block_size) <= kv_cache_block_table.shape[1], op, "kv_cache_block_table.shape[1]",
             kv_cache_block_table.shape[1], f"blocks of {kv_cache_block_size} for {count} keys")
        slots = kv_cache_block_table[i, places // kv_cache_block_size].long() * kv_cache_block_size
        slots += places % kv_cache_block_size
        step = max(1, _WORKSPACE // (heads * max(1, count)))
        for c in range(a, b, step):
            at = slice(c, min(b, c + step))
            score = torch.einsum("th,thn->tn", w[at], (q[at] @ k.T).relu())
            score = score if key_scale is None else score * key_scale[seen[i]]
            score = score if is_score_float else score.bfloat16().float()
            for row, s in zip(range(at.start, at.stop), score):
                visible = max(0, count - rows + row - a + 1)
                best = highest(s[:visible], index_topk)
                flat[row, : len(best)] = slots[best].int()
                if visible:  # what it says of a row without keys is not published
                    counts_out[row] = len(best)
    return table, counts_out
