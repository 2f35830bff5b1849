"""What several peers need around their library's calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from porthal.backends.torch.backend import Torch
from porthal.hal import Weight, WeightSpec


class Packed(Torch):
    """Weights in two forms: that of a kernel, and the logical one, from which they are read back."""

    def pack(self, spec: WeightSpec, plain: Tensor) -> Any:
        """The form of the kernel for this operand; None where it takes the logical one."""
        return None

    def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
        made = super().prepare(spec, read)
        packed = self.pack(spec, made.native)
        return made if packed is None else Weight(spec, (packed, made.native))

    def from_logical(self, spec: Any, arrays: Any, into: Any = None) -> Any:
        if isinstance(spec, WeightSpec):
            return self.prepare(spec, arrays["w"].__getitem__)
        return super().from_logical(spec, arrays, into)

    def to_logical(self, operand: Any) -> Any:
        if isinstance(operand, Weight) and isinstance(operand.native, tuple):
            return {"w": self.to_numpy(operand.native[1])}
        return super().to_logical(operand)


def local(ids: Tensor, weights: Tensor, first_expert: int, E: int) -> tuple[Tensor, Tensor]:
    """Ids of experts that are here: one that is not, which no library knows, becomes expert 0 with weight 0."""
    mine = ids - first_expert
    here = (mine >= 0) & (mine < E)
    return torch.where(here, mine, 0).int().contiguous(), torch.where(here, weights, 0.0).contiguous()


def like(x: Tensor, *shape: int) -> Tensor:
    """A dense array of x's dtype, of its shape unless another is given."""
    return torch.empty(shape or x.shape, dtype=x.dtype)


def gathered(backend: Torch, kv: Any, sel: Any, batch: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """The rows that see a key, each field of their keys [rows, k, width], and which of these they selected."""
    at, length = backend.rows(sel)
    rows = torch.nonzero(length > 0).flatten()
    inside = torch.arange(at.shape[1]) < length[rows, None]
    at, size = torch.where(inside, at[rows], at[rows, :1]).long(), kv.spec.block_size
    slots = batch.native.block_table[batch.native.row_request[rows].long()].gather(1, at // size) * size + at % size
    return rows, [kv[name][slots] for name, _ in kv.spec.fields], inside
