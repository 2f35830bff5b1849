"""Caches under schemes as a library reads them: one array of bytes, of which the fields are views."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from porthal.backends.torch.backend import Plan
from porthal.backends.torch.capture import Capturing
from porthal.backends.torch.schemes import stored
from porthal.backends.torch.tables import Tabled
from porthal.hal import ANY_SCHEME, Batch, Pages, PagesSpec, limits, numpy_dtype
from porthal.hal.layouts import Layout


class Packed(Tabled):
    """A field is [slots, width]; [pages, size, width] where a page holds all slots' first parts before their second."""

    _written = Capturing._written  # so that shapes do not follow padding

    def _layout(self, spec: PagesSpec) -> Layout | None:
        """How the caches of a spec are packed, None where their fields lie apart."""
        return None

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        layout = self._layout(spec)
        if layout is None:
            return super().alloc_pages(spec)
        layout, form, at = _named(layout, spec), Pages.form(spec), 0
        size = spec.block_size if layout.by_page else 1
        memory = self._zeros((spec.slots // size, size * layout.width(spec)), "uint8")
        fields = {"packed": memory}
        for name in layout.order:
            (_, width), kind = form[name]
            end = at + size * width * numpy_dtype(kind).itemsize
            part = memory[:, at:end].view(getattr(torch, kind))
            fields[name] = part.unflatten(1, (size, width)) if layout.by_page else part
            at = end
        return Pages(spec, fields)

    def from_logical(self, spec: Any, arrays: dict[str, np.ndarray[Any, Any]], into: Any = None) -> Any:
        layout = self._layout(spec) if isinstance(spec, PagesSpec) else None
        if layout and layout.by_page:
            arrays = {name: x.reshape(spec.n_blocks, spec.block_size, x.shape[1]) for name, x in arrays.items()}
        return super().from_logical(spec, arrays, into)

    def to_logical(self, operand: Any) -> dict[str, np.ndarray[Any, Any]]:
        logical = super().to_logical(operand)
        if not isinstance(operand, Pages):
            return logical
        return {name: logical[name].reshape(shape) for name, (shape, _) in Pages.form(operand.spec).items()}

    @limits(provider="aten.index_put_", schemes=ANY_SCHEME)
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        """In place of a row without a slot the first that has one is written again; where none has, slot 0 keeps its own."""
        plan = batch.native
        targets, kept = plan.table(_targets)
        for (name, _), rows in zip(pages.spec.fields, (first, second)):
            for part, value in stored(pages, name, rows.index_select(0, plan.written)).items():
                field = pages[part]
                at = (targets,) if field.dim() == 2 else (targets // field.shape[1], targets % field.shape[1])
                field.index_put_(at, torch.where(kept, value, field[at]))
        return pages


def _targets(plan: Plan) -> tuple[Tensor, Tensor]:
    """int64 [W] and bool [W, 1]: slots to write, and whether a row is written there."""
    return plan.targets.clamp(min=0), plan.targets[:, None] >= 0


def _named(layout: Layout, spec: PagesSpec) -> Layout:
    """The layout with the names that a cache's fields have: what is quantised, its scales, and another."""
    codes, [(first, _), *other] = layout.order[0], spec.fields
    names = {codes: first, f"{codes}_scale": f"{first}_scale"}
    return replace(layout, order=tuple(names.get(name, other[0][0] if other else name) for name in layout.order))
