"""rms_norm and add_rms_norm: one program per row, which is read twice, the second time from a cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch


@triton.jit
def _rms_norm(x, residual, weight, y, r, H, sx, sresidual, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * sx
    residual += row * sresidual
    y += row * H
    r += row * H
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, H, BLOCK):
        at = start + columns
        v = tl.load(x + at, mask=at < H, other=0.0).to(tl.float32)
        if ADD:
            v += tl.load(residual + at, mask=at < H, other=0.0).to(tl.float32)
            tl.store(r + at, v.to(r.dtype.element_ty), mask=at < H)
        squares += v * v
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / H + eps)
    for start in range(0, H, BLOCK):
        at = start + columns
        v = tl.load(x + at, mask=at < H, other=0.0).to(tl.float32)
        if ADD:
            v += tl.load(residual + at, mask=at < H, other=0.0).to(tl.float32)
        g = tl.load(weight + at, mask=at < H, other=0.0).to(tl.float32)
        tl.store(y + at, (v * scale * g).to(y.dtype.element_ty), mask=at < H)


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, r: Tensor | None, eps: float) -> None:
    x, weight = dense_rows(x), weight.contiguous()
    second = x if residual is None else dense_rows(residual)
    T, H = x.shape
    block = block_of(H, 8192)
    launch(
        _rms_norm, T, x, second, weight, y, y if r is None else r, H, x.stride(0), second.stride(0), eps,
        ADD=residual is not None, BLOCK=block, num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
