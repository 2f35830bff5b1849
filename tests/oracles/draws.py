"""What next tokens are drawn from, one candidate after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def settings(rows: int, temperature: float = 1, top_k: int = 0, top_p: float = 1) -> list[np.ndarray]:
    """temperature, top_k and top_p, the same in all rows."""
    return [np.full(rows, x) for x in (temperature, top_k, top_p)]


def share_of_each(row: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """What softmax, top-k and top-p leave of a row, one candidate after the other."""
    weight = [math.exp(v / temperature) for v in row]
    kept = sorted(range(len(row)), key=lambda v: (-row[v], v))[: top_k or len(row)]
    mass, total, shares = 0.0, sum(weight[v] for v in kept), np.zeros(len(row))
    for v in kept:
        shares[v] = weight[v]
        mass += weight[v]
        if mass / total >= top_p:
            break
    return shares / mass


def threshold(holds: Callable[[np.ndarray], np.ndarray], size: int) -> np.ndarray:
    """Where each of `size` conditions on u, which hold from 0 on, cease to hold: by bisection, to 2^-40."""
    low, high = np.zeros(size), np.ones(size)
    for _ in range(40):
        middle = (low + high) / 2
        yes = holds(middle)
        low, high = np.where(yes, middle, low), np.where(yes, high, middle)
    return low
