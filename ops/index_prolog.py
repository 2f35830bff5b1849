from typing import Any

from porthal.hal import FLOATS, Batch, Pages, contract
from porthal.hal.numerics import Array, may_round
from porthal.hal.scheme import KEYS, WEIGHTS, product
from porthal.hal.spans import EPSILON, THETA
from porthal.ops.kv_write import kv_write
from porthal.ops.layer_norm import layer_norm
from porthal.ops.rope import rope


@contract(
    "qr[T, Q], h[T, H], wq_b: Weight[G*D, Q], wk: Weight[D, H], k_norm[D], k_bias[D], w_head: Weight[G, H], "
    "keys!: Pages{k[D]}, batch: Batch[T] -> iq[T, G, D], w[T, G], keys",
    dtypes={
        "qr": FLOATS,
        "h": "qr",
        "wq_b": "qr",
        "wk": "qr",
        "k_norm": "qr | float32",
        "k_bias": "qr | float32",
        "w_head": "qr",
        "keys": "qr",
        "iq": "qr",
        "w": "float32",
    },
    cost=lambda d, b: (
        2 * d.T * (d.Q * d.G * d.D + d.H * (d.D + d.G)),
        b.h * (d.Q * d.G * d.D + d.H * (d.D + d.G) + d.T * (d.Q + d.H + d.G * d.D + d.D)) + 4 * d.T * d.G,
    ),
    independent=("T",),
    cases={"Q": (128,), "H": (256,), "G": (32, 1, 40), "D": (128,), "theta": (1e6, 1e4), "width": (64, 32), "eps": (1e-6, 0.5)},
    legal={"theta": THETA, "width": lambda f: range(2, f.D + 1, 2), "eps": EPSILON},
    values={"qr": ("normal", "seesaw"), "h": ("normal", "seesaw"), "wk": ("weight", "pillar")},
    schemes={"wq_b": WEIGHTS, "wk": WEIGHTS, "w_head": WEIGHTS, "keys": KEYS},
    profiles=("inference",),
)
def index_prolog(
    qr: Array,
    h: Array,
    wq_b: Array,
    wk: Array,
    k_norm: Array,
    k_bias: Array,
    w_head: Array,
    keys: Pages,
    batch: Batch,
    *,
    theta: float,
    width: int,
    eps: float = 1e-6,
) -> tuple[Array, Array, Pages]:
    """The indexer's queries, head weights and cached key.

    iq = rope(wq_b qr) per head; the cache gets rope(layer_norm(wk h)); w = w_head h in float32, unscaled. RoPE is
    interleaved over the FIRST `width` of each head (MLA's is over the last). Intermediates may be rounded to qr's dtype.
    Source: DeepSeek-V3.2 lightning indexer with GLM-5's interleaved rope.
    """
    size = keys.spec.fields[0][1]

    def rotate(x: Array) -> Array:
        return rope.reference(x, batch, theta=theta, layout="interleaved", start=0, width=width)

    iq = rotate(may_round("iq", product("tq,oq->to", qr, wq_b), to="qr").reshape(len(qr), len(wq_b) // size, size))
    k = layer_norm.reference(may_round("k", product("th,dh->td", h, wk), to="qr"), k_norm, k_bias, eps=eps)
    k = rotate(may_round("normed", k, to="qr")[:, None])[:, 0]
    return iq, product("th,gh->tg", h, w_head), kv_write.reference(keys, batch, k)


@index_prolog.decomposed(wq_b="linear.w", wk="linear.w", w_head="linear.w")
def _(
    ops: Any,
    qr: Any,
    h: Any,
    wq_b: Any,
    wk: Any,
    k_norm: Any,
    k_bias: Any,
    w_head: Any,
    keys: Any,
    batch: Any,
    *,
    theta: float,
    width: int,
    eps: float = 1e-6,
) -> Any:
    rows, size = h.shape[0], keys.spec.fields[0][1]
    rotation = {"theta": theta, "layout": "interleaved", "start": 0, "width": width}
    iq = ops.rope(ops.linear(qr, wq_b).reshape(rows, wq_b.spec.shape[0] // size, size), batch, **rotation)
    k = ops.layer_norm(ops.linear(h, wk), k_norm, k_bias, eps=eps)
    k = ops.rope(k.reshape(rows, 1, size), batch, **rotation).reshape(rows, size)
    return iq, ops.linear(h, w_head, out="float32"), ops.kv_write(keys, batch, k)
