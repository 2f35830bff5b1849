"""moe_permute: a stable sort of places by expert, without atomics, then a copy of rows.

Counts per block of places and expert; sums of these over the blocks; each place's rank in its block.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.kv_write import BITS, copy_row
from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch

PLACES = 32  # of a block
EXPERTS = 16  # whose counts a program adds up over the blocks


@triton.jit
def _experts_of(ids, at, M, first, E):
    """Local experts of places; E where a place goes to none, -1 behind the last place."""
    e = tl.load(ids + at, mask=at < M, other=-1).to(tl.int64) - first
    return tl.where(at < M, tl.where((e >= 0) & (e < E), e, E), -1).to(tl.int32)


@triton.jit
def _count(ids, per_block, M, first, E, BLOCK: tl.constexpr, BE: tl.constexpr):
    block, e = tl.program_id(0), tl.arange(0, BE)
    mine = _experts_of(ids, block * BLOCK + tl.arange(0, BLOCK), M, first, E)
    tl.store(per_block + block * BE + e, tl.sum((mine[None, :] == e[:, None]).to(tl.int32), 1))


@triton.jit
def _add_up(per_block, counts, blocks, E, BLOCK: tl.constexpr, BE: tl.constexpr, WIDE: tl.constexpr):
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    total = tl.zeros((BE,), tl.int32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)[:, None]
        n = tl.load(per_block + block * WIDE + e[None, :], mask=block < blocks, other=0)
        tl.store(per_block + block * WIDE + e[None, :], total[None, :] + tl.cumsum(n, 0) - n, mask=block < blocks)
        total += tl.sum(n, 0)
    tl.store(counts + e, total, mask=e < E)


@triton.jit
def _place(ids, per_block, counts, source, target, M, first, E, BLOCK: tl.constexpr, BE: tl.constexpr):
    block, i, e = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BE)
    at = block * BLOCK + i
    mine = _experts_of(ids, at, M, first, E)
    n = tl.load(counts + e, mask=e < E, other=0)
    start = tl.cumsum(n, 0) - n + tl.load(per_block + block * BE + e)
    earlier = tl.sum(((mine[:, None] == mine[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    to = earlier + tl.sum(tl.where(mine[:, None] == e[None, :], start[None, :], 0), 1)
    tl.store(source + to, tl.where(mine < E, at, -1), mask=at < M)
    tl.store(target + at, tl.where(mine < E, to, -1), mask=at < M)


@triton.jit
def _copy(x, source, sorted, H, k, sx, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(source + row)
    if place >= 0:
        copy_row(x + (place // k).to(tl.int64) * sx, sorted + row * H, H, BLOCK)
    else:
        for start in range(0, H, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(sorted + row * H + at, tl.zeros((BLOCK,), sorted.dtype.element_ty), mask=at < H)


def sort_by_expert(
    ids: Tensor, counts: Tensor, source: Tensor, target: Tensor, first: int, empty: Callable[[tuple[int, ...], str], Tensor]
) -> None:
    """`source[m]` is the place that sorted row m comes from, `target` its inverse; both are -1 where there is none."""
    ids, M, E = ids.contiguous(), ids.numel(), len(counts)
    blocks, wide = triton.cdiv(M, PLACES), triton.next_power_of_2(E + 1)
    per_block = empty((blocks, wide), "int32")
    launch(_count, blocks, ids, per_block, M, first, E, BLOCK=PLACES, BE=wide)
    few = min(wide, EXPERTS)
    launch(_add_up, wide // few, per_block, counts, blocks, E, BLOCK=block_of(blocks, 128), BE=few, WIDE=wide)
    launch(_place, blocks, ids, per_block, counts, source, target, M, first, E, BLOCK=PLACES, BE=wide)


def copy_sorted(x: Tensor, source: Tensor, sorted: Tensor, k: int) -> None:
    x, sorted = (dense_rows(a).view(BITS[a.element_size()]) for a in (x, sorted))
    H = x.shape[1]
    launch(_copy, len(source), x, source, sorted, H, k, x.stride(0), BLOCK=block_of(H, 2048))

