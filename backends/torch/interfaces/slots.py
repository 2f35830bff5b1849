"""Selections in cache slots, which FlashMLA, Cambricon and Kunlunxin speak, and joint rows of a cache, which go with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from porthal.backends.torch.backend import Plan, Torch
from porthal.hal import Batch, Pages, PagesSpec, Rows, Selection, SelectionSpec


class Slots(NamedTuple):
    """A selection as its chip made it.

    slots       int32 [T, k]: row t selects the first length[t] of them; what stands behind is undefined
    length      int32 [T]
    page_place  int32 [pages]: the place of a page in the table of its request, which is the same in every table that has it
    size        slots per page
    """

    slots: Tensor
    length: Tensor
    page_place: Tensor
    size: int


def slots_of(selection: Selection, batch: Batch) -> tuple[Tensor, Tensor]:
    """int32 [T, k] with -1 behind the last of each row, and int32 [T]: of positions and of slots."""
    native = selection.native
    if isinstance(native, Slots):
        return torch.where(_valid(native), native.slots, -1), native.length
    plan: Plan = batch.native
    size, position = batch.block_size, native.indices.clamp(min=0)
    page = plan.block_table[plan.row_request].gather(1, (position // size).long())
    return torch.where(native.indices >= 0, page * size + position % size, -1), native.length


def joint(pages: Pages) -> Tensor:
    """All fields of a slot side by side: [slots, width]."""
    rows: Tensor = pages["joint"]
    return rows


def _valid(native: Slots) -> Tensor:
    return torch.arange(native.slots.shape[1], device=native.slots.device) < native.length[:, None]


class Joint(Torch):
    """A cache of two fields is one array, of which the fields are columns."""

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        if len(spec.fields) == 1 or spec.scheme != "none":
            return super().alloc_pages(spec)
        widths = [width for _, width in spec.fields]
        rows = self._zeros((spec.slots, sum(widths)), spec.dtype)
        return Pages(spec, {**dict(zip((name for name, _ in spec.fields), rows.split(widths, dim=1))), "joint": rows})


class SlotPlan(Plan):
    """A plan that can find the positions of slots again, and has the table of each row."""

    page_place: Tensor  # int32 [pages], see Slots
    row_table: Tensor  # int32 [T, max(B, 1)]: a page id behind the end is 0
    int32_targets: Tensor  # int32 [W], of calls that take no other


class Physical(Joint):
    """Of a chip whose indexer gives slots."""

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        plan = SlotPlan(*super().plan(batch, into).native)
        table = batch.block_table
        place = np.zeros(table.max(initial=0) + 1, np.int32)
        where = np.broadcast_to(np.arange(table.shape[1], dtype=np.int32), table.shape)
        place[table[table >= 0]] = where[table >= 0]
        plan.page_place = self.from_numpy(place)
        plan.row_table = plan.block_table.clamp(min=0)[plan.row_request]
        plan.int32_targets = plan.targets.to(torch.int32)
        return batch.with_native(plan)

    def rows(self, selection: Selection) -> Rows:
        native = selection.native
        if not isinstance(native, Slots):
            return super().rows(selection)
        valid = _valid(native)
        slots = torch.where(valid, native.slots, 0)
        position = native.page_place[(slots // native.size).long()] * native.size + slots % native.size
        return Rows(torch.where(valid, position, -1), native.length)

    def select_rows(self, sel: Selection, rows: Tensor) -> Selection:
        """Slots stay slots."""
        native = sel.native
        if not isinstance(native, Slots):
            return super().select_rows(sel, rows)
        slots, length = (x.index_select(0, rows) for x in native[:2])
        return Selection(SelectionSpec(len(rows), sel.spec.k), native._replace(slots=slots, length=length))
