import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, may_round, single, total
from porthal.hal.spans import EPSILON


@contract(
    "x[T, H], weight[H], bias[H] -> y[T, H]",
    dtypes={"x": FLOATS, "weight": "x | float32", "bias": "x | float32", "y": "x"},
    cost=lambda d, b: (7 * d.T * d.H, d.T * d.H * (b.x + b.y) + d.H * (b.weight + b.bias)),
    independent=("T",),
    cases={"H": (128, 6144, 96, 7), "eps": (1e-6, 0.5)},
    legal={"eps": EPSILON},
    values={"x": ("normal", "small", "large", "zeros", "offset", "plateau", "seesaw", "cancel", "surge")},
)
def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-6) -> Array:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (population variance).

    The variance is that of the centred values: E[x^2] - mean^2 loses it when the mean is large.
    The normalised value may be rounded before the weight is applied. Source: Ba et al. 2016.
    """
    n = x.shape[-1]
    centred = single(x - total(x, keepdims=True) / n)
    variance = total(centred * centred, keepdims=True) / n
    normed = may_round("normalised", single(centred / np.sqrt(variance + eps)), to="y")
    return single(single(normed * weight) + bias)
