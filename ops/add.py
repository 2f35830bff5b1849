from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array


@contract(
    "a[T, H], b[T, H] -> y[T, H]",
    dtypes={"a": FLOATS, "b": "a", "y": "a"},
    cost=lambda d, b: (d.T * d.H, 3 * d.T * d.H * b.a),
    independent=("T", "H"),
    cases={"H": (6144, 96, 7)},
    values={"a": ("normal", "large", "special", "extreme", "signed")},
)
def add(a: Array, b: Array) -> Array:
    """y = a + b, rounded once."""
    return a + b
