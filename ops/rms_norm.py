import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, may_round, single, total
from porthal.hal.spans import EPSILON


@contract(
    "x[T, H], weight[H] -> y[T, H]",
    dtypes={"x": FLOATS, "weight": "x | float32", "y": "x"},
    cost=lambda d, b: (4 * d.T * d.H, d.T * d.H * (b.x + b.y) + d.H * b.weight),
    independent=("T",),
    cases={"H": (6144, 512, 2048, 768, 96, 1, 7), "eps": (1e-5, 0.5)},
    legal={"eps": EPSILON},
    values={"x": ("normal", "small", "large", "zeros", "outlier", "seesaw", "rear")},
    profiles=("inference",),
)
def rms_norm(x: Array, weight: Array, *, eps: float = 1e-5) -> Array:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis.

    The normalised value may be rounded before the weight is applied. Source: Zhang & Sennrich 2019.
    """
    mean_square = total(x * x, keepdims=True) / x.shape[-1]
    normed = may_round("normalised", single(x / np.sqrt(mean_square + eps)), to="y")
    return single(normed * weight)
