"""kunlun_ops and xspeedgate_ops: writing the latent cache and the indexer's codes, gathering codes, naming slots."""

from itertools import pairwise

import torch

from porthal.backends.kunlunxin.emulated.vectors import FLOATS, HALVES
from porthal.backends.torch.emulation.stand_in import (
    lengths,
    need,
    need_dense,
    need_dtype,
    need_rank,
    need_shape,
)


def _slots(op, slot_mapping, count, most):
    """Slots to write. What a slot below 0 does is not published."""
    need_dtype(op, "slot_mapping", slot_mapping, torch.int64)
    need_shape(op, "slot_mapping", slot_mapping, [count])
    need(bool(((slot_mapping >= 0) & (slot_mapping < most)).all()), op, "slot_mapping", slot_mapping.tolist(),
         f"0 to {most - 1}")
    return slot_mapping


def concat_and_cache_mla(kv_c, k_pe, slot_mapping, kv_cache):
    """The row of `slot` in kv_cache [blocks, block, width] = kv_c | k_pe."""
    op = "concat_and_cache_mla"
    need_dtype(op, "kv_c", kv_c, *HALVES)
    need_dense(op, kv_c=kv_c, k_pe=k_pe, kv_cache=kv_cache)
    need_rank(op, "kv_c", kv_c, 2)
    need_rank(op, "kv_cache", kv_cache, 3)
    width = kv_cache.shape[2] - kv_c.shape[1]
    need_shape(op, "k_pe", k_pe, [len(kv_c), width])
    need_dtype(op, "k_pe", k_pe, kv_c.dtype)
    need_dtype(op, "kv_cache", kv_cache, kv_c.dtype)
    rows = kv_cache.view(-1, kv_cache.shape[2])
    rows[_slots(op, slot_mapping, len(kv_c), len(rows))] = torch.cat([kv_c, k_pe], 1)


def _pages(op, kv_cache, size):
    """Codes [blocks, block, size] and scales [blocks, block] of pages that hold all codes, then all scales."""
    need_dtype(op, "kv_cache", kv_cache, torch.uint8)
    need_rank(op, "kv_cache", kv_cache, 3)
    need_dense(op, kv_cache=kv_cache)
    blocks, block, width = kv_cache.shape
    need(width == size + 4, op, "kv_cache.shape[2]", width, f"{size + 4}, codes and a float32")
    flat = kv_cache.view(blocks, -1)
    codes, scales = flat[:, : block * size], flat[:, block * size :]
    return codes.view(torch.int8).unflatten(1, (block, size)), scales.view(torch.float32)


def indexer_k_quant_and_cache(k, kv_cache, slot_mapping, quant_block_size, scale_fmt):
    """Codes of k and the scale amax / 127 of each row into its slot; scale_fmt is passed and changes nothing."""
    op = "indexer_k_quant_and_cache"
    need_dtype(op, "k", k, *FLOATS)
    need_rank(op, "k", k, 2)
    need_dense(op, k=k)
    need(quant_block_size == k.shape[1], op, "quant_block_size", quant_block_size, f"{k.shape[1]}, one scale a row")
    codes, scales = _pages(op, kv_cache, k.shape[1])
    block = kv_cache.shape[1]
    slots = _slots(op, slot_mapping, len(k), len(kv_cache) * block)
    scale = k.float().abs().amax(-1) / 127
    codes[slots // block, slots % block] = (k.float() / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8)
    scales[slots // block, slots % block] = scale


def _blocks(op, table, count, size, blocks):
    used = table[: -(-count // size)].long()
    need(len(used) * size >= count, op, "block_table.shape[1]", len(table), f"blocks for {count} tokens")
    need(bool(((used >= 0) & (used < blocks)).all()), op, "block_table", used.tolist(), f"blocks 0 to {blocks - 1}")
    return used


def cp_gather_indexer_k_quant_cache(*, kv_cache, dst_k, dst_scale, block_table, cu_seq_lens):
    """dst_k and dst_scale (the bytes of float32) = what the sequences' slots hold, one sequence after another."""
    op = "cp_gather_indexer_k_quant_cache"
    need_dtype(op, "dst_k", dst_k, torch.int8)
    need_dtype(op, "dst_scale", dst_scale, torch.uint8)
    need_shape(op, "dst_scale", dst_scale, [len(dst_k), 4])
    need_dense(op, dst_k=dst_k, dst_scale=dst_scale)
    codes, scales = _pages(op, kv_cache, dst_k.shape[1])
    need_dtype(op, "block_table", block_table, torch.int32)
    ends = lengths(op, "cu_seq_lens", cu_seq_lens)
    need(len(ends) == len(block_table) + 1 and ends[0] == 0 and ends[-1] == len(dst_k) and ends == sorted(ends), op,
         "cu_seq_lens", ends, f"{len(block_table) + 1} ascending numbers from 0 to {len(dst_k)}")
    for (start, end), table in zip(pairwise(ends), block_table):
        used = _blocks(op, table, end - start, kv_cache.shape[1], len(kv_cache))
        dst_k[start:end] = codes[used].flatten(0, 1)[: end - start]
        dst_scale.view(torch.float32)[start:end, 0] = scales[used].flatten()[: end - start]


def convert_req_index_to_global_index(*, req_id, block_table, token_indices, block_size, num_topk_tokens):
    """The slots, block * size + place, of positions in each row's request; -1 stays -1."""
    op = "convert_req_index_to_global_index"
    for name, tensor in (("req_id", req_id), ("block_table", block_table), ("token_indices", token_indices)):
        need_dtype(op, name, tensor, torch.int32)
    need_dense(op, req_id=req_id, block_table=block_table, token_indices=token_indices)
    need_shape(op, "req_id", req_id, [len(token_indices)])
    need_shape(op, "token_indices", token_indices, [len(token_indices), num_topk_tokens])
    requests, columns = block_table.shape
    need(bool(((req_id >= 0) & (req_id < requests)).all()), op, "req_id", req_id.tolist(), f"0 to {requests - 1}")
    named = token_indices >= 0
    need(bool(((token_indices >= -1) & (token_indices < columns * block_size)).all()), op, "token_indices",
         f"{int(token_indices.min())} to {int(token_indices.max())}", f"-1 to {columns * block_size - 1}")
    at = token_indices.clamp(min=0).long()
    blocks = block_table[req_id.long()[:, None], at // block_size]
    need(bool((blocks[named] >= 0).all()), op, "block_table", "below 0 where it is read", "blocks from 0")
    return torch.where(named, blocks * block_size + (at % block_size).int(), -1)
