from collections.abc import Sequence
from typing import Any

import numpy as np

from porthal.hal import MOVED, contract
from porthal.hal.numerics import Array


@contract(
    "x[N, H], send[ranks], comm: Communicator[ranks] -> y[M, H], receive[ranks]",
    dtypes={"x": MOVED, "send": "int32", "y": "x", "receive": "int32"},
    cost=lambda d, b: (0, (d.N + d.M) * d.H * b.x),
    cases={"H": (6144, 5, 1), "N": (64, 7, 1, 0), "M": (512, 64, 40)},
    ranges={"send": (0, "N+1")},
    uneven=("N",),
    exact=True,
    values={"x": ("tagged", "normal"), "send": ("splits", "zeros", "silent", "onto", "shifted", "kept", "mirrored")},
    profiles=("distributed",),
)
def all_to_all_v(x: Sequence[Array], send: Sequence[Array], comm: Sequence[Any], *, M: int) -> list[tuple[Array, Array]]:
    """Rank r sends its first send[0] rows to rank 0, the next send[1] to rank 1, and so on; what is left it keeps.

    y begins with the rows from rank 0, then those from rank 1; receive[s] is how many came from rank s. Rows of y behind
    them may hold anything. More than M rows for one rank are an error on all. Source: MPI_Alltoallv.
    """
    parts = [np.split(rows[: counts.sum()], np.cumsum(counts)[:-1]) for rows, counts in zip(x, send)]
    found = []
    for r in range(len(x)):
        arrived = [theirs[r] for theirs in parts]
        y = np.zeros((M, x[r].shape[1]), x[r].dtype)
        y[: sum(map(len, arrived))] = np.concatenate(arrived)
        found.append((y, np.array([len(rows) for rows in arrived], np.int32)))
    return found


@all_to_all_v.specified_rows
def _(receive: Array, **_: Array) -> dict[str, int]:
    return {"y": int(receive.sum())}


@all_to_all_v.tells
def _(send: Array, facts: Any) -> list[int]:
    return [*send, facts.N]


@all_to_all_v.fitting
def _(told: Array, facts: Any) -> str:
    send, rows = told[:, :-1], told[:, -1]
    for r in np.flatnonzero(send.sum(1) > rows):
        return f"rank {r} sends {send[r].sum()} rows of x, which has {rows[r]} there"
    for r in np.flatnonzero(send.sum(0) > facts.M):
        return f"rank {r} is sent {send[:, r].sum()} rows, expected at most M = {facts.M}"
    return ""
