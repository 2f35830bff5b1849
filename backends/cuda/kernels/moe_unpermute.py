"""moe_unpermute: the inverse of `source`, then one program per row and block of columns, which adds in the order of choices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch

PLACES = 1024  # of a block


@triton.jit
def _invert(source, target, M, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(source + at, mask=at < M, other=-1)
    tl.store(target + place, at, mask=place >= 0)


@triton.jit
def _combine(sorted, target, weights, y, H, k, ssorted, BLOCK: tl.constexpr):
    blocks = tl.cdiv(H, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        m = tl.load(target + row * k + j).to(tl.int64)
        part = tl.load(sorted + m * ssorted + at, mask=(at < H) & (m >= 0), other=0.0).to(tl.float32)
        weight = tl.load(weights + row * k + j)
        total += tl.where(m >= 0, weight * part, 0.0)
    tl.store(y + row * H + at, total.to(y.dtype.element_ty), mask=at < H)


def invert(source: Tensor, target: Tensor) -> None:
    """`target` is -1 everywhere at first."""
    source, M = source.contiguous(), len(source)
    launch(_invert, triton.cdiv(M, PLACES), source, target, M, BLOCK=PLACES)


def combine(sorted: Tensor, target: Tensor, weights: Tensor, y: Tensor) -> None:
    sorted, weights = dense_rows(sorted), weights.contiguous()
    T, H = y.shape
    block = block_of(H, 1024)
    launch(
        _combine, T * triton.cdiv(H, block), sorted, target, weights, y, H, weights.shape[1], sorted.stride(0), BLOCK=block
    )
