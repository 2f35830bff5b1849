"""Angles of a rotary embedding as vendors' calls want them: a table per call, of which row t belongs to query row t."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, theta: float, width: int) -> Tensor:
    """float32 [T, width/2]."""
    half = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    table: Tensor = positions.float()[:, None] * theta ** (-half / width)
    return table
