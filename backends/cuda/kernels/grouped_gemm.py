"""grouped_gemm, and the gated product of moe_experts: as many programs as processors, each of which walks over tiles.

Which expert a tile belongs to is found from the counts on the device, so nothing waits for the host.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import LARGE, block_of, dense_rows, launch
from porthal.backends.cuda.kernels.silu_mul import silu


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def _grouped_gemm(
    x, w, counts, source, y, N, K, E, choices, sx, sw, swn, GATHERED: tl.constexpr, GATED: tl.constexpr,
    BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, BE)
    rows = tl.load(counts + e, mask=e < E, other=0)
    tiles = (rows + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    across = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0) * across, tl.num_programs(0)):
        done = ends <= tile // across
        expert = tl.sum(done.to(tl.int32), 0)
        inner = (tile // across - tl.sum(tl.where(done, tiles, 0), 0)) * BM + tl.arange(0, BM)
        inside = (inner < tl.sum(tl.where(e == expert, rows, 0), 0))[:, None]
        m = tl.sum(tl.where(done, rows, 0), 0) + inner[:, None]
        if GATHERED:
            taken = (tl.load(source + m, mask=inside, other=0) // choices).to(tl.int64)
        else:
            taken = m.to(tl.int64)
        n = (tile % across * BN + tl.arange(0, BN))[None, :]
        depth = tl.arange(0, BK)
        left = x + taken * sx + depth[None, :]
        above = tl.full((), N, tl.int64) * swn
        right = w + expert.to(tl.int64) * sw + n.to(tl.int64) * swn + depth[:, None]
        sums, gated = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            if EVEN:
                a = tl.load(left, mask=inside, other=0.0)
                b = tl.load(right, mask=n < N, other=0.0)
            else:
                a = tl.load(left, mask=inside & (start + depth[None, :] < K), other=0.0)
                b = tl.load(right, mask=(n < N) & (start + depth[:, None] < K), other=0.0)
            sums = tl.dot(a, b, sums, input_precision="ieee")
            if GATED:
                up = right + above
                if EVEN:
                    b = tl.load(up, mask=n < N, other=0.0)
                else:
                    b = tl.load(up, mask=(n < N) & (start + depth[:, None] < K), other=0.0)
                gated = tl.dot(a, b, gated, input_precision="ieee")
            left += BK
            right += BK
        if GATED:
            sums = silu(sums) * gated
        tl.store(y + m.to(tl.int64) * N + n, sums.to(y.dtype.element_ty), mask=inside & (n < N))


def tile_for(rows_per_expert: float, K: int, wide: bool, gated: bool, shared: int) -> Tile:
    """By the mean of rows per expert; float32 is twice as wide. `shared` is what a block may hold of shared memory."""
    rows = 16 if rows_per_expert <= 16 else 64 if wide or rows_per_expert <= 64 else 128
    depth = block_of(K, 16 if wide else 64 if K % 64 == 0 else 32)
    narrow = rows == 16 or wide or (gated and shared < LARGE)  # a gated product has two blocks of sums
    tile = Tile(rows, 64 if narrow else 128, depth, 8 if rows == 128 else 4, 4)
    per_stage = (tile.rows + 2 * tile.columns) * depth * (4 if wide else 2)
    return tile._replace(stages=max(1, min(tile.stages, shared // per_stage)))


def grouped_gemm(
    x: Tensor, w: Tensor, counts: Tensor, y: Tensor, processors: int, shared: int, source: Tensor | None = None, k: int = 1
) -> None:
    """With `source`, row m of the product is of row source[m] // k of x, gated: silu of the first half times the second."""
    x, w, counts = dense_rows(x), w.contiguous(), counts.contiguous()
    (M, N), K, E = y.shape, x.shape[1], len(counts)
    tile = tile_for(M / max(E, 1), K, x.element_size() == 4, source is not None, shared)
    most = (triton.cdiv(M, tile.rows) + min(E, M)) * triton.cdiv(N, tile.columns)
    launch(
        _grouped_gemm, min(most, processors), x, w, counts, counts if source is None else source, y, N, K, E, k,
        x.stride(0), w.stride(0), w.stride(1), GATHERED=source is not None, GATED=source is not None,
        BE=triton.next_power_of_2(E), BM=tile.rows, BN=tile.columns, BK=tile.depth, EVEN=K % tile.depth == 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
