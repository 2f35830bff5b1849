from collections.abc import Sequence
from typing import Any

import numpy as np

from porthal.hal import MOVED, contract
from porthal.hal.numerics import Array


@contract(
    "x[ranks*n, H], comm: Communicator[ranks] -> y[ranks*n, H]",
    dtypes={"x": MOVED, "y": "x"},
    cost=lambda d, b: (0, 2 * d.ranks * d.n * d.H * b.x),
    cases={"H": (6144, 5, 1), "n": (8, 1, 0, 33)},
    exact=True,
    values={"x": ("tagged", "normal", "special")},
    profiles=("distributed",),
)
def all_to_all(x: Sequence[Array], comm: Sequence[Any]) -> list[Array]:
    """Block s of rank r's y is block r of rank s's x; a block has n rows.

    Source: MPI_Alltoall; torch.distributed.all_to_all_single.
    """
    blocks = [each.reshape(len(x), -1, each.shape[1]) for each in x]
    return [np.concatenate([theirs[r] for theirs in blocks]) for r in range(len(x))]
