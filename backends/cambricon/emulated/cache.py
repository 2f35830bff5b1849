"""torch_mlu_ops: writing the paged cache, with codes or without, and reading sequences out of it."""

import torch

from porthal.backends.cambricon.emulated.vectors import FLOATS, per_token
from porthal.backends.torch.emulation.stand_in import (
    lengths,
    need,
    need_absent,
    need_dtype,
    need_rank,
    need_shape,
)


def _paged(op, name, rows, cache):
    """Views of [tokens, heads, size] and [blocks, heads, block, size]: tokens first, and slots first."""
    need_rank(op, name, rows, 3)
    need_rank(op, f"{name}_cache", cache, 4)
    blocks, heads, size, width = cache.shape
    need_shape(op, name, rows, [len(rows), heads, width])
    return blocks * size


def _slots(op, slot_mapping, count, last, least):
    need(slot_mapping.dtype == torch.int32, op, "slot_mapping.dtype", slot_mapping.dtype, "torch.int32")
    need_shape(op, "slot_mapping", slot_mapping, [count])
    need(bool(((slot_mapping >= least) & (slot_mapping < last)).all()), op, "slot_mapping", slot_mapping.tolist(),
         f"{least} to {last - 1}")
    return slot_mapping.long()


def _where(slots, size):
    return slots // size, slots % size


def reshape_paged_cache(k, v, k_cache, v_cache, slot_mapping, direction=False):
    """k_cache[slot // block, :, slot % block] = k[token, head, size], or the other way; slots below 0 are passed over."""
    op = "reshape_paged_cache"
    last = _paged(op, "k", k, k_cache)
    slots = _slots(op, slot_mapping, len(k), last, -(2**31))
    need((v is None) == (v_cache is None), op, "v_cache", "given" if v is None else None, "as v")
    kept = slots >= 0
    for name, rows, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if rows is not None:
            _paged(op, name, rows, cache)
            need_dtype(op, name, rows, *FLOATS, torch.int8)
            need_dtype(op, f"{name}_cache", cache, rows.dtype)
            block, place = _where(slots[kept], cache.shape[2])
            if direction:
                rows[kept] = cache[block, :, place]
            else:
                cache[block, :, place] = rows[kept]
    own = (k, v) if direction else (k_cache, v_cache)
    return own if v is not None else own[0]


def quant_to_paged_cache(k, v, k_cache, v_cache, k_cache_quant_scale, v_cache_quant_scale, slot_mapping):
    """The same with codes: int8 or float8, and a scale for each token and head in [blocks, heads, block].

    What a slot below 0 does is not published: it is refused.
    """
    op = "quant_to_paged_cache"
    last = _paged(op, "k", k, k_cache)
    slots = _slots(op, slot_mapping, len(k), last, 0)
    need((v is None) == (v_cache is None), op, "v_cache", "given" if v is None else None, "as v")
    for name, rows, cache, scale in (("k", k, k_cache, k_cache_quant_scale), ("v", v, v_cache, v_cache_quant_scale)):
        if rows is not None:
            _paged(op, name, rows, cache)
            need_dtype(op, name, rows, *FLOATS)
            need_dtype(op, f"{name}_cache", cache, torch.int8, torch.float8_e4m3fn)
            need_dtype(op, f"{name}_cache_quant_scale", scale, torch.float32)
            need_shape(op, f"{name}_cache_quant_scale", scale, cache.shape[:3])
            codes, top = per_token(rows.float(), cache.dtype)
            block, place = _where(slots, cache.shape[2])
            cache.view(torch.int8)[block, :, place] = codes.view(torch.int8)
            scale[block, :, place] = top
    made = (k_cache, v_cache, k_cache_quant_scale, v_cache_quant_scale)
    return made if v is not None else made[::2]


def reshape_from_cache(key, value, key_cache, value_cache, context_lengths, max_context_len, context_seq_offset=None,
                       block_tables=None, cache_seq_offset=None):
    """key[start : start + length] = the first `length` tokens of each sequence's blocks, [tokens, heads, size]."""
    op = "reshape_from_cache"
    need(block_tables is not None, op, "block_tables", None, "a tensor (caches that are not paged are not in this stand-in)")
    need_absent(op, "a paged cache is read from its start", cache_seq_offset=cache_seq_offset)
    need_absent(op, "not in this stand-in", value=value, value_cache=value_cache)
    _paged(op, "key", key, key_cache)
    need_dtype(op, "key", key, *FLOATS, torch.int8)
    need_dtype(op, "key_cache", key_cache, key.dtype)
    need_dtype(op, "block_tables", block_tables, torch.int32)
    need_rank(op, "block_tables", block_tables, 2)
    counts = lengths(op, "context_lengths", context_lengths)
    need(len(counts) == len(block_tables), op, "context_lengths.shape", [len(counts)], f"[{len(block_tables)}]")
    need(max(counts, default=0) <= max_context_len, op, "max_context_len", max_context_len, f"at least {max(counts)}")
    starts = [sum(counts[:i]) for i in range(len(counts))]
    if context_seq_offset is not None:
        starts = lengths(op, "context_seq_offset", context_seq_offset)
    blocks, _, size, _ = key_cache.shape
    for start, count, table in zip(starts, counts, block_tables):
        used = table[: -(-count // size)].long()
        need(len(used) * size >= count, op, "block_tables.shape", list(block_tables.shape), f"blocks for {count} tokens")
        need(bool(((used >= 0) & (used < blocks)).all()), op, "block_tables", used.tolist(), f"blocks 0 to {blocks - 1}")
        need(start >= 0 and start + count <= len(key), op, "key.shape[0]", len(key), f"at least {start + count}")
        key[start : start + count] = key_cache[used].transpose(1, 2).flatten(0, 1)[:count]
