"""Selections in cache slots, which FlashMLA, Cambricon and Kunlunxin speak, and joint rows of a cache, which go with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.torch.backend import Plan
from porthal.backends.torch.tables import Tabled
from porthal.hal import Batch, Pages, PagesSpec, Rows, Selection, SelectionSpec


class Slots(NamedTuple):
    """A selection as its chip made it.

    slots       int32 [T, k]: row t selects the first length[t] of them; what stands behind is undefined
    length      int32 [T]
    table       int32 [T, B]: the pages of each row's request, in their order; a page id behind the end is 0
    size        slots per page
    """

    slots: Tensor
    length: Tensor
    table: Tensor
    size: int


def slots_of(selection: Selection, batch: Batch) -> tuple[Tensor, Tensor]:
    """int32 [T, k] with -1 behind the last of each row, and int32 [T]: of positions and of slots."""
    native = selection.native
    if isinstance(native, Slots):
        return torch.where(_valid(native), native.slots, -1), native.length
    moves, start = batch.native.table(_moves, batch.block_size)
    positions = native.indices
    return positions + moves[positions // batch.block_size + start], native.length


def row_table(plan: Plan) -> tuple[Tensor]:
    """int32 [T, max(B, 1)], see Slots: large, where many rows see many pages."""
    return (plan.block_table.clamp(min=0)[plan.row_request],)


def int32_slots(plan: Plan) -> tuple[Tensor]:
    """int32 [T], of calls that take no other."""
    return (plan.slots.to(torch.int32),)


def _moves(plan: Plan, size: int) -> tuple[Tensor, Tensor]:
    """int32 [R * (B+1)]: from positions of a page to its slots, of each request 0 first, so that -1 stays; int64 [T, 1]: which
    of them is that of a row's page 0."""
    B = plan.block_table.shape[1]
    first = torch.arange(B, dtype=torch.int32, device=plan.slots.device)
    moves = F.pad((plan.block_table - first) * size, (1, 0))
    return moves.flatten(), plan.row_request[:, None].long() * (B + 1) + 1


def joint(pages: Pages) -> Tensor:
    """All fields of a slot side by side: [slots, width]."""
    rows: Tensor = pages["joint"]
    return rows


def _valid(native: Slots) -> Tensor:
    return torch.arange(native.slots.shape[1], device=native.slots.device) < native.length[:, None]


class Joint(Tabled):
    """A cache of two fields is one array, of which the fields are columns."""

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        if len(spec.fields) == 1 or spec.scheme != "none":
            return super().alloc_pages(spec)
        widths = [width for _, width in spec.fields]
        rows = self._zeros((spec.slots, sum(widths)), spec.dtype)
        return Pages(spec, {**dict(zip((name for name, _ in spec.fields), rows.split(widths, dim=1))), "joint": rows})


class Physical(Joint):
    """Of a chip whose indexer gives slots."""

    def rows(self, selection: Selection) -> Rows:
        native = selection.native
        if not isinstance(native, Slots):
            return super().rows(selection)
        valid = _valid(native)
        slots = torch.where(valid, native.slots, 0)
        pages, place = native.table.sort(dim=-1, stable=True)  # page 0 of a row lies before what is behind its end
        found = torch.searchsorted(pages, slots // native.size).clamp(max=pages.shape[1] - 1)
        position = (place.gather(1, found) * native.size + slots % native.size).to(torch.int32)
        return Rows(torch.where(valid, position, -1), native.length)

    def select_rows(self, sel: Selection, rows: Tensor) -> Selection:
        """Slots stay slots."""
        native = sel.native
        if not isinstance(native, Slots):
            return super().select_rows(sel, rows)
        slots, length, table = (x.index_select(0, rows) for x in native[:3])
        return Selection(SelectionSpec(len(rows), sel.spec.k), Slots(slots, length, table, native.size))
