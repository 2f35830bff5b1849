"""sparse_mla: one program per row, block of heads and part of its keys; parts are merged in their order.

Keys are gathered through the block table where they are used. One part is enough where rows fill the chip, so that prefill
merges nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import LARGE, block_of, dense_rows, launch


class Tile(NamedTuple):
    heads: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _sparse_mla(
    q, qr, c, kp, indices, length, request, table, o, highest, norm, parts, N, C, R, sq, sqn, sqr, sqrn, sc, skp,
    sindices, stable, size, scale, SPLIT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BN)
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts % blocks
    row = (tl.program_id(0) // parts // blocks).to(tl.int64)
    head, d, dr = block * BN + tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, BR)
    near, rope = (head < N)[:, None] & (d < C)[None, :], (head < N)[:, None] & (dr < R)[None, :]
    query = tl.load(q + row * sq + head[:, None] * sqn + d[None, :], mask=near, other=0.0)
    query_rope = tl.load(qr + row * sqr + head[:, None] * sqrn + dr[None, :], mask=rope, other=0.0)
    table += tl.load(request + row).to(tl.int64) * stable
    n = tl.load(length + row)
    each = tl.cdiv(tl.cdiv(n, parts), BK) * BK
    end = tl.minimum(n, (part + 1) * each)

    most = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    sums = tl.zeros((BN, BC), tl.float32)
    for start in range(part * each, end, BK):
        j = start + tl.arange(0, BK)
        position = tl.load(indices + row * sindices + j, mask=j < end, other=0)
        page = tl.load(table + position // size, mask=j < end, other=0)
        slot = (page.to(tl.int64) * size + position % size)[:, None]
        key = tl.load(c + slot * sc + d[None, :], mask=(j < end)[:, None] & (d < C)[None, :], other=0.0)
        key_rope = tl.load(kp + slot * skp + dr[None, :], mask=(j < end)[:, None] & (dr < R)[None, :], other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        logits = tl.dot(query_rope, tl.trans(key_rope), logits, input_precision="ieee")
        logits = tl.where((j < end)[None, :], logits * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        shares = tl.exp(logits - higher[:, None])
        kept = tl.exp(most - higher)
        total = total * kept + tl.sum(shares, 1)
        sums = tl.dot(shares.to(key.dtype), key, sums * kept[:, None], input_precision="ieee")
        most = higher

    if SPLIT:
        at = (row * N + head) * parts + part
        tl.store(highest + at, most, mask=head < N)
        tl.store(norm + at, total, mask=head < N)
        tl.store(o + at[:, None] * C + d[None, :], sums, mask=near)
    else:
        sums *= (1.0 / tl.where(total > 0, total, 1.0))[:, None]
        tl.store(o + (row * N + head[:, None]) * C + d[None, :], sums.to(o.dtype.element_ty), mask=near)


@triton.jit
def _merge(sums, highest, norm, o, C, parts, BP: tl.constexpr, BC: tl.constexpr):
    """A head of a query row, and a block of its columns: all parts are read at once, as each waits for memory alone."""
    blocks = tl.cdiv(C, BC)
    row, part = (tl.program_id(0) // blocks).to(tl.int64), tl.arange(0, BP)
    d, at, here = tl.program_id(0) % blocks * BC + tl.arange(0, BC), row * parts + part, part < parts
    own = tl.load(highest + at, mask=here, other=float("-inf"))
    most = tl.max(own, 0)
    share = tl.exp(own - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(share * tl.load(norm + at, mask=here, other=0.0), 0)
    found = tl.load(sums + at[:, None] * C + d[None, :], mask=here[:, None] & (d < C)[None, :], other=0.0)
    result = tl.sum(share[:, None] * found, 0) / tl.where(total > 0, total, 1.0)
    tl.store(o + row * C + d, result.to(o.dtype.element_ty), mask=d < C)


def tile_for(N: int, wide: bool, width: int, shared: int) -> Tile:
    """`width` elements of a key, as wide as float32 or half of that; a program may hold `shared` bytes of shared memory."""
    little = shared < 96 << 10
    heads = block_of(N, 16 if wide or little else 32 if shared < LARGE else 64)
    keys = 16 if wide or little else 64 if heads == 16 and shared >= LARGE else 32
    stage = keys * width * (4 if wide else 2)
    return Tile(heads, keys, 8 if heads >= 32 or keys > 32 else 4, 2 if 3 * stage <= shared else 1)


def sparse_mla(
    q: Tensor, qr: Tensor, c: Tensor, kp: Tensor, indices: Tensor, length: Tensor, request: Tensor, table: Tensor, size: int,
    scale: float, o: Tensor, processors: int, shared: int, empty: Callable[[tuple[int, ...], str], Tensor],
) -> None:  # fmt: skip
    q, qr, c, kp, indices = map(dense_rows, (q, qr, c, kp, indices))
    T, N, C = q.shape
    tile = tile_for(N, q.element_size() == 4, C + qr.shape[2], shared)
    programs = T * triton.cdiv(N, tile.heads)
    parts = max(1, min(processors // max(programs, 1), indices.shape[1] // (2 * tile.keys)))
    split = parts > 1
    sums, highest, norm = o, o, o
    if split:
        sums = empty((T, N, parts, C), "float32")
        highest, norm = empty((T, N, parts), "float32"), empty((T, N, parts), "float32")
    launch(
        _sparse_mla, programs * parts, q, qr, c, kp, indices, length, request, table, sums, highest, norm, parts,
        N, C, qr.shape[2], q.stride(0), q.stride(1), qr.stride(0), qr.stride(1), c.stride(0), kp.stride(0),
        indices.stride(0), table.stride(0), size, scale, SPLIT=split, BN=tile.heads, BC=block_of(C, 1 << 16),
        BR=block_of(qr.shape[2], 1 << 16), BK=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split:
        wide, all_parts = block_of(C, 128), triton.next_power_of_2(parts)
        warps = 8 if all_parts > 32 else 4
        launch(_merge, T * N * triton.cdiv(C, wide), sums, highest, norm, o, C, parts, BP=all_parts, BC=wide, num_warps=warps)
