"""Top-k selection by the lightning indexer and attention over what it selected, of bfloat16 and of int8 caches."""

import torch

from porthal.backends.ascend.emulated.paged import attend, need_indices, requests_of, select
from porthal.backends.ascend.emulated.products import EVERY_TOKEN, HALVES
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_given,
    need_one_of,
    need_shape,
)


def npu_lightning_indexer(query, key, weights, *, actual_seq_lengths_query=None, actual_seq_lengths_key=None,
                          block_table=None, layout_query="BSND", layout_key="BSND", sparse_count=2048, sparse_mode=3,
                          pre_tokens=EVERY_TOKEN, next_tokens=EVERY_TOKEN, return_value=False):
    """Per query row, the `sparse_count` visible positions with the largest sum_h weights_h * relu(query_h . key).

    int32 positions within the request, in no order, -1 after the last, and no values in the paged layout.
    Source: npu_lightning_indexer page; the empty second result: torch-npu 2.13.0 on a stub runtime.
    """
    op = "npu_lightning_indexer"
    need_dtype(op, "query", query, *HALVES)
    need_dtype(op, "key", key, query.dtype)
    requests = requests_of(op, query, key, block_table, actual_seq_lengths_query, actual_seq_lengths_key, layout_query,
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

    q, w = query.reshape(-1, heads, 128).float(), weights.reshape(-1, heads).float()
    indices = select(requests, rows, sparse_count, sparse_mode, lambda slots: [key.view(-1, 128)[slots].float()],
                     lambda at, keys: w[at] @ (q[at] @ keys.T).clamp(min=0))
    return indices, garbage([0], query.dtype)


def npu_sparse_flash_attention(query, key, value, sparse_indices, scale_value, *, block_table=None,
                               actual_seq_lengths_query=None, actual_seq_lengths_kv=None, query_rope=None,
                               key_rope=None, sparse_block_size=1, layout_query="BSND", layout_kv="BSND",
                               sparse_mode=3, pre_tokens=EVERY_TOKEN, next_tokens=EVERY_TOKEN, attention_mode=0,
                               return_softmax_lse=False, sinks=None):
    """softmax(scale_value * [query, query_rope] . [key, key_rope]^T over sparse_indices) @ key, absorbed MLA.

    Rows without a selected position are undefined. So are the two softmax statistics: the page has them for other
    layouts only, where they are asked for nevertheless torch-npu 2.13.0 returns them, in the TND layout of a shape that
    the cache's block size enters. Source: npu_sparse_flash_attention page; the shapes: torch-npu on a stub runtime.
    """
    op = "npu_sparse_flash_attention"
    need_dtype(op, "query", query, *HALVES)
    need_dtype(op, "key", key, query.dtype)
    requests = requests_of(op, query, key, block_table, actual_seq_lengths_query, actual_seq_lengths_kv, layout_query,
                           layout_kv, sparse_mode, pre_tokens, next_tokens, "kv")
    need(attention_mode == 2, op, "attention_mode", attention_mode, "2 (absorbed MLA)")
    need(sparse_block_size == 1, op, "sparse_block_size", sparse_block_size,
          "1 (powers of two to 128 are documented too, but this stand-in selects single tokens only)")
    need(sinks is None, op, "sinks", "given", "None on this product")
    need_given(op, value=value, query_rope=query_rope, key_rope=key_rope)
    need_dense(op, value=value, query_rope=query_rope, key_rope=key_rope)
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
    need_indices(op, sparse_indices, query, rows)

    def keys_of(slots):
        return torch.cat([key.view(-1, 512)[slots], key_rope.view(-1, 64)[slots]], -1).float()

    out = attend(op, requests, torch.cat([query, query_rope], -1), sparse_indices, scale_value, sparse_mode, keys_of)
    if not return_softmax_lse:
        statistic = [0]
    elif layout_query == "BSND":
        statistic = [rows[0], 1, rows[1], heads]
    else:
        statistic = [key.shape[1], rows[0], heads // key.shape[1]]
    return out, garbage(statistic, torch.float32), garbage(statistic, torch.float32)


def npu_quant_lightning_indexer(query, key, weights, query_dequant_scale, key_dequant_scale, query_quant_mode, key_quant_mode,
                                *, actual_seq_lengths_query=None, actual_seq_lengths_key=None, block_table=None,
                                layout_query="BSND", layout_key="BSND", sparse_count=2048, sparse_mode=3,
                                pre_tokens=EVERY_TOKEN, next_tokens=EVERY_TOKEN, query_dtype=None, key_dtype=None):
    """As npu_lightning_indexer, by sum_h weights_h * relu(query_scale_h * key_scale * (query_h . key)) of int8 numbers.

    Source: npu_quant_lightning_indexer page.
    """
    op = "npu_quant_lightning_indexer"
    for name, tensor in (("query", query), ("key", key)):
        need_dtype(op, name, tensor, torch.int8)
    need_one_of(op, "query_quant_mode", query_quant_mode, 0)
    need_one_of(op, "key_quant_mode", key_quant_mode, 0)
    need_absent(op, "int8 needs none", query_dtype=query_dtype, key_dtype=key_dtype)
    requests = requests_of(op, query, key, block_table, actual_seq_lengths_query, actual_seq_lengths_key, layout_query,
                           layout_key, sparse_mode, pre_tokens, next_tokens, "key")
    *rows, heads, width = query.shape
    need(1 <= heads <= 64, op, "query's head count", heads, "1 to 64")
    need(width == 128, op, "query.shape[-1]", width, "128")
    need(key.shape[3] == 128, op, "key.shape[-1]", key.shape[3], "128")
    shapes = {"weights": (weights, [*rows, heads]), "query_dequant_scale": (query_dequant_scale, [*rows, heads]),
              "key_dequant_scale": (key_dequant_scale, key.shape[:3])}
    for name, (tensor, shape) in shapes.items():
        need_dtype(op, name, tensor, torch.float16)
        need_shape(op, name, tensor, shape)
        need_dense(op, **{name: tensor})
    need(1 <= sparse_count <= 2048, op, "sparse_count", sparse_count, "1 to 2048")
    w, q_scale = weights.reshape(-1, heads).float(), query_dequant_scale.reshape(-1, heads).float()
    for request in requests:
        weighed = (w * q_scale)[request.first : request.first + request.rows]
        need(not bool((weighed.abs() > 65504).any()), op, "weights * query_dequant_scale", "beyond 65504", "numbers of float16")
    q, k, k_scale = query.reshape(-1, heads, 128).float(), key.view(-1, 128), key_dequant_scale.view(-1).float()
    return select(requests, rows, sparse_count, sparse_mode, lambda slots: [k[slots].float(), k_scale[slots]],
                  lambda at, keys, scale: w[at] @ (q_scale[at, :, None] * scale * (q[at] @ keys.T)).clamp(min=0))


def npu_kv_quant_sparse_flash_attention(query, key, value, sparse_indices, scale_value, key_quant_mode, value_quant_mode, *,
                                        key_dequant_scale=None, value_dequant_scale=None, block_table=None,
                                        actual_seq_lengths_query=None, actual_seq_lengths_kv=None, sparse_block_size=1,
                                        layout_query="BSND", layout_kv="BSND", sparse_mode=3, pre_tokens=EVERY_TOKEN,
                                        next_tokens=EVERY_TOKEN, attention_mode=0, quant_scale_repo_mode=1, tile_size=128,
                                        rope_head_dim=64, key_dtype=None, value_dtype=None):
    """As npu_sparse_flash_attention, of rows of 656 bytes: 512 int8, 64 rotated of query's dtype, 4 float32 scales.

    A scale is of 128 int8. The query's 576 numbers are latent, then rotated; the result has 512, as the package's shape
    function says (the page: query's shape). Source: npu_kv_quant_sparse_flash_attention page.
    """
    op = "npu_kv_quant_sparse_flash_attention"
    need_dtype(op, "query", query, *HALVES)
    for name, tensor in (("key", key), ("value", value)):
        need_dtype(op, name, tensor, torch.int8)
    need_absent(op, "int8 rows carry their scales", key_dequant_scale=key_dequant_scale, key_dtype=key_dtype,
                value_dequant_scale=value_dequant_scale, value_dtype=value_dtype)
    requests = requests_of(op, query, key, block_table, actual_seq_lengths_query, actual_seq_lengths_kv, layout_query,
                           layout_kv, sparse_mode, pre_tokens, next_tokens, "kv")
    only = (("key_quant_mode", key_quant_mode, 2), ("value_quant_mode", value_quant_mode, 2),
            ("attention_mode", attention_mode, 2), ("quant_scale_repo_mode", quant_scale_repo_mode, 1),
            ("tile_size", tile_size, 128), ("rope_head_dim", rope_head_dim, 64))
    for name, number, allowed in only:
        need_one_of(op, name, number, allowed)
    need(sparse_block_size == 1, op, "sparse_block_size", sparse_block_size,
         "1 (powers of two to 16 are documented too, but this stand-in selects single tokens only)")
    *rows, heads, width = query.shape
    need(heads in (1, 2, 4, 8, 16, 32, 64, 128), op, "query's head count", heads, "a power of two up to 128")
    need(width == 576, op, "query.shape[-1]", width, "576")
    need_shape(op, "key", key, [*key.shape[:3], 656])
    need_shape(op, "value", value, key.shape)
    need(value.data_ptr() == key.data_ptr() or torch.equal(value, key), op, "value", "other data than key",
         "key's data (absorbed MLA shares them)")
    need_indices(op, sparse_indices, query, rows)

    def keys_of(slots):
        packed = key.view(-1, 656)[slots]
        scale = packed[:, 640:].contiguous().view(torch.float32).repeat_interleave(128, 1)
        return torch.cat([packed[:, :512].float() * scale, packed[:, 512:640].contiguous().view(query.dtype).float()], -1)

    return attend(op, requests, query, sparse_indices, scale_value, sparse_mode, keys_of)
