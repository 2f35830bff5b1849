"""argmax: one program per row and part, then one per row. Key and position make one integer, the lowest position highest."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch
from porthal.backends.cuda.kernels.ordering import key_of

PART = 8192  # logits
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _highest(logits, best, V, slogits, parts, BLOCK: tl.constexpr):
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    at = part * BLOCK + tl.arange(0, BLOCK)
    keys = key_of(tl.load(logits + row * slogits + at, mask=at < V, other=0.0)).to(tl.int64)
    packed = tl.where(at < V, (keys << 32) | (0x7FFFFFFF - at).to(tl.int64), NOTHING)
    tl.store(best + row * parts + part, tl.max(packed, 0))


@triton.jit
def _position(best, ids, parts, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    packed = tl.load(best + row * parts + part, mask=part < parts, other=NOTHING)
    tl.store(ids + row, (0x7FFFFFFF - (tl.max(packed, 0) & 0x7FFFFFFF)).to(tl.int32))


def parts_of(V: int) -> int:
    return triton.cdiv(V, PART)


def argmax(logits: Tensor, best: Tensor, ids: Tensor) -> None:
    """`best` is int64 [T, parts]."""
    logits = dense_rows(logits)
    (T, V), parts = logits.shape, best.shape[1]
    launch(_highest, T * parts, logits, best, V, logits.stride(0), parts, BLOCK=block_of(V, PART), num_warps=8)
    launch(_position, T, best, ids, parts, BLOCK=triton.next_power_of_2(parts), num_warps=1)
