from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array
from porthal.hal.scheme import WEIGHTS, product


@contract(
    "x[T, N, K], w: Weight[N, M, K] -> y[T, N, M]",
    dtypes={"x": FLOATS, "w": "x", "y": "x"},
    cost=lambda d, b: (
        2 * d.T * d.N * d.M * d.K,
        d.T * d.N * (d.K * b.x + d.M * b.y) + d.N * d.M * d.K * b.w,
    ),
    independent=("T", "N", "M"),
    cases={"N": (64, 8, 1, 72), "K": (192, 512, 7), "M": (512, 256, 7)},
    values={"x": ("normal", "huge", "integer", "cancel", "surge", "seesaw"), "w": ("weight", "pillar")},
    schemes={"w": WEIGHTS},
)
def head_linear(x: Array, w: Array) -> Array:
    """y[t, n] = w[n] x[t, n]: one matrix per head, as MLA's W_UK (absorbed into the query) and W_UV (after attention).

    Under a scheme of w, x is taken as `linear` takes it, each row of each head by itself.
    """
    return product("tnk,nmk->tnm", x, w)
