from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array


@contract(
    "x[T, H] -> y[T, H]",
    dtypes={"x": FLOATS, "y": "@to"},
    cost=lambda d, b: (0, d.T * d.H * (b.x + b.y)),
    independent=("T", "H"),
    cases={"H": (6144, 96, 7), "to": ("bfloat16", "float32", "float16")},
    legal={"to": FLOATS},
    exact=True,
    values={"x": ("normal", "large", "special", "denormal", "extreme", "signed", "faint", "verge")},
)
def cast(x: Array, *, to: str) -> Array:
    """x in the dtype `to`, rounded to nearest even; overflow gives infinity, NaN stays NaN."""
    return x
