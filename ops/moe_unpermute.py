import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, single, total


@contract(
    "sorted[T*k, H], source[T*k], weights[T, k] -> y[T, H]",
    dtypes={"sorted": FLOATS, "source": "int32", "weights": "float32", "y": "sorted"},
    cost=lambda d, b: (2 * d.T * d.k * d.H, d.T * d.H * (d.k * b.sorted + b.y)),
    independent=("H",),
    cases={"H": (6144, 96), "k": (8, 1, 2, 16)},
    ranges={"source": (-1, "T*k")},
    values={"source": ("permutation", "gaps"), "sorted": ("normal", "seesaw"), "weights": ("normal", "seesaw")},
)
def moe_unpermute(sorted: Array, source: Array, weights: Array) -> Array:
    """y[t] = sum over m with source[m] = t*k + j of weights[t, j] * sorted[m], added in the order of j in float32.

    Rows with source -1, wherever they stand, are padding and contribute nothing, whatever they hold. No other source occurs
    twice. Weights are finite, also those of choices that have no row.
    """
    T, k = weights.shape
    parts = np.zeros((T * k, sorted.shape[1]))
    kept = source >= 0
    parts[source[kept]] = sorted[kept]
    return total(single(parts.reshape(T, k, sorted.shape[1]) * weights[..., None]), axis=1)


@moe_unpermute.unread
def _(source: Array, **_: object) -> dict[str, Array]:
    return {"sorted": source < 0}
