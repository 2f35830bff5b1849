"""rope: one program per row and block of heads.

Angles are float64, as an angle in float32 is off by its size in ulps. What is left of one after quarter turns is small enough
for Cephes' polynomials in float32, so that sine and cosine are the same on every chip.
"""

from __future__ import annotations

from math import log2

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch

QUARTER = tl.constexpr(1.5707963267948966)


@triton.jit
def sine_and_cosine(angle, BLOCK: tl.constexpr):
    """float32, of a float64 angle that is not negative."""
    turns = tl.floor(angle / tl.full((BLOCK,), QUARTER, tl.float64) + 0.5)
    x = (angle - turns * tl.full((BLOCK,), QUARTER, tl.float64)).to(tl.float32)
    z = x * x
    sin = x + x * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cos = 1.0 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    quarter = turns.to(tl.int32) & 3
    swapped = (quarter & 1) == 1
    a, b = tl.where(swapped, cos, sin), tl.where(swapped, sin, cos)
    return tl.where(quarter >= 2, -a, a), tl.where((quarter == 1) | (quarter == 2), -b, b)


@triton.jit
def _rope(
    x, positions, y, N, D, sx, sxn, start, WIDTH: tl.constexpr, OCTAVES: tl.constexpr, INTERLEAVED: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * BN + tl.arange(0, BN)[:, None]
    x += row * sx + head * sxn
    y += (row * N + head) * D
    d = tl.arange(0, BD)[None, :]
    outside = (head < N) & (d < D) & ((d < start) | (d >= start + WIDTH))
    tl.store(y + d, tl.load(x + d, mask=outside, other=0.0), mask=outside)

    pair = tl.arange(0, BP)
    frequency = tl.exp2(pair.to(tl.float64) * tl.full((BP,), OCTAVES, tl.float64))
    angle = tl.load(positions + row).to(tl.float64) * frequency
    sin, cos = sine_and_cosine(angle, BP)
    sin, cos = sin[None, :], cos[None, :]
    if INTERLEAVED:
        first = start + 2 * pair[None, :]
        second = first + 1
    else:
        first = start + pair[None, :]
        second = first + WIDTH // 2
    inside = (head < N) & (pair[None, :] < WIDTH // 2)
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + first, (a * cos - b * sin).to(y.dtype.element_ty), mask=inside)
    tl.store(y + second, (b * cos + a * sin).to(y.dtype.element_ty), mask=inside)


def rope(x: Tensor, positions: Tensor, y: Tensor, theta: float, layout: str, start: int, width: int) -> None:
    x = dense_rows(x)
    T, N, D = x.shape
    heads = block_of(N, max(1, 4096 // triton.next_power_of_2(D)), least=1)
    launch(
        _rope, T * triton.cdiv(N, heads), x, positions, y, N, D, x.stride(0), x.stride(1), start, WIDTH=width,
        OCTAVES=-2.0 * log2(theta) / width, INTERLEAVED=layout == "interleaved", BN=heads,
        BD=triton.next_power_of_2(D), BP=triton.next_power_of_2(width // 2),
    )  # fmt: skip
