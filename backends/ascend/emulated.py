"""Stand-in for the part of `torch_npu` that runs GLM-5: real schemas and documented limits on an emulated `npu`.

Written from the vendor's operator pages alone (Ascend/op-plugin, docs/zh/custom_APIs/torch_npu, products A2 and A3),
so that an adapter is held to what the vendor promises and to nothing more. What the pages leave undefined comes back
as garbage, equal scores are taken from the highest position down, and rows are in no order. A call outside the
documented limits raises RuntimeError. Results are from an emulated device, never from hardware.
"""

import functools
import importlib.machinery
import math
import sys
import types
from collections import Counter
from dataclasses import dataclass

import torch

from porthal.backends.torch.emulation import device

# Source: torch-npu 2.13.0 wheel, torch._C._jit_get_all_schemas() after import; used unchanged.
SCHEMAS = (
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)",
    'npu_lightning_indexer(Tensor query, Tensor key, Tensor weights, *, Tensor? actual_seq_lengths_query=None, '
    'Tensor? actual_seq_lengths_key=None, Tensor? block_table=None, str layout_query="BSND", '
    'str layout_key="BSND", int sparse_count=2048, int sparse_mode=3, int pre_tokens=9223372036854775807, '
    'int next_tokens=9223372036854775807, bool return_value=False) -> (Tensor, Tensor)',
    'npu_sparse_flash_attention(Tensor query, Tensor key, Tensor? value, Tensor sparse_indices, float scale_value, *, '
    'Tensor? block_table=None, Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_kv=None, '
    'Tensor? query_rope=None, Tensor? key_rope=None, int sparse_block_size=1, str layout_query="BSND", '
    'str layout_kv="BSND", int sparse_mode=3, int pre_tokens=9223372036854775807, '
    'int next_tokens=9223372036854775807, int attention_mode=0, bool return_softmax_lse=False, '
    'Tensor? sinks=None) -> (Tensor, Tensor, Tensor)',
)
VERSION = "2.13.0+emulated"
calls: Counter[str] = Counter()
_EVERY_TOKEN = 2**63 - 1
_HALVES = (torch.bfloat16, torch.float16)
_WORKSPACE = 1 << 24  # attention logits held at once
_stand_in: types.ModuleType | None = None


@dataclass(frozen=True)
class _Request:
    """One sequence: its rows of the flattened query, and the cache row of each of its logical positions."""

    first: int
    rows: int
    slots: torch.Tensor


def _need(ok: bool, op: str, argument: str, value: object, expected: str) -> None:
    if not ok:
        raise RuntimeError(f"{op}: {argument} is {value}; expected {expected}.")


def _need_given(op: str, **arguments: torch.Tensor | None) -> None:
    for name, tensor in arguments.items():
        _need(tensor is not None, op, name, None, "a tensor")


def _need_dense(op: str, **arguments: torch.Tensor) -> None:
    for name, tensor in arguments.items():
        _need(tensor.is_contiguous(), op, f"{name}.stride()", tensor.stride(), "that of a contiguous tensor")


def _need_shape(op: str, name: str, tensor: torch.Tensor, shape: list[int]) -> None:
    _need(list(tensor.shape) == shape, op, f"{name}.shape", list(tensor.shape), str(shape))


def _garbage(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """What uninitialised memory may hold: NaN, or integers that point nowhere."""
    if dtype.is_floating_point:
        return torch.full(shape, math.nan, dtype=dtype)
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _lengths(op: str, name: str, tensor: torch.Tensor) -> list[int]:
    _need(tensor.dtype == torch.int32, op, f"{name}.dtype", tensor.dtype, "torch.int32")
    _need(tensor.dim() == 1, op, f"{name}.dim()", tensor.dim(), "1")
    return tensor.tolist()


def _requests(op, query, key, table, query_lengths, key_lengths, layout_query, layout_key, mode, pre, next_, side):
    """Check what the two paged operators share and return their requests; `side` ends the key arguments' names."""
    _need(layout_query in ("BSND", "TND"), op, "layout_query", repr(layout_query), "'BSND' or 'TND'")
    _need(layout_key == "PA_BSND", op, f"layout_{side}", repr(layout_key),
          "'PA_BSND' ('BSND' and 'TND' are documented too, but this stand-in has the paged layout only)")
    _need(mode in (0, 3), op, "sparse_mode", mode, "0 or 3")
    _need(pre == _EVERY_TOKEN, op, "pre_tokens", pre, str(_EVERY_TOKEN))
    _need(next_ == _EVERY_TOKEN, op, "next_tokens", next_, str(_EVERY_TOKEN))
    _need(query.dtype in _HALVES, op, "query.dtype", query.dtype, "torch.bfloat16 or torch.float16")
    _need(key.dtype == query.dtype, op, "key.dtype", key.dtype, f"query's {query.dtype}")
    _need_dense(op, query=query, key=key)
    rank = 3 if layout_query == "TND" else 4
    _need(query.dim() == rank, op, "query.dim()", query.dim(), f"{rank} for layout {layout_query}")
    _need(key.dim() == 4, op, "key.dim()", key.dim(), "4 for layout PA_BSND")
    blocks, size = key.shape[:2]
    _need(size % 16 == 0 and 16 <= size <= 1024, op, "key's block size", size, "a multiple of 16 up to 1024")
    _need(key.shape[2] == 1, op, "key's head count", key.shape[2], "1")

    _need_given(op, **{f"actual_seq_lengths_{side}": key_lengths, "block_table": table})
    visible = _lengths(op, f"actual_seq_lengths_{side}", key_lengths)
    count = len(visible)
    if layout_query == "TND":
        _need_given(op, actual_seq_lengths_query=query_lengths)
        ends = _lengths(op, "actual_seq_lengths_query", query_lengths)
        starts = [0, *ends[:-1]]
        _need(all(0 <= a <= b <= query.shape[0] for a, b in zip(starts, ends)), op, "actual_seq_lengths_query", ends,
              f"cumulative row counts, never falling, up to {query.shape[0]}")
    else:
        batch, longest = query.shape[:2]
        rows = [longest] * batch if query_lengths is None else _lengths(op, "actual_seq_lengths_query", query_lengths)
        _need(len(rows) == batch and all(0 <= n <= longest for n in rows), op, "actual_seq_lengths_query", rows,
              f"{batch} row counts from 0 to {longest}")
        starts = [i * longest for i in range(batch)]
        ends = [start + n for start, n in zip(starts, rows)]
    _need(count == len(ends), op, f"actual_seq_lengths_{side}", visible, f"one length for each of {len(ends)} requests")
    _need(table.dtype == torch.int32, op, "block_table.dtype", table.dtype, "torch.int32")
    width = -(-max(visible, default=0) // size)
    _need(table.dim() == 2 and table.shape[0] == count and table.shape[1] >= width, op, "block_table.shape",
          list(table.shape), f"[{count}, {width} or more]")

    requests = []
    for start, end, keys, row in zip(starts, ends, visible, table):
        _need(keys >= 0, op, f"actual_seq_lengths_{side}", visible, "no negative length")
        used = row[: -(-keys // size)].long()
        _need(bool(((used >= 0) & (used < blocks)).all()), op, "block_table", used.tolist(),
              f"blocks 0 to {blocks - 1}")
        slots = (used[:, None] * size + torch.arange(size)).flatten()[:keys]
        requests.append(_Request(start, end - start, slots))
    return requests


def npu_rms_norm(input, gamma, epsilon=1e-6):
    """y = input / sqrt(mean(input^2) + epsilon) * gamma over gamma's dimensions, and the reciprocal root in float32.

    Source: npu_rms_norm page; the second result.shape: aclnnRmsNorm page.
    """
    op = "npu_rms_norm"
    _need(input.dtype in (*_HALVES, torch.float32), op, "input.dtype", input.dtype,
          "torch.bfloat16, torch.float16 or torch.float32")
    _need(gamma.dtype in (input.dtype, torch.float32), op, "gamma.dtype", gamma.dtype,
          f"input's {input.dtype} or torch.float32")
    _need(2 <= input.dim() <= 8, op, "input.dim()", input.dim(), "2 to 8")
    kept = input.dim() - gamma.dim()
    _need(0 <= kept < input.dim() and gamma.shape == input.shape[kept:], op, "gamma.shape", list(gamma.shape),
          f"the last dimensions of input's {list(input.shape)}")
    axes = list(range(kept, input.dim()))
    x = input.float()
    length = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    rstd = (length * length / gamma.numel() + epsilon) ** -0.5
    return (x * rstd * gamma.float()).to(input.dtype), rstd


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
    _need_dense(op, weights=weights)
    *rows, heads, width = query.shape
    _need(1 <= heads <= 64, op, "query's head count", heads, "1 to 64")
    _need(width == 128, op, "query.shape[-1]", width, "128")
    _need(key.shape[3] == 128, op, "key.shape[-1]", key.shape[3], "128")
    _need(weights.dtype in (query.dtype, torch.float32), op, "weights.dtype", weights.dtype,
          f"query's {query.dtype} or torch.float32")
    _need_shape(op, "weights", weights, [*rows, heads])
    _need(1 <= sparse_count <= 2048 or sparse_count in range(3072, 8193, 1024), op, "sparse_count", sparse_count,
          "1 to 2048, or 3072 to 8192 in steps of 1024")
    _need(not return_value, op, "return_value", return_value, "False for layout PA_BSND")

    indices = _garbage([*rows, 1, sparse_count], torch.int32)
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
    return indices, _garbage(list(indices.shape), query.dtype)


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
    _need(attention_mode == 2, op, "attention_mode", attention_mode, "2 (absorbed MLA)")
    _need(sparse_block_size == 1, op, "sparse_block_size", sparse_block_size,
          "1 (powers of two to 128 are documented too, but this stand-in selects single tokens only)")
    _need(not return_softmax_lse, op, "return_softmax_lse", return_softmax_lse, "False for layout PA_BSND")
    _need(sinks is None, op, "sinks", "given", "None on this product")
    _need_given(op, value=value, query_rope=query_rope, key_rope=key_rope)
    _need_dense(op, value=value, query_rope=query_rope, key_rope=key_rope, sparse_indices=sparse_indices)
    *rows, heads, width = query.shape
    _need(heads in (1, 2, 4, 8, 16, 32, 64, 128), op, "query's head count", heads, "a power of two up to 128")
    _need(width == 512, op, "query.shape[-1]", width, "512")
    _need_shape(op, "key", key, [*key.shape[:3], 512])
    _need_shape(op, "value", value, list(key.shape))
    _need_shape(op, "query_rope", query_rope, [*rows, heads, 64])
    _need_shape(op, "key_rope", key_rope, [*key.shape[:3], 64])
    for name, tensor in (("value", value), ("query_rope", query_rope), ("key_rope", key_rope)):
        _need(tensor.dtype == query.dtype, op, f"{name}.dtype", tensor.dtype, f"query's {query.dtype}")
    _need(value.data_ptr() == key.data_ptr() or torch.equal(value, key), op, "value", "other data than key",
          "key's data (absorbed MLA shares them)")
    _need(sparse_indices.dtype == torch.int32, op, "sparse_indices.dtype", sparse_indices.dtype, "torch.int32")
    _need(sparse_indices.dim() == query.dim() and sparse_indices.shape[-1] > 0, op, "sparse_indices.shape",
          list(sparse_indices.shape), f"{[*rows, 1]} and one dimension of 1 or more")
    _need_shape(op, "sparse_indices", sparse_indices, [*rows, 1, sparse_indices.shape[-1]])

    out = _garbage(list(query.shape), query.dtype)
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
            _need(not bool((present[:, 1:] & ~present[:, :-1]).any()), op, "sparse_indices",
                  "a position after a -1", "positions first and -1 after them in every row")
            _need(bool(((picked >= -1) & (picked < length)).all()), op, "sparse_indices",
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
    return out, _garbage(statistic, torch.float32), _garbage(statistic, torch.float32)


def _on_npu(kernel):
    """Run a kernel written for host aliases on device tensors; tensors elsewhere are refused, nothing is copied."""

    def alias(x):
        return device.on_host(x) if isinstance(x, torch.Tensor) else x

    @functools.wraps(kernel)
    def run(*args, **kwargs):
        calls[kernel.__name__] += 1
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        where = device.check_same_device(f"npu::{kernel.__name__}", given).index
        results = kernel(*map(alias, args), **{name: alias(x) for name, x in kwargs.items()})
        return tuple(device.on_device(result, where) for result in results)

    return run


def install(count: int = 1) -> types.ModuleType:
    """Emulate `npu` with `count` devices, put the stand-in where `import torch_npu` finds it, and return it.

    Raises RuntimeError if the real torch_npu is loaded or another vendor is emulated in this process.
    """
    global _stand_in
    loaded = sys.modules.get("torch_npu")
    if loaded is not None and loaded is not _stand_in:
        raise RuntimeError("torch_npu is already imported; emulate Ascend in a process that has not loaded it.")
    npu = device.install("npu", count)
    if _stand_in is None:
        _stand_in = types.ModuleType("torch_npu", __doc__)
        _stand_in.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
        _stand_in.__version__, _stand_in.npu, _stand_in._libraries = VERSION, npu, torch.library.Library("npu", "DEF")
        for schema, kernel in zip(SCHEMAS, (npu_rms_norm, npu_lightning_indexer, npu_sparse_flash_attention)):
            name = _stand_in._libraries.define(schema)
            _stand_in._libraries.impl(name, _on_npu(kernel), "PrivateUse1")
            setattr(_stand_in, name, getattr(torch.ops.npu, name))
        sys.modules["torch_npu"] = _stand_in
    return _stand_in
