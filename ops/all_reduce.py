from collections.abc import Sequence
from typing import Any

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, may_round, single


@contract(
    "x[T, H], comm: Communicator[ranks] -> y[T, H]",
    dtypes={"x": FLOATS, "y": "x"},
    cost=lambda d, b: (d.ranks * d.T * d.H, 2 * d.T * d.H * b.x),
    cases={"H": (6144, 96, 5, 1)},
    values={"x": ("normal", "integer", "special", "unlike", "large")},
    profiles=("distributed",),
)
def all_reduce(x: Sequence[Array], comm: Sequence[Any]) -> list[Array]:
    """y = sum of x over the ranks, the same bits on every rank.

    It is summed in float32 and may be rounded to x's dtype after each addition, in any order. Source: MPI_Allreduce.
    """
    y = x[0]
    for theirs in x[1:]:
        y = may_round("partial", single(y + theirs), to="x")
    return [y] * len(x)
