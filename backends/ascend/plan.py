"""What a step's kernels share: where rows lie in the caches' memory, and by how much positions are turned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from porthal.backends.torch.tables import StepPlan, angles
from porthal.hal import Pages


class Turn(NamedTuple):
    """Cosines and sines as npu_rotary_mul takes them: [T, 1, width], each angle at both elements of its pair."""

    cos: Tensor
    sin: Tensor


class NpuPlan(StepPlan):
    """A plan that says where a row is written in the memory of a cache, which begins with a page that nobody reads."""

    rows: Tensor  # int64 [T, 1]


def turn(plan: StepPlan, theta: float, width: int, layout: str, dtype: torch.dtype) -> Turn:
    angle = angles(plan.positions, theta, width)[:, None]
    angle = angle.repeat_interleave(2, dim=-1) if layout == "interleaved" else angle.repeat(1, 1, 2)
    return Turn(torch.cos(angle).to(dtype), torch.sin(angle).to(dtype))


def still(plan: StepPlan, theta: float, width: int, layout: str, dtype: torch.dtype) -> Turn:
    """What turns nothing."""
    shape = len(plan.positions), 1, width
    return Turn(plan.positions.new_ones(shape, dtype=dtype), plan.positions.new_zeros(shape, dtype=dtype))


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
