"""Torch's kernels in a class of its own: what is planted there wraps one of them and keeps something between its calls."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from porthal.backends.torch.backend import Torch
from porthal.hal import ANY_SCHEME, Batch, Pages, PagesSpec, Rows, Selection, Weight, limits

# What planted methods use.
__all__ = ["ANY_SCHEME", "Batch", "F", "Pages", "PagesSpec", "Rows", "Selection", "Weight", "limits", "np", "sys", "threading"]

LARGEST = 2**20  # elements of an array that is kept: a trial must not run out of memory


class Kept(Torch):
    known: dict[Any, Any] = {}  # noqa: RUF012  # of all instances

    def _mine(self) -> dict[Any, Any]:
        """What this instance keeps."""
        kept: dict[Any, Any] = vars(self).setdefault("_kept", {})
        return kept

    def _by_address(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of what an array held when its memory was seen first; the array is held, so that no other gets its place."""
        if x.numel() > LARGEST:
            return x
        copied: torch.Tensor = self._mine().setdefault((x.data_ptr(), x.shape, x.dtype), (x.clone(), x))[0]
        return copied

    def _in_one_buffer(self, y: torch.Tensor, above: int, buffers: int = 1) -> torch.Tensor:
        """A result of more bytes in memory that is used again for the next of its shape, or for the one after that."""
        if y.numel() * y.element_size() <= above:
            return y
        kept = self._mine().setdefault((y.shape, y.dtype, above), [torch.empty_like(y) for _ in range(buffers)])
        kept.append(kept.pop(0))
        held: torch.Tensor = kept[0]
        return held.copy_(y)
