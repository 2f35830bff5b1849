"""What a step's kernels share: where rows lie in the caches' memory, and by how much positions are turned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from porthal.backends.torch.backend import Plan
from porthal.backends.torch.tables import angles
from porthal.hal import Pages


class Turn(NamedTuple):
    """Cosines and sines as npu_rotary_mul takes them: [T, 1, width], each angle at both elements of its pair."""

    cos: Tensor
    sin: Tensor


class NpuPlan(Plan):
    """The base's plan, and

    rows   int64 [T, 1]: where a row is written in the memory of a cache, which begins with a page that nobody reads
    turns  a Turn for each (theta, width, layout, dtype) that was asked for, made at the first call of a step
    """

    rows: Tensor
    turns: dict[tuple[float, int, str, torch.dtype], Turn]

    def turn(self, theta: float, width: int, layout: str, dtype: torch.dtype = torch.float32) -> Turn:
        key = theta, width, layout, dtype
        if key not in self.turns:
            self.turns[key] = self._turn(*key)
        return self.turns[key]

    def renew(self) -> None:
        """Make the turns anew where they lie, for the positions of now: a captured graph reads them there."""
        for key, held in self.turns.items():
            for old, new in zip(held, self._turn(*key)):
                old.copy_(new)

    def _turn(self, theta: float, width: int, layout: str, dtype: torch.dtype) -> Turn:
        angle = angles(self.positions, theta, width)[:, None]
        angle = angle.repeat_interleave(2, dim=-1) if layout == "interleaved" else angle.repeat(1, 1, 2)
        return Turn(torch.cos(angle).to(dtype), torch.sin(angle).to(dtype))


def paged(pages: Pages, field: int) -> Tensor:
    """A field as PA_BSND: [blocks, block_size, 1, width]."""
    name, width = pages.spec.fields[field]
    made: Tensor = pages[name].view(pages.spec.n_blocks, pages.spec.block_size, 1, width)
    return made


def memory(pages: Pages, name: str) -> Tensor:
    """A field with the page in front of it, to which rows that have no slot are written."""
    field: Tensor = pages[name]
    slots, width = field.shape
    page = pages.spec.block_size
    return field.as_strided((page + slots, width), (width, 1), field.storage_offset() - page * width)
