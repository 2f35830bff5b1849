from collections.abc import Sequence
from typing import Any

import numpy as np

from porthal.hal import MOVED, contract
from porthal.hal.numerics import Array


@contract(
    "x[N, H], comm: Communicator[ranks] -> y[M, H], receive[ranks]",
    dtypes={"x": MOVED, "y": "x", "receive": "int32"},
    cost=lambda d, b: (0, (d.N + d.M) * d.H * b.x),
    cases={"H": (6144, 5, 1), "N": (64, 7, 1, 0), "M": (512, 64)},
    uneven=("N",),
    exact=True,
    values={"x": ("tagged", "normal")},
    profiles=("distributed",),
)
def all_gather_v(x: Sequence[Array], comm: Sequence[Any], *, M: int) -> list[tuple[Array, Array]]:
    """y on every rank: all N rows of rank 0, then those of rank 1, and so on, each with an N of its own, receive[s] that of
    rank s. Rows of y behind them may hold anything; more than M rows in all are an error. Source: MPI_Allgatherv."""
    y = np.zeros((M, x[0].shape[1]), x[0].dtype)
    y[: sum(map(len, x))] = np.concatenate(x)
    return [(y, np.array([len(rows) for rows in x], np.int32)) for _ in x]


@all_gather_v.specified_rows
def _(receive: Array, **_: Array) -> dict[str, int]:
    return {"y": int(receive.sum())}


@all_gather_v.tells
def _(facts: Any) -> list[int]:
    return [facts.N]


@all_gather_v.fitting
def _(told: Array, facts: Any) -> str:
    return f"the ranks have {told.sum()} rows, expected at most M = {facts.M}" if told.sum() > facts.M else ""
