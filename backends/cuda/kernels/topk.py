"""topk: one program per row. A radix select finds the k-th highest key exactly, eight bits at a time; then everything above it
is taken, and the lowest positions of what equals it, in rising order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch
from porthal.backends.cuda.kernels.ordering import key_of


@triton.jit
def _keys(scores, at, seen):
    """uint32, rising with the score."""
    return key_of(tl.load(scores + at, mask=at < seen, other=0.0)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _topk(scores, visible, indices, length, k, sscores, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + row)
    tl.store(length + row, tl.minimum(seen, k))
    scores += row * sscores
    indices += row * k
    within = tl.arange(0, BLOCK)
    if seen <= k:
        for start in range(0, k, BLOCK):
            at = start + within
            tl.store(indices + at, tl.where(at < seen, at, -1), mask=at < k)
    else:
        digit = tl.arange(0, 256)
        edge, missing = tl.full((), 0, tl.uint32), k
        for turn in tl.static_range(4):
            counts = tl.zeros((256,), tl.int32)
            for start in range(0, seen, BLOCK):
                at = start + within
                keys = _keys(scores, at, seen)
                alive = at < seen
                if turn > 0:
                    alive &= (keys >> (32 - 8 * turn)) == (edge >> (32 - 8 * turn))
                digits = ((keys >> (24 - 8 * turn)) & 255).to(tl.int32)
                counts += tl.histogram(tl.where(alive, digits, 0), 256)
                counts -= tl.where(digit == 0, BLOCK - tl.sum(alive.to(tl.int32), 0), 0)
            above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
            chosen = tl.sum((above >= missing).to(tl.int32), 0)
            missing -= tl.sum(tl.where(digit == chosen, above, 0), 0)
            edge |= chosen.to(tl.uint32) << (24 - 8 * turn)
        taken, level_taken = 0, 0
        for start in range(0, seen, BLOCK):
            at = start + within
            keys = _keys(scores, at, seen)
            level = ((at < seen) & (keys == edge)).to(tl.int32)
            rank = level_taken + tl.cumsum(level, 0)
            here = (((at < seen) & (keys > edge)) | ((level > 0) & (rank <= missing))).to(tl.int32)
            tl.store(indices + taken + tl.cumsum(here, 0) - 1, at, mask=here > 0)
            taken += tl.sum(here, 0)
            level_taken += tl.sum(level, 0)


def topk(scores: Tensor, visible: Tensor, indices: Tensor, length: Tensor) -> None:
    scores = dense_rows(scores)
    block = block_of(max(scores.shape[1], 1), 4096)
    launch(
        _topk, len(length), scores, visible, indices, length, indices.shape[1], scores.stride(0), BLOCK=block,
        num_warps=16 if block > 2048 else 4,
    )  # fmt: skip
