"""PyTorch's own grouped product, of CUTLASS on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from porthal.backends.torch.backend import Torch
from porthal.hal import CallSpec, Kernel, Weight, at_least, limits, multiple_of, same_as


class GroupedMm(Torch):
    """Experts are counted by where their rows end; rows and columns are whole blocks of 16 bytes."""

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        if kernel.provider == "torch._grouped_mm" and not hasattr(torch, "_grouped_mm"):
            return f"PyTorch {torch.__version__} has no _grouped_mm: it needs 2.8 or later"
        return super().refuses(op, kernel, spec)

    @limits(
        provider="torch._grouped_mm",
        dtypes={"x": "bfloat16", "w": same_as("x")},
        M=at_least(1),
        K=multiple_of(8),
        N=multiple_of(8),
    )
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        return torch._grouped_mm(x.contiguous(), w.native.transpose(1, 2), offs=ends)
