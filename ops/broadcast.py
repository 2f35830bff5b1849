from collections.abc import Sequence
from typing import Any

from porthal.hal import MOVED, contract
from porthal.hal.numerics import Array


@contract(
    "x[T, H], comm: Communicator[ranks] -> y[T, H]",
    dtypes={"x": MOVED, "y": "x"},
    cost=lambda d, b: (0, 2 * d.T * d.H * b.x),
    cases={"H": (6144, 5, 1), "root": (0, 1)},
    legal={"root": lambda f: range(f.ranks)},
    exact=True,
    values={"x": ("tagged", "normal", "special")},
    profiles=("distributed",),
)
def broadcast(x: Sequence[Array], comm: Sequence[Any], *, root: int = 0) -> list[Array]:
    """y on every rank is the x of rank `root`; the others give one of the same shape, which is not read.

    Source: MPI_Bcast.
    """
    return [x[root].copy() for _ in x]
