from porthal.hal import FLOATS, Quantised, contract
from porthal.hal.numerics import Array, single
from porthal.hal.scheme import ACTIVATIONS


@contract(
    "q: Quantised[T, K] -> y[T, K]",
    dtypes={"y": "@out"},
    cost=lambda d, b: (d.T * d.K, d.T * d.K * (b.y + 1)),
    independent=("T",),
    cases={"K": (6144, 2048, 128, 96, 130), "out": ("bfloat16", "float32")},
    legal={"out": FLOATS},
    values={"q": ("normal", "small", "large", "huge", "zeros", "outlier", "negative", "denormal", "pegged", "uneven")},
    schemes={"q": ACTIVATIONS},
)
def dequantize(q: Quantised, *, out: str) -> Array:
    """y = code * scale, rounded once to `out`."""
    numbers: Array = q.native.numbers
    return single(numbers)
