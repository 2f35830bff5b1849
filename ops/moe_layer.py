from typing import Any

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, may_round, single
from porthal.hal.scheme import WEIGHTS, product
from porthal.ops.moe_experts import moe_experts
from porthal.ops.silu_mul import silu_mul


@contract(
    "x[T, H], w13: Weight[E, 2*I, H], w2: Weight[E, H, I], ids[T, k], weights[T, k], "
    "shared13: Weight[2*S, H], shared2: Weight[H, S] -> y[T, H]",
    dtypes={
        "x": FLOATS,
        "w13": "x",
        "w2": "x",
        "ids": "int32",
        "weights": "float32",
        "shared13": "x",
        "shared2": "x",
        "y": "x",
    },
    cost=lambda d, b: (
        6 * d.T * d.H * (d.k * d.I + d.S),
        2 * d.T * d.H * b.x + 3 * d.H * (min(d.E, d.T * d.k) * d.I * b.w13 + d.S * b.shared13),
    ),
    independent=("T",),
    cases={"H": (6144, 128), "I": (256, 96), "S": (256, 96), "E": (8, 1), "k": (8, 2, 256)},
    values={"ids": ("routed", "crowded", "nowhere", "deserted", "holes", "away", "eldest", "even"), "x": ("normal", "seesaw")},
    schemes={"w13": WEIGHTS, "w2": WEIGHTS, "shared13": WEIGHTS, "shared2": WEIGHTS},
    profiles=("inference", "moe"),
)
def moe_layer(
    x: Array, w13: Array, w2: Array, ids: Array, weights: Array, shared13: Array, shared2: Array
) -> Array:
    """y = moe_experts(x, w13, w2, ids, weights) + shared2 (silu_mul(shared13 x)): routed experts plus the shared one.

    Either part may be rounded before they are added. Source: DeepSeek-V3; npu dispatch_ffn_combine fuses it.
    """
    routed = may_round("routed", moe_experts.reference(x, w13, w2, ids, weights), to="y")
    h = may_round("gate_up", product("th,ih->ti", x, shared13), to="x")
    h = may_round("activation", silu_mul.reference(h), to="x")
    return single(routed + may_round("shared", product("ti,hi->th", h, shared2), to="y"))


@moe_layer.decomposed(w13="moe_experts.w13", w2="moe_experts.w2", shared13="linear.w", shared2="linear.w")
def _(ops: Any, x: Any, w13: Any, w2: Any, ids: Any, weights: Any, shared13: Any, shared2: Any) -> Any:
    shared = ops.linear(ops.silu_mul(ops.linear(x, shared13)), shared2)
    return ops.add(ops.moe_experts(x, w13, w2, ids, weights), shared)
