from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, may_round, single
from porthal.hal.spans import EPSILON
from porthal.ops.rms_norm import rms_norm


@contract(
    "x[T, H], residual[T, H], weight[H] -> y[T, H], r[T, H]",
    dtypes={"x": FLOATS, "residual": "x", "weight": "x | float32", "y": "x", "r": "x"},
    cost=lambda d, b: (5 * d.T * d.H, 4 * d.T * d.H * b.x + d.H * b.weight),
    independent=("T",),
    cases={"H": (6144, 512, 768, 96, 7), "eps": (1e-5, 0.5)},
    legal={"eps": EPSILON},
    values={"x": ("normal", "small", "large", "zeros", "seesaw", "cancel")},
    profiles=("inference",),
)
def add_rms_norm(x: Array, residual: Array, weight: Array, *, eps: float = 1e-5) -> tuple[Array, Array]:
    """r = x + residual; y = rms_norm(r, weight): a block's residual add fused with the next norm.

    The norm may be taken before r is rounded or after. Source: DeepSeek-V3.2 inference code, vLLM fused_add_rms_norm.
    """
    r = single(x + residual)
    return rms_norm.reference(may_round("residual", r, to="r"), weight, eps=eps), r
