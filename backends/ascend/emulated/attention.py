"""Top-k selection by the lightning indexer and attention over what it selected, both on a paged cache."""

import math
from dataclasses import dataclass

import torch

from porthal.backends.ascend.emulated.products import HALVES
from porthal.backends.torch.emulation.stand_in import garbage, lengths, need, need_dense, need_given, need_shape

_EVERY_TOKEN = 2**63 - 1
_WORKSPACE = 1 << 24  # attention logits held at once


@dataclass(frozen=True)
class _Request:
    """One sequence: its rows of the flattened query, and the cache row of each of its logical positions."""

    first: int
    rows: int
    slots: torch.Tensor


def _requests(op, query, key, table, query_lengths, key_lengths, layout_query, layout_key, mode, pre, next_, side):
    """Check what the two paged operators share and return their requests; `side` ends the key arguments' names."""
    need(layout_query in ("BSND", "TND"), op, "layout_query", repr(layout_query), "'BSND' or 'TND'")
    need(layout_key == "PA_BSND", op, f"layout_{side}", repr(layout_key),
          "'PA_BSND' ('BSND' and 'TND' are documented too, but this stand-in has the paged layout only)")
    need(mode in (0, 3), op, "sparse_mode", mode, "0 or 3")
    need(pre == _EVERY_TOKEN, op, "pre_tokens", pre, str(_EVERY_TOKEN))
    need(next_ == _EVERY_TOKEN, op, "next_tokens", next_, str(_EVERY_TOKEN))
    need(query.dtype in HALVES, op, "query.dtype", query.dtype, "torch.bfloat16 or torch.float16")
    need(key.dtype == query.dtype, op, "key.dtype", key.dtype, f"query's {query.dtype}")
    need_dense(op, query=query, key=key)
    rank = 3 if layout_query == "TND" else 4
    need(query.dim() == rank, op, "query.dim()", query.dim(), f"{rank} for layout {layout_query}")
    need(key.dim() == 4, op, "key.dim()", key.dim(), "4 for layout PA_BSND")
    blocks, size = key.shape[:2]
    need(size % 16 == 0 and 16 <= size <= 1024, op, "key's block size", size, "a multiple of 16 up to 1024")
    need(key.shape[2] == 1, op, "key's head count", key.shape[2], "1")

    need_given(op, **{f"actual_seq_lengths_{side}": key_lengths, "block_table": table})
    visible = lengths(op, f"actual_seq_lengths_{side}", key_lengths)
    count = len(visible)
    if layout_query == "TND":
        need_given(op, actual_seq_lengths_query=query_lengths)
        ends = lengths(op, "actual_seq_lengths_query", query_lengths)
        starts = [0, *ends[:-1]]
        need(all(0 <= a <= b <= query.shape[0] for a, b in zip(starts, ends)), op, "actual_seq_lengths_query", ends,
              f"cumulative row counts, never falling, up to {query.shape[0]}")
    else:
        batch, longest = query.shape[:2]
        rows = [longest] * batch if query_lengths is None else lengths(op, "actual_seq_lengths_query", query_lengths)
        need(len(rows) == batch and all(0 <= n <= longest for n in rows), op, "actual_seq_lengths_query", rows,
              f"{batch} row counts from 0 to {longest}")
        starts = [i * longest for i in range(batch)]
        ends = [start + n for start, n in zip(starts, rows)]
    need(count == len(ends), op, f"actual_seq_lengths_{side}", visible, f"one length for each of {len(ends)} requests")
    need(table.dtype == torch.int32, op, "block_table.dtype", table.dtype, "torch.int32")
    width = -(-max(visible, default=0) // size)
    need(table.dim() == 2 and table.shape[0] == count and table.shape[1] >= width, op, "block_table.shape",
          list(table.shape), f"[{count}, {width} or more]")

    requests = []
    for start, end, keys, row in zip(starts, ends, visible, table):
        need(keys >= 0, op, f"actual_seq_lengths_{side}", visible, "no negative length")
        used = row[: -(-keys // size)].long()
        need(bool(((used >= 0) & (used < blocks)).all()), op, "block_table", used.tolist(),
              f"blocks 0 to {blocks - 1}")
        slots = (used[:, None] * size + torch.arange(size)).flatten()[:keys]
        requests.append(_Request(start, end - start, slots))
    return requests


def npu_lightning_indexer(query, key, weights, *, actual_seq_lengths_query=None, actual_seq_lengths_key=None,
                          block_table=None, layout_query="BSND", layout_key="BSND", sparse_count=2048, sparse_mode=3,
                          pre_tokens=_EVERY_TOKEN, next_tokens=_EVERY_TOKEN, return_value=False):
    """Per query row, the `sparse_count` visible positions with the largest sum_h weights_h * relu(query_h . key).

    int32 positions within the request, in no order, -1 after the last; the values are undefined in the paged layout.
    Source: npu_lightning_indexer page.
    """
    op = "npu_lightning_indexer"
    requests = _requests(op, query, key, block_table, actual_seq_lengths_query, actual_seq_lengths_key, layout_query,
                         layout_key, sparse_mode, pre_tokens, next_tokens, "key")
    need_dense(op, weights=weights)
    *rows, heads, width = query.shape
    need(1 <= heads <= 64, op, "query's head count", heads, "1 to 64")
    need(width == 128, op, "query.shape[-1]", width, "128")
    need(key.shape[3] == 128, op, "key.shape[-1]", key.shape[3], "128")
    need(weights.dtype in (query.dtype, torch.float32), op, "weights.dtype", weights.dtype,
          f"query's {query.dtype} or torch.float32")
    need_shape(op, "weights", weights, [*rows, heads])
    need(1 <= sparse_count <= 2048 or sparse_count in range(3072, 8193, 1024), op, "sparse_count", sparse_count,
          "1 to 2048, or 3072 to 8192 in steps of 1024")
    need(not return_value, op, "return_value", return_value, "False for layout PA_BSND")

    indices = garbage([*rows, 1, sparse_count], torch.int32)
    flat = indices.view(-1, sparse_count)
    q, w = query.reshape(-1, heads, 128).float(), weights.reshape(-1, heads).float()
    for request in requests:
        keys = key.view(-1, 128)[request.slots].float()
        for row in range(request.rows):
            seen = len(keys) if sparse_mode == 0 else max(0, len(keys) - request.rows + row + 1)
            at = request.first + row
            score = w[at] @ (q[at] @ keys[:seen].T).clamp(min=0)
            best = seen - 1 - score.flip(0).argsort(descending=True, stable=True)[:sparse_count]
            flat[at] = -1
            flat[at, : len(best)] = best[(best * 40503 % 65521).argsort(descending=True)].int()
    return indices, garbage(list(indices.shape), query.dtype)


def npu_sparse_flash_attention(query, key, value, sparse_indices, scale_value, *, block_table=None,
                               actual_seq_lengths_query=None, actual_seq_lengths_kv=None, query_rope=None,
                               key_rope=None, sparse_block_size=1, layout_query="BSND", layout_kv="BSND",
                               sparse_mode=3, pre_tokens=_EVERY_TOKEN, next_tokens=_EVERY_TOKEN, attention_mode=0,
                               return_softmax_lse=False, sinks=None):
    """softmax(scale_value * [query, query_rope] . [key, key_rope]^T over sparse_indices) @ key, absorbed MLA.

    Rows without a selected position, and the two softmax statistics, are undefined here.
    Source: npu_sparse_flash_attention page.
    """
    op = "npu_sparse_flash_attention"
    requests = _requests(op, query, key, block_table, actual_seq_lengths_query, actual_seq_lengths_kv, layout_query,
                         layout_kv, sparse_mode, pre_tokens, next_tokens, "kv")
    need(attention_mode == 2, op, "attention_mode", attention_mode, "2 (absorbed MLA)")
    need(sparse_block_size == 1, op, "sparse_block_size", sparse_block_size,
          "1 (powers of two to 128 are documented too, but this stand-in selects single tokens only)")
    need(not return_softmax_lse, op, "return_softmax_lse", return_softmax_lse, "False for layout PA_BSND")
    need(sinks is None, op, "sinks", "given", "None on this product")
    need_given(op, value=value, query_rope=query_rope, key_rope=key_rope)
    need_dense(op, value=value, query_rope=query_rope, key_rope=key_rope, sparse_indices=sparse_indices)
    *rows, heads, width = query.shape
    need(heads in (1, 2, 4, 8, 16, 32, 64, 128), op, "query's head count", heads, "a power of two up to 128")
    need(width == 512, op, "query.shape[-1]", width, "512")
    need_shape(op, "key", key, [*key.shape[:3], 512])
    need_shape(op, "value", value, list(key.shape))
    need_shape(op, "query_rope", query_rope, [*rows, heads, 64])
    need_shape(op, "key_rope", key_rope, [*key.shape[:3], 64])
    for name, tensor in (("value", value), ("query_rope", query_rope), ("key_rope", key_rope)):
        need(tensor.dtype == query.dtype, op, f"{name}.dtype", tensor.dtype, f"query's {query.dtype}")
    need(value.data_ptr() == key.data_ptr() or torch.equal(value, key), op, "value", "other data than key",
          "key's data (absorbed MLA shares them)")
    need(sparse_indices.dtype == torch.int32, op, "sparse_indices.dtype", sparse_indices.dtype, "torch.int32")
    need(sparse_indices.dim() == query.dim() and sparse_indices.shape[-1] > 0, op, "sparse_indices.shape",
          list(sparse_indices.shape), f"{[*rows, 1]} and one dimension of 1 or more")
    need_shape(op, "sparse_indices", sparse_indices, [*rows, 1, sparse_indices.shape[-1]])

    out = garbage(list(query.shape), query.dtype)
    flat, q = out.view(-1, heads, 512), torch.cat([query, query_rope], -1).reshape(-1, heads, 576)
    chosen = sparse_indices.reshape(-1, sparse_indices.shape[-1]).long()
    for request in requests:
        keys = torch.cat([key.view(-1, 512)[request.slots], key_rope.view(-1, 64)[request.slots]], -1).float()
        length = len(keys)
        step = max(1, _WORKSPACE // (heads * max(1, length)))
        for begin in range(0, request.rows, step):
            inside = torch.arange(begin, min(begin + step, request.rows))
            at = request.first + inside
            picked = chosen[at]
            present = picked >= 0
            need(not bool((present[:, 1:] & ~present[:, :-1]).any()), op, "sparse_indices",
                  "a position after a -1", "positions first and -1 after them in every row")
            need(bool(((picked >= -1) & (picked < length)).all()), op, "sparse_indices",
                  f"from {int(picked.min())} to {int(picked.max())}", f"-1 to {length - 1} in this request")
            if length == 0:
                continue
            times = torch.zeros(len(at), length + 1).scatter_add_(1, picked % (length + 1), torch.ones(picked.shape))
            times = times[:, None, :length]  # a position picked twice weighs twice; -1 fell on the column cut off here
            if sparse_mode == 3:
                times = times * (torch.arange(length) <= (length - request.rows + inside)[:, None])[:, None]
            logits = (q[at].float() @ keys.T * scale_value).masked_fill(times == 0, -math.inf)
            weight = times * (logits - logits.amax(-1, keepdim=True)).exp()
            flat[at] = (weight @ keys[:, :512] / weight.sum(-1, keepdim=True)).to(out.dtype)
    statistic = [1, rows[0], heads] if layout_query == "TND" else [rows[0], 1, rows[1], heads]
    return out, garbage(statistic, torch.float32), garbage(statistic, torch.float32)
