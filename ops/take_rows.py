import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array


@contract(
    "x[T, H], rows[M] -> y[M, H]",
    dtypes={"x": FLOATS, "rows": "int32", "y": "x"},
    cost=lambda d, b: (0, 2 * d.M * d.H * b.x),
    independent=("M", "H"),
    cases={"H": (6144, 96), "M": (4, 1, 0, 17)},
    ranges={"rows": (-1, "T")},
    exact=True,
    values={"x": ("normal", "special", "huge", "denormal", "extreme", "signed"), "rows": ("index", "ascending")},
    profiles=("inference",),
)
def take_rows(x: Array, rows: Array) -> Array:
    """y[m] = x[rows[m]]; row -1 gives zeros (a request without query rows)."""
    y = np.zeros((len(rows), x.shape[1]))
    y[rows >= 0] = x[rows[rows >= 0]]
    return y
