from typing import Any

import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, may_round
from porthal.hal.scheme import WEIGHTS, product
from porthal.hal.spans import EPSILON
from porthal.ops.rms_norm import rms_norm


@contract(
    "e[T, H], g[T, H], enorm[H], hnorm[H], eh_proj: Weight[H, 2*H] -> u[T, H]",
    dtypes={"e": FLOATS, "g": "e", "enorm": "e | float32", "hnorm": "e | float32", "eh_proj": "e", "u": "e"},
    cost=lambda d, b: (4 * d.T * d.H * d.H, b.e * (2 * d.H * d.H + 3 * d.T * d.H)),
    independent=("T",),
    cases={"H": (256, 96), "eps": (1e-5, 0.5)},
    legal={"eps": EPSILON},
    values={"e": ("normal", "seesaw"), "eh_proj": ("weight", "pillar")},
    schemes={"eh_proj": WEIGHTS},
    profiles=("inference",),
)
def mtp_input(e: Array, g: Array, enorm: Array, hnorm: Array, eh_proj: Array, *, eps: float) -> Array:
    """u = eh_proj [rms_norm(e, enorm) | rms_norm(g, hnorm)]: next token's embedding first, hidden state second.

    Source: DeepSeek-V3 multi-token prediction.
    """
    halves = [rms_norm.reference(x, w, eps=eps) for x, w in ((e, enorm), (g, hnorm))]
    return product("tk,hk->th", may_round("normed", np.concatenate(halves, axis=-1), to="e"), eh_proj)


@mtp_input.decomposed(eh_proj="linear.w")
def _(ops: Any, e: Any, g: Any, enorm: Any, hnorm: Any, eh_proj: Any, *, eps: float) -> Any:
    return ops.linear(ops.concat(ops.rms_norm(e, enorm, eps=eps), ops.rms_norm(g, hnorm, eps=eps)), eh_proj)
