"""kunlun_ops and xspeedgate_ops: scores of codes for the indexer, and the positions of the 2048 largest."""

import math

import torch

from porthal.backends.kunlunxin.emulated.attention import both
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    highest,
    lengths,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_rank,
    need_shape,
)

CHOSEN = 2048  # topk_per_row writes so many a row whatever it is told, fast_topkv2 knows no other


def I8_mqa_logits(*, q, fused_kv_cache, weights, context_q_lens, context_k_lens, logits, clean_logits, max_seq_q=0,
                  max_seq_k=0, is_causal=False, use_xfa_boost=False):
    """logits [rows, keys] = sum over heads of weights * relu(q . k) * k's scale, on codes of int8.

    Of several sequences all but the first are passed over on some builds, so one is taken: lods of [0, rows], [0, keys].
    """
    op = "I8_mqa_logits"
    k, k_scale = fused_kv_cache
    need_dtype(op, "q", q, torch.int8)
    need_dtype(op, "k", k, torch.int8)
    for name, tensor in (("k_scale", k_scale), ("weights", weights), ("logits", logits)):
        need_dtype(op, name, tensor, torch.float32)
    need_dense(op, q=q, k=k, k_scale=k_scale, weights=weights, logits=logits)
    need_rank(op, "q", q, 3)
    rows, heads, size = q.shape
    need_shape(op, "k", k, [len(k), size])
    need(k_scale.numel() == len(k), op, "k_scale.shape", list(k_scale.shape), f"{len(k)} numbers")
    need_shape(op, "weights", weights, [rows, heads])
    need_shape(op, "logits", logits, [rows, len(k)])
    need(both(op, "context_q_lens", *context_q_lens, 2) == [0, rows], op, "context_q_lens", context_q_lens, f"[0, {rows}]")
    need(both(op, "context_k_lens", *context_k_lens, 2) == [0, len(k)], op, "context_k_lens", context_k_lens,
         f"[0, {len(k)}]")
    need((max_seq_q, max_seq_k, is_causal, use_xfa_boost) == (0, 0, False, False), op,
         "max_seq_q, max_seq_k, is_causal, use_xfa_boost", (max_seq_q, max_seq_k, is_causal, use_xfa_boost),
         "(0, 0, False, False): no other is published")
    products = torch.einsum("mhd,nd->mhn", q.float(), k.float()).relu()
    logits.copy_(torch.einsum("mh,mhn->mn", weights, products) * k_scale.reshape(1, -1))


def mask_for_I8_mqa_logits(*, seq_len_kv, cu_seqlen_ks, cu_seqlen_ke, logits):
    """logits outside each row's [ks, ke) become -inf. An empty or overlong one traps the device."""
    op = "mask_for_I8_mqa_logits"
    need_dtype(op, "logits", logits, torch.float32)
    need_dense(op, logits=logits)
    need_shape(op, "logits", logits, [len(logits), seq_len_kv])
    starts, ends = lengths(op, "cu_seqlen_ks", cu_seqlen_ks), lengths(op, "cu_seqlen_ke", cu_seqlen_ke)
    need(len(starts) == len(ends) == len(logits), op, "cu_seqlen_ks and ke, lengths", (len(starts), len(ends)),
         str(len(logits)))
    need(all(0 <= start < end <= seq_len_kv for start, end in zip(starts, ends)), op, "cu_seqlen_ks, cu_seqlen_ke",
         list(zip(starts, ends)), f"0 <= ks < ke <= {seq_len_kv} in each row")
    at = torch.arange(seq_len_kv)
    logits.masked_fill_((at < cu_seqlen_ks[:, None]) | (at >= cu_seqlen_ke[:, None]), -math.inf)


def I8_paged_mqa_logits(*, q, fused_kv_cache, weights, context_lens, block_table, max_context_len, clean_logits, out,
                        use_xfa_boost=False):
    """The same from pages [blocks, block, 1, size], for q [requests, rows, heads, size]: out [requests, rows, positions].

    Scales come gathered by position, [requests, max_context_len]. What is left behind the keys a row sees is garbage.
    """
    op = "I8_paged_mqa_logits"
    k, k_scale = fused_kv_cache
    need_dtype(op, "q", q, torch.int8)
    need_dtype(op, "k", k, torch.int8)
    need_dtype(op, "block_table", block_table, torch.int32)
    for name, tensor in (("k_scale", k_scale), ("weights", weights), ("out", out)):
        need_dtype(op, name, tensor, torch.float32)
    need_dense(op, q=q, k_scale=k_scale, weights=weights, out=out, block_table=block_table)
    need_rank(op, "q", q, 4)
    requests, rows, heads, size = q.shape
    need_rank(op, "k", k, 4)
    blocks, block, _, _ = k.shape
    need_shape(op, "k", k, [blocks, block, 1, size])
    need(k[:1].is_contiguous(), op, "k.stride()", k.stride(), "dense pages")
    need(max_context_len % 64 == 0, op, "max_context_len", max_context_len, "a multiple of 64")
    need_shape(op, "k_scale", k_scale, [requests, max_context_len])
    need_shape(op, "weights", weights, [requests, rows, heads])
    need_shape(op, "out", out, [requests, rows, max_context_len])
    counts = both(op, "context_lens", *context_lens, requests)
    need_shape(op, "block_table", block_table, [requests, block_table.shape[1]])
    need(all(0 < n <= min(max_context_len, block_table.shape[1] * block) for n in counts), op, "context_lens", counts,
         f"1 to {min(max_context_len, block_table.shape[1] * block)}")
    out.fill_(math.nan)
    for request, count in enumerate(counts):
        used = block_table[request, : -(-count // block)].long()
        need(bool(((used >= 0) & (used < blocks)).all()), op, "block_table", used.tolist(), f"blocks 0 to {blocks - 1}")
        keys = k[used].flatten(0, 2)[:count].float()
        for row in range(rows):
            seen = max(count - rows + row + 1, 0)
            products = (q[request, row].float() @ keys[:seen].T).relu()
            out[request, row, :seen] = weights[request, row] @ products * k_scale[request, :seen]


def topk_per_row(*, logits, srcIndices, numRows, stride0, stride1, topK, rowStarts, rowEnds, seqLens, next_n):
    """srcIndices [rows, 2048] = places of the largest, counted from rowStarts, or of the first seqLens - next_n + i + 1.

    A row with less to choose from keeps what stood in the places behind it.
    """
    op = "topk_per_row"
    need_dtype(op, "logits", logits, torch.float32)
    need_dtype(op, "srcIndices", srcIndices, torch.int32)
    need(topK == CHOSEN, op, "topK", topK, f"{CHOSEN}: the kernel writes so many a row whatever it is told")
    need_rank(op, "logits", logits, 2)
    need((numRows, stride0, stride1) == (len(logits), *logits.stride()), op, "numRows, stride0, stride1",
         (numRows, stride0, stride1), str((len(logits), *logits.stride())))
    need_shape(op, "srcIndices", srcIndices, [numRows, CHOSEN])
    need_dense(op, srcIndices=srcIndices)
    if seqLens is None:
        need(rowStarts is not None and rowEnds is not None and next_n is None, op, "rowStarts, rowEnds, next_n",
             (rowStarts, rowEnds, next_n), "two tensors and None without seqLens")
        starts, ends = lengths(op, "rowStarts", rowStarts), lengths(op, "rowEnds", rowEnds)
    else:
        need_absent(op, "seqLens is given", rowStarts=rowStarts, rowEnds=rowEnds)
        need(next_n is not None, op, "next_n", None, "a number with seqLens")
        counts = lengths(op, "seqLens", seqLens)
        starts = [0] * numRows
        ends = [count - next_n + row + 1 for count in counts for row in range(next_n)]
    need(len(starts) == len(ends) == numRows, op, "rows named", (len(starts), len(ends)), str(numRows))
    need(all(0 <= start <= end <= logits.shape[1] for start, end in zip(starts, ends)), op, "rows", list(zip(starts, ends)),
         f"0 <= start <= end <= {logits.shape[1]}")
    for row, (start, end) in enumerate(zip(starts, ends)):
        chosen = highest(logits[row, start:end], CHOSEN)
        srcIndices[row, : len(chosen)] = chosen.int()


def fast_topkv2(*, score, lengths, topk):
    """[rows, 2048]: places of the largest of each row's first `lengths` scores, and garbage behind them."""
    op = "fast_topkv2"
    need_dtype(op, "score", score, torch.float32)
    need_dtype(op, "lengths", lengths, torch.int32)
    need(topk == CHOSEN, op, "topk", topk, str(CHOSEN))
    need_rank(op, "score", score, 2)
    need_dense(op, score=score)
    need_shape(op, "lengths", lengths, [len(score)])
    need(bool(((lengths >= 0) & (lengths <= score.shape[1])).all()), op, "lengths", lengths.tolist(),
         f"0 to {score.shape[1]}")
    found = garbage([len(score), CHOSEN], torch.int32)
    for row, count in enumerate(lengths.tolist()):
        chosen = highest(score[row, :count], CHOSEN)
        found[row, : len(chosen)] = chosen.int()
    return found
