from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, elementary, may_round, sigmoid, single


@contract(
    "x[T, 2*I] -> y[T, I]",
    dtypes={"x": FLOATS, "y": "x"},
    cost=lambda d, b: (5 * d.T * d.I, d.T * d.I * (2 * b.x + b.y)),
    independent=("T",),
    cases={"I": (2048, 12288, 96, 7)},
    values={"x": ("normal", "large", "zeros", "seesaw", "huge")},
    profiles=("inference",),
)
def silu_mul(x: Array) -> Array:
    """y = silu(gate) * up with gate = x[:, :I] (the first half is activated) and up = x[:, I:]; silu(g) = g * sigmoid(g).

    silu(gate) may be rounded before the product. Source: Shazeer 2020 (SwiGLU).
    """
    half = x.shape[-1] // 2
    gate, up = x[:, :half], x[:, half:]
    return single(may_round("activation", single(gate * elementary(sigmoid, gate)), to="y") * up)
