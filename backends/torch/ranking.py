"""Orders that do not depend on the device: NaN counts as -inf, -0.0 equals 0.0, ties go to the lowest position."""

from __future__ import annotations

import torch
from torch import Tensor


def ranked(x: Tensor) -> Tensor:
    """int64 [rows, n]: the positions of each row, highest value first."""
    return torch.sort(comparable(x), dim=-1, descending=True, stable=True).indices


def first_highest(x: Tensor) -> Tensor:
    """int32 [...]: the position of the highest value along the last axis (torch.argmax promises no tie order)."""
    values = comparable(x)
    n = values.shape[-1]
    position = torch.arange(n, dtype=torch.int32, device=x.device)
    return torch.where(values == values.amax(-1, keepdim=True), position, n).amin(-1).to(torch.int32)


def highest(scores: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """int32 [rows, k] and [rows]: ascending positions of the min(k, visible) highest of the first `visible`, -1 behind.

    torch.topk gives the k-th highest value; everything above it is in, and the lowest of the positions that equal it.
    """
    rows, n = scores.shape
    position = torch.arange(max(n, k), dtype=torch.int32, device=scores.device)
    if n <= k:
        found = position[:k].expand(rows, k)
    else:
        hidden = position >= visible[:, None]
        values = comparable(scores).masked_fill_(hidden, -torch.inf)
        edge = torch.topk(values, k, dim=1, sorted=False).values.amin(1, keepdim=True)
        above, level = values > edge, values == edge
        room = k - above.sum(1, keepdim=True, dtype=torch.int32)
        chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= room))
        place = chosen.cumsum(1).sub_(1).masked_fill_(~chosen, k)  # what is not chosen lands in a column cut off below
        found = position.new_empty(rows, k + 1).scatter_(1, place, position.expand(rows, n))[:, :k]
    length = visible.clamp(max=k)
    return torch.where(position[:k] < length[:, None], found, -1), length


def comparable(x: Tensor) -> Tensor:
    """A copy that comparisons and radix sorts order alike: NaN as -inf, -0.0 as 0.0."""
    return torch.where(torch.isnan(x), -torch.inf, x + 0.0)
