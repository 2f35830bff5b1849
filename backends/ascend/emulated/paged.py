"""A paged cache as the attention calls see it: their requests, the selection of positions and attention over these."""

import math
from dataclasses import dataclass

import torch

from porthal.backends.ascend.emulated.products import EVERY_TOKEN
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    lengths,
    need,
    need_dense,
    need_dtype,
    need_given,
    need_shape,
)

_WORKSPACE = 1 << 24  # attention logits held at once


@dataclass(frozen=True)
class Request:
    """One sequence: its rows of the flattened query, and the cache row of each of its logical positions."""

    first: int
    rows: int
    slots: torch.Tensor


def requests_of(op, query, key, table, query_lengths, key_lengths, layout_query, layout_key, mode, pre, next_, side):
    """Check what the paged operators share and return their requests; `side` ends the key arguments' names."""
    need(layout_query in ("BSND", "TND"), op, "layout_query", repr(layout_query), "'BSND' or 'TND'")
    need(layout_key == "PA_BSND", op, f"layout_{side}", repr(layout_key),
          "'PA_BSND' ('BSND' and 'TND' are documented too, but this stand-in has the paged layout only)")
    need(mode in (0, 3), op, "sparse_mode", mode, "0 or 3")
    need(pre == EVERY_TOKEN, op, "pre_tokens", pre, str(EVERY_TOKEN))
    need(next_ == EVERY_TOKEN, op, "next_tokens", next_, str(EVERY_TOKEN))
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
        requests.append(Request(start, end - start, slots))
    return requests


def select(requests, rows, sparse_count, sparse_mode, keys_of, score):
    """int32 [*rows, 1, sparse_count]: per row the visible positions of the highest score, in no order, then -1. A row without
    any is undefined.

    keys_of(slots) is a list of a request's rows; score(row, *these) is made of those that the row sees.
    """
    indices = garbage([*rows, 1, sparse_count], torch.int32)
    flat = indices.view(-1, sparse_count)
    for request in requests:
        keys, length = keys_of(request.slots), len(request.slots)
        for row in range(request.rows):
            seen = length if sparse_mode == 0 else max(0, length - request.rows + row + 1)
            at = request.first + row
            if seen == 0:  # nobody says what is there
                continue
            made = score(at, *(x[:seen] for x in keys))
            best = seen - 1 - made.flip(0).argsort(descending=True, stable=True)[:sparse_count]
            flat[at] = -1
            flat[at, : len(best)] = best[(best * 40503 % 65521).argsort(descending=True)].int()
    return indices


def attend(op, requests, q, sparse_indices, scale_value, sparse_mode, keys_of):
    """softmax(scale_value * q . keys^T over sparse_indices) @ keys[:, :512], of q's dtype; NaN where nothing is chosen.

    keys_of(slots) are a request's keys of 576 numbers in float32.
    """
    out = garbage([*q.shape[:-1], 512], q.dtype)
    heads = q.shape[-2]
    flat, q = out.view(-1, heads, 512), q.reshape(-1, heads, 576)
    chosen = sparse_indices.reshape(-1, sparse_indices.shape[-1]).long()
    for request in requests:
        keys = keys_of(request.slots)
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
    return out


def need_indices(op, sparse_indices, query, rows):
    need_dtype(op, "sparse_indices", sparse_indices, torch.int32)
    need_dense(op, sparse_indices=sparse_indices)
    need(sparse_indices.dim() == query.dim() and sparse_indices.shape[-1] > 0, op, "sparse_indices.shape",
         list(sparse_indices.shape), f"{[*rows, 1]} and one dimension of 1 or more")
    need_shape(op, "sparse_indices", sparse_indices, [*rows, 1, sparse_indices.shape[-1]])
