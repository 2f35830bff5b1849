from collections.abc import Sequence
from typing import Any

import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array
from porthal.ops.all_reduce import all_reduce


@contract(
    "x[ranks*n, H], comm: Communicator[ranks] -> y[n, H]",
    dtypes={"x": FLOATS, "y": "x"},
    cost=lambda d, b: (d.ranks * d.n * d.H, (d.ranks + 1) * d.n * d.H * b.x),
    cases={"H": (6144, 96, 5, 1), "n": (8, 1, 0, 33)},
    values={"x": ("normal", "integer", "special", "unlike")},
    profiles=("distributed",),
)
def reduce_scatter(x: Sequence[Array], comm: Sequence[Any]) -> list[Array]:
    """Rank r's y is block r of all_reduce(x), of n rows. Source: MPI_Reduce_scatter_block."""
    whole = all_reduce.reference(x, comm)[0]
    return list(np.split(whole, len(x)))
