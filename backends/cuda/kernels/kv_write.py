"""kv_write: one program per row, for both fields. Rows are copied as they are, in integers of their width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch

BITS = {2: torch.int16, 4: torch.int32}


@triton.jit
def copy_row(source, target, width, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < width), mask=at < width)


@triton.jit
def _kv_write(
    slots, first, a, A, sfirst, sa, second, b, B, ssecond, sb, TWO: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        copy_row(first + row * sfirst, a + slot * sa, A, BA)
        if TWO:
            copy_row(second + row * ssecond, b + slot * sb, B, BB)


def kv_write(slots: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """`pairs` holds, for each field, the new rows and the field."""
    given = []
    for rows, field in (pairs[0], pairs[-1]):
        rows, field = (dense_rows(x).view(BITS[x.element_size()]) for x in (rows, field))
        given += [rows, field, rows.shape[1], rows.stride(0), field.stride(0)]
    blocks = [block_of(width, 1024) for width in (given[2], given[7])]
    launch(_kv_write, slots.shape[0], slots, *given, TWO=len(pairs) > 1, BA=blocks[0], BB=blocks[1], num_warps=4)
