"""What launches share: grids have one axis, whose limit is 2^31 programs; offsets of rows are 64 bits wide."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

LARGE = 200 << 10  # bytes of shared memory: from Hopper on operands of a product stay there, and registers hold sums alone


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    if programs:
        kernel[(programs,)](*args, **constants)


def dense_rows(x: Tensor) -> Tensor:
    """The array itself where its last axis is dense, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def block_of(n: int, most: int, least: int = 16) -> int:
    """The power of two that holds n elements, within limits."""
    return max(least, min(most, triton.next_power_of_2(n)))
