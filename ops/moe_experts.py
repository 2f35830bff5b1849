from typing import Any

import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, may_round, single, total
from porthal.hal.scheme import WEIGHTS, product
from porthal.hal.spans import FIRST_EXPERT
from porthal.ops.silu_mul import silu_mul


@contract(
    "x[T, H], w13: Weight[E, 2*I, H], w2: Weight[E, H, I], ids[T, k], weights[T, k] -> y[T, H]",
    dtypes={"x": FLOATS, "w13": "x", "w2": "x", "ids": "int32", "weights": "float32", "y": "x"},
    cost=lambda d, b: (
        6 * d.T * d.k * d.H * d.I,
        2 * d.T * d.H * b.x + min(d.E, d.T * d.k) * 3 * d.H * d.I * b.w13,
    ),
    independent=("T",),
    cases={"H": (6144, 128, 96, 129), "I": (256, 128, 96, 131), "E": (8, 1, 17), "k": (8, 1, 2, 256), "first_expert": (0, 3)},
    legal={"first_expert": FIRST_EXPERT},
    values={
        "x": ("normal", "small", "zeros", "offset", "seesaw"),
        "ids": ("routed", "crowded", "nowhere", "deserted", "holes", "away", "eldest", "central", "even", "ragged"),
        "w13": ("weight", "pillar"),
    },
    schemes={"w13": WEIGHTS, "w2": WEIGHTS},
)
def moe_experts(x: Array, w13: Array, w2: Array, ids: Array, weights: Array, *, first_expert: int = 0) -> Array:
    """y[t] = sum_j weights[t, j] * w2[e] (silu(w13[e, :I] x_t) * (w13[e, I:] x_t)), e = ids[t, j] - first_expert.

    Rows 0..I-1 of w13 are gate, I..2I-1 up. Ids outside the E local experts, and -1, contribute 0; their weights are finite,
    too. The sum runs over
    ascending j in float32. The gate and up products, the activation and each expert's output may be rounded to x's
    dtype. Under a scheme of the weights, x and the activation are taken as `linear` takes them.
    Source: DeepSeek-V3; GLM-5 has 256 experts, 8 per token.
    """
    parts = np.zeros((*ids.shape, x.shape[1]))
    for e in range(len(w13)):
        t, j = np.nonzero(ids - first_expert == e)
        if len(t):
            h = may_round("gate_up", product("th,ih->ti", x[t], w13[e]), to="x")
            h = may_round("activation", silu_mul.reference(h), to="x")
            parts[t, j] = may_round("expert", product("ti,hi->th", h, w2[e]), to="x")
    return total(single(parts * weights[..., None]), axis=1)


@moe_experts.decomposed(w13="grouped_gemm.w", w2="grouped_gemm.w")
def _(ops: Any, x: Any, w13: Any, w2: Any, ids: Any, weights: Any, *, first_expert: int = 0) -> Any:
    rows, counts, source = ops.moe_permute(x, ids, E=w13.spec.shape[0], first_expert=first_expert)
    h = ops.silu_mul(ops.grouped_gemm(rows, w13, counts))
    return ops.moe_unpermute(ops.grouped_gemm(h, w2, counts), source, weights)
