from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array
from porthal.hal.scheme import WEIGHTS, product


@contract(
    "x[T, K], w: Weight[N, K] -> y[T, N]",
    dtypes={"x": FLOATS, "w": "x", "y": "@out"},
    cost=lambda d, b: (2 * d.T * d.N * d.K, d.T * d.K * b.x + d.N * d.K * b.w + d.T * d.N * b.y),
    independent=("T", "N"),
    cases={"K": (6144, 2048, 512, 96, 7), "N": (576, 256, 7), "out": ("x", "float32")},
    legal={"out": ("x", *FLOATS)},
    values={"x": ("normal", "small", "large", "huge", "integer", "cancel", "surge", "seesaw"), "w": ("weight", "pillar")},
    schemes={"w": WEIGHTS},
    profiles=("inference",),
)
def linear(x: Array, w: Array, *, out: str = "x") -> Array:
    """y[t, n] = sum_k x[t, k] w[n, k], accumulated in float32.

    `out` is the result's dtype; "x" is that of x. With out="float32" nothing is rounded after the accumulation. Under a
    scheme of w, x is quantised as `Scheme.other` says, each row by itself, or w may be rounded to the dtype of x.
    """
    return product("tk,nk->tn", x, w)
