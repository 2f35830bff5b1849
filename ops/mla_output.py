from typing import Any

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, may_round
from porthal.hal.scheme import WEIGHTS, product


@contract(
    "o[T, N, C], w_uv: Weight[N, V, C], w_o: Weight[H, N*V] -> y[T, H]",
    dtypes={"o": FLOATS, "w_uv": "o", "w_o": "o", "y": "o"},
    cost=lambda d, b: (
        2 * d.T * d.N * d.V * (d.C + d.H),
        b.o * (d.N * d.V * (d.C + d.H) + d.T * (d.N * d.C + d.H)),
    ),
    independent=("T", "H"),
    cases={"N": (8, 1, 64, 20), "C": (512,), "V": (256, 64), "H": (256, 96)},
    values={"o": ("normal", "seesaw"), "w_o": ("weight", "pillar")},
    schemes={"w_uv": WEIGHTS, "w_o": WEIGHTS},
    profiles=("inference",),
)
def mla_output(o: Array, w_uv: Array, w_o: Array) -> Array:
    """y = w_o [w_uv[n] o[:, n] for every head n]: back from the latent to the hidden size.

    The values of the heads may be rounded before w_o. Source: DeepSeek-V2.
    """
    values = may_round("values", product("tnc,nvc->tnv", o, w_uv), to="o")
    return product("tj,hj->th", values.reshape(len(o), w_o.shape[1]), w_o)


@mla_output.decomposed(w_uv="head_linear.w", w_o="linear.w")
def _(ops: Any, o: Any, w_uv: Any, w_o: Any) -> Any:
    return ops.linear(ops.head_linear(o, w_uv).reshape(o.shape[0], w_o.spec.shape[1]), w_o)
