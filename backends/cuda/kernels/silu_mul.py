"""silu_mul: one program per row and block of columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_mul(x, y, I, sx, BLOCK: tl.constexpr):
    blocks = tl.cdiv(I, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * sx + at, mask=at < I, other=0.0).to(tl.float32)
    up = tl.load(x + row * sx + I + at, mask=at < I, other=0.0).to(tl.float32)
    tl.store(y + row * I + at, (silu(gate) * up).to(y.dtype.element_ty), mask=at < I)


def silu_mul(x: Tensor, y: Tensor) -> None:
    x = dense_rows(x)
    T, I = y.shape
    block = block_of(I, 2048)
    launch(_silu_mul, T * triton.cdiv(I, block), x, y, I, x.stride(0), BLOCK=block)
