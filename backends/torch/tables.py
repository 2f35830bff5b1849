"""What kernels make of a step's plan, once: angles of a rotary embedding as vendors' calls want them, tables of slots."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from porthal.backends.torch.backend import Plan, Torch
from porthal.hal import Batch

Made = tuple[Tensor, ...]


class StepPlan(Plan):
    """The base's plan, and `tables`: what was made of it, by the function that makes it and the form that was asked for."""

    tables: dict[tuple[Any, ...], Made]

    def table(self, make: Callable[..., Made], *form: Hashable) -> Made:
        """`make(plan, *form)`, which is called when a step asks for the first time."""
        key = make, *form
        if key not in self.tables:
            self.tables[key] = make(self, *form)
        return self.tables[key]

    def take_over(self, into: Batch | None) -> None:
        """Tables of the plan that this one was written into, made anew where they lie: a captured graph reads them there."""
        self.tables = {} if into is None else into.native.tables
        for (make, *form), held in self.tables.items():
            for old, new in zip(held, make(self, *form)):
                old.copy_(new)


class Tabled(Torch):
    """Of a chip whose kernels keep tables."""

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        planned = super().plan(batch, into)
        plan = StepPlan(*planned.native)
        plan.take_over(into)
        return planned.with_native(plan)


def angles(positions: Tensor, theta: float, width: int) -> Tensor:
    """float32 [T, width/2], of which row t belongs to query row t."""
    half = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    table: Tensor = positions.float()[:, None] * theta ** (-half / width)
    return table


def spliced(x: Tensor, turned: Tensor, start: int) -> Tensor:
    """x with the columns from `start` on replaced, in the dtype of x."""
    end, y = start + turned.shape[-1], turned.to(x.dtype)
    return y if end - start == x.shape[-1] else torch.cat([x[..., :start], y, x[..., end:]], dim=-1)
