import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array


@contract(
    "a[T, A], b[T, B] -> y[T, A+B]",
    dtypes={"a": (*FLOATS, "int32"), "b": "a", "y": "a"},
    cost=lambda d, b: (0, 2 * d.T * (d.A + d.B) * b.a),
    independent=("T",),
    cases={"A": (6144, 512, 7), "B": (6144, 64, 1)},
    exact=True,
    values={"a": ("normal", "special", "huge", "denormal", "extreme", "signed")},
)
def concat(a: Array, b: Array) -> Array:
    """y = [a | b] along the last axis."""
    return np.concatenate([a, b], axis=-1)
