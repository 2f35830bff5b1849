from typing import Any

from porthal.hal import FLOATS, Batch, Pages, contract
from porthal.hal.numerics import Array, may_round
from porthal.hal.scheme import LATENTS, WEIGHTS, product
from porthal.hal.spans import EPSILON, THETA
from porthal.ops.kv_write import kv_write
from porthal.ops.rms_norm import rms_norm
from porthal.ops.rope import rope


@contract(
    "h[T, H], q_a: Weight[Q, H], q_norm[Q], q_b: Weight[N*D+N*R, Q], kv_a: Weight[C+R, H], kv_norm[C], "
    "w_uk: Weight[N, C, D], kv!: Pages{c[C], kp[R]}, batch: Batch[T] "
    "-> q_latent[T, N, C], q_rope[T, N, R], qr[T, Q], kv",
    dtypes={
        "h": FLOATS,
        "q_a": "h",
        "q_norm": "h | float32",
        "q_b": "h",
        "kv_a": "h",
        "kv_norm": "h | float32",
        "w_uk": "h",
        "kv": "h",
        "q_latent": "h",
        "q_rope": "h",
        "qr": "h",
    },
    cost=lambda d, b: (
        2 * d.T * (d.H * (d.Q + d.C + d.R) + d.N * (d.Q * (d.D + d.R) + d.D * d.C)),
        b.h * (d.H * (d.Q + d.C + d.R) + d.N * (d.Q * (d.D + d.R) + d.D * d.C) + d.T * (d.H + d.Q + 2 * d.C)),
    ),
    independent=("T",),
    cases={
        "H": (256,),
        "Q": (128,),
        "N": (8, 1),
        "D": (192, 32),
        "C": (512,),
        "R": (64,),
        "theta": (1e6, 1e4),
        "eps": (1e-5, 0.5),
    },
    legal={"theta": THETA, "eps": EPSILON},
    rules=[("R to be even", lambda f: f.R % 2 == 0)],
    values={"h": ("normal", "seesaw"), "q_b": ("weight", "pillar")},
    schemes={"q_a": WEIGHTS, "q_b": WEIGHTS, "kv_a": WEIGHTS, "w_uk": WEIGHTS, "kv": LATENTS},
    profiles=("inference",),
)
def mla_prolog(
    h: Array,
    q_a: Array,
    q_norm: Array,
    q_b: Array,
    kv_a: Array,
    kv_norm: Array,
    w_uk: Array,
    kv: Pages,
    batch: Batch,
    *,
    theta: float,
    eps: float,
) -> tuple[Array, Array, Array, Pages]:
    """The query and key side of MLA, up to the cache write.

    qr = rms_norm(q_a h); [qn | qp] = q_b qr per head; q_latent = w_uk qn (W_UK absorbed), q_rope = rope(qp);
    [c | kp] = kv_a h; the cache gets rms_norm(c) and rope(kp). RoPE is interleaved over the last R of each head. Every
    intermediate may be rounded to h's dtype. Source: DeepSeek-V2; Ascend fuses it as mla_prolog_v3, MLU as fused_mla_q/kv.
    """
    heads, _, nope = w_uk.shape
    width = kv.spec.fields[1][1]
    qr = rms_norm.reference(may_round("q_a", product("th,qh->tq", h, q_a), to="h"), q_norm, eps=eps)
    q = may_round("q", product("tq,oq->to", may_round("qr", qr, to="h"), q_b), to="h").reshape(len(h), heads, nope + width)
    a = may_round("kv_a", product("th,ch->tc", h, kv_a), to="h")
    c = rms_norm.reference(a[:, :-width], kv_norm, eps=eps)

    def rotate(x: Array) -> Array:
        return rope.reference(x, batch, theta=theta, layout="interleaved", start=0, width=width)

    q_latent = product("tnd,ncd->tnc", q[..., :nope], w_uk)
    q_rope = rotate(q[..., nope:])
    kp = rotate(a[:, None, -width:])[:, 0]
    return q_latent, q_rope, qr, kv_write.reference(kv, batch, c, kp)


@mla_prolog.decomposed(q_a="linear.w", q_b="linear.w", kv_a="linear.w", w_uk="head_linear.w")
def _(
    ops: Any,
    h: Any,
    q_a: Any,
    q_norm: Any,
    q_b: Any,
    kv_a: Any,
    kv_norm: Any,
    w_uk: Any,
    kv: Any,
    batch: Any,
    *,
    theta: float,
    eps: float,
) -> Any:
    heads, latent, nope = w_uk.spec.shape
    width = kv.spec.fields[1][1]
    rotation = {"theta": theta, "layout": "interleaved", "start": 0, "width": width}
    qr = ops.rms_norm(ops.linear(h, q_a), q_norm, eps=eps)
    q = ops.linear(qr, q_b).reshape(h.shape[0], heads, nope + width)
    a = ops.linear(h, kv_a)
    c = ops.rms_norm(a[:, :latent], kv_norm, eps=eps)
    kp = ops.rope(a[:, latent:].reshape(h.shape[0], 1, width), batch, **rotation).reshape(h.shape[0], width)
    return (
        ops.head_linear(q[:, :, :nope], w_uk),
        ops.rope(q[:, :, nope:], batch, **rotation),
        qr,
        ops.kv_write(kv, batch, c, kp),
    )
