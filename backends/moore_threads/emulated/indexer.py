"""DeepGEMM's scores of the indexer, as MATE ships them for Moore Threads: keys in float8, dense or in pages of 64."""

import math

import torch

from porthal.backends.torch.emulation.stand_in import need, need_dense, need_dtype, need_one_of, need_rank, need_shape

PROCESSORS = 56  # of the emulated device; the schedule gives each its share of the keys
_PAGE = 64
_SPLIT = 4 * _PAGE  # keys that a processor takes at once
_WORKSPACE = 1 << 24  # scores of single heads held at once


def _scores(q, keys, weights):
    """sum over heads of weights[T, H] relu(q[T, H, D] . keys[n, D]^T), [T, n] in float32."""
    out = torch.empty(len(q), len(keys))
    step = max(1, _WORKSPACE // (q.shape[1] * max(1, len(keys))))
    for a in range(0, len(q), step):
        at = slice(a, a + step)
        out[at] = torch.einsum("th,thn->tn", weights[at], (q[at].float() @ keys.T).relu())
    return out


def _need_queries(op: str, q, weights) -> None:
    heads, width = q.shape[-2:]
    need_dtype(op, "q", q, torch.float8_e4m3fn)
    need_dtype(op, "weights", weights, torch.float32)
    need_one_of(op, "q's head count", heads, 32, 64)
    need_one_of(op, "q.shape[-1]", width, 32, 64, 128)
    need_dense(op, q=q, weights=weights)
    need_shape(op, "weights", weights, [math.prod(q.shape[:-2]), heads])


def fp8_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=False, max_seqlen_k=0):
    """float32 [T, n] of q[T, H, D], codes and scales of n keys, weights[T, H]: row t is defined from its start to its end.

    Elsewhere it is -inf with clean_logits, else undefined. With max_seqlen_k the row begins at its start and is that wide.
    """
    op = "fp8_mqa_logits"
    need(isinstance(kv, tuple) and len(kv) == 2, op, "kv", type(kv).__name__, "codes and scales, a tuple of two")
    codes, scales = kv
    need_rank(op, "q", q, 3)
    _need_queries(op, q, weights)
    rows, count = len(q), len(codes)
    need_dtype(op, "kv[0]", codes, torch.float8_e4m3fn)
    need_dtype(op, "kv[1]", scales, torch.float32)
    need_shape(op, "kv[0]", codes, [count, q.shape[-1]])
    need_shape(op, "kv[1]", scales, [count])
    need(codes.stride(-1) == 1, op, "kv[0].stride(-1)", codes.stride(-1), "1")
    for name, tensor in (("cu_seq_len_k_start", cu_seq_len_k_start), ("cu_seq_len_k_end", cu_seq_len_k_end)):
        need_dtype(op, name, tensor, torch.int32)
        need_shape(op, name, tensor, [rows])
        need_dense(op, **{name: tensor})
    need(not (max_seqlen_k and clean_logits), op, "clean_logits", clean_logits, "False with max_seqlen_k")
    need(0 <= max_seqlen_k <= count, op, "max_seqlen_k", max_seqlen_k, f"0 to {count}")
    start, end = cu_seq_len_k_start.long(), cu_seq_len_k_end.long()
    need(bool(((start >= 0) & (end <= count)).all()), op, "cu_seq_len_k_end", end.tolist(), f"at most {count} keys")
    full = _scores(q, codes.float() * scales[:, None], weights)
    place = torch.arange(count)
    inside = (place >= start[:, None]) & (place < end[:, None])
    full = torch.where(inside, full, -math.inf if clean_logits else math.nan)
    if not max_seqlen_k:
        return full
    at = start[:, None] + torch.arange(max_seqlen_k)
    return torch.where(at < end[:, None], full.gather(1, at.clamp(max=count - 1)), math.nan)


def _schedule(lengths: list[int], processors: int) -> torch.Tensor:
    """The first request and the first split of its keys of each processor, [processors + 1, 2]."""
    splits = [-(-n // _SPLIT) for n in lengths]
    total, rows, request, before = sum(splits), [], 0, 0
    for p in range(processors + 1):
        first = p * (total // processors) + min(p, total % processors)
        while request < len(splits) and first - before >= splits[request]:
            before += splits[request]
            request += 1
        rows.append([request, first - before])
    return torch.tensor(rows, dtype=torch.int32)


def get_num_sms():
    """The processors, for `num_mps`."""
    return PROCESSORS


def _largest(context_lens: torch.Tensor) -> list[int]:
    return (context_lens if context_lens.dim() == 1 else context_lens[:, -1]).tolist()


def get_paged_mqa_logits_metadata(context_lens, block_kv, num_mps=0):
    """The schedule of fp8_paged_mqa_logits for these lengths, [b] or [b, next_n]; int32 [num_mps + 1, 2]."""
    op = "get_paged_mqa_logits_metadata"
    need_dtype(op, "context_lens", context_lens, torch.int32)
    need_rank(op, "context_lens", context_lens, 1, 2)
    need_dense(op, context_lens=context_lens)
    if context_lens.dim() == 2:
        need_one_of(op, "context_lens.shape[1]", context_lens.shape[1], 1, 2, 4)
    need(block_kv == _PAGE, op, "block_kv", block_kv, str(_PAGE))
    need(0 <= num_mps <= PROCESSORS, op, "num_mps", num_mps, f"0 to {PROCESSORS}")
    return _schedule(_largest(context_lens), num_mps or PROCESSORS)


def fp8_paged_mqa_logits(q, fused_kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len,
                         clean_logits):
    """float32 [b next_n, max_context_len] of q[b, next_n, H, D] and the keys of a cache uint8 [blocks, 64, 1, D + 4].

    A page holds its 64 keys' codes first, their scales behind. Row j of a request whose length is n, if lengths are [b],
    is defined up to its key n - next_n + j; if they are [b, next_n], up to its own length. Behind it is -inf with
    clean_logits, else undefined.
    """
    op = "fp8_paged_mqa_logits"
    need_rank(op, "q", q, 4)
    _need_queries(op, q, weights)
    requests, rows, _, width = q.shape
    need_one_of(op, "q.shape[1]", rows, 1, 2, 4)
    need_dtype(op, "fused_kv_cache", fused_kv_cache, torch.uint8)
    blocks = len(fused_kv_cache)
    need_shape(op, "fused_kv_cache", fused_kv_cache, [blocks, _PAGE, 1, width + 4])
    need(fused_kv_cache.stride()[1:] == (width + 4, width + 4, 1) and fused_kv_cache.stride(0) % 4 == 0, op,
         "fused_kv_cache.stride()", fused_kv_cache.stride(), f"(a multiple of 4, {width + 4}, {width + 4}, 1)")
    need_dtype(op, "context_lens", context_lens, torch.int32)
    need_rank(op, "context_lens", context_lens, 1, 2)
    need_shape(op, "context_lens", context_lens, [requests, rows][: context_lens.dim()])
    need_dense(op, context_lens=context_lens, schedule_meta=schedule_meta)
    need_dtype(op, "block_table", block_table, torch.int32)
    need_shape(op, "block_table", block_table, [requests, *block_table.shape[1:]])
    need_rank(op, "block_table", block_table, 2)
    need(block_table.stride(1) == 1, op, "block_table.stride(1)", block_table.stride(1), "1")
    need_dtype(op, "schedule_meta", schedule_meta, torch.int32)
    need_rank(op, "schedule_meta", schedule_meta, 2)
    largest = _largest(context_lens)
    need(len(schedule_meta) > 1 and torch.equal(schedule_meta, _schedule(largest, len(schedule_meta) - 1)), op,
         "schedule_meta", "that of other lengths", f"get_paged_mqa_logits_metadata of {context_lens.tolist()}")
    need(max(largest, default=0) <= max_context_len, op, "max_context_len", max_context_len, f"at least {max(largest)}")

    out = torch.full((requests * rows, max_context_len), -math.inf if clean_logits else math.nan)
    for i, length in enumerate(largest):
        pages = -(-length // _PAGE)
        need(pages <= block_table.shape[1], op, "block_table.shape[1]", block_table.shape[1], f"at least {pages}")
        used = block_table[i, :pages].long()
        need(bool(((used >= 0) & (used < blocks)).all()), op, f"block_table[{i}]", used.tolist(), f"blocks 0 to {blocks - 1}")
        raw = fused_kv_cache[used].reshape(pages, -1)
        codes = raw[:, : _PAGE * width].contiguous().view(torch.float8_e4m3fn).float().view(-1, width)
        scales = raw[:, _PAGE * width :].contiguous().view(torch.float32).view(-1, 1)
        own = range(i * rows, (i + 1) * rows)
        score = _scores(q[i], (codes * scales)[:length], weights[own.start : own.stop])
        for j, row in enumerate(own):
            seen = length - rows + j + 1 if context_lens.dim() == 1 else int(context_lens[i, j])
            out[row, : max(0, seen)] = score[j, : max(0, seen)]
    return out
