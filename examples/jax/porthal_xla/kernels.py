"""The kernels: pure functions of jax.Array, compiled once per shape. `porthal_xla.backend` takes the operands apart.

Sums are float32. Nothing is read on the host: what the batch says comes as arrays, which `plan` made once per step.
"""

from functools import partial

import jax
import jax.numpy as jnp

F32 = jnp.float32


def compiled(*static):
    """`jax.jit`, with these attributes as constants of the program."""
    return partial(jax.jit, static_argnames=static)


def dot(subscripts, a, b):
    """A product in full float32: on a GPU or TPU the default precision is lower."""
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=F32)


def ranked(scores):
    """Scores as `top_k` and `argmax` must see them: in JAX a NaN is the highest, and 0 is above -0."""
    return jnp.where(jnp.isnan(scores), -jnp.inf, jnp.where(scores == 0, 0, scores))


# -- rows ----------------------------------------------------------------------------------------------------------------


@compiled("eps")
def rms_norm(x, weight, *, eps=1e-5):
    wide = x.astype(F32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps) * weight).astype(x.dtype)


@compiled("eps")
def add_rms_norm(x, residual, weight, *, eps=1e-5):
    r = x + residual
    return rms_norm(r, weight, eps=eps), r


@compiled("eps")
def layer_norm(x, weight, bias, *, eps=1e-6):
    wide = x.astype(F32)
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    return (normed * weight + bias).astype(x.dtype)


@compiled()
def silu_mul(x):
    gate, up = jnp.split(x.astype(F32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(x.dtype)


@compiled()
def add(a, b):
    return a + b


@compiled()
def concat(a, b):
    return jnp.concatenate([a, b], axis=-1)


@compiled()
def take_rows(x, rows):
    if not len(x):
        return jnp.zeros((len(rows), *x.shape[1:]), x.dtype)
    return jnp.where(rows[:, None] >= 0, x[rows], 0)


@compiled("theta", "layout", "start", "width")
def rope(x, positions, *, theta, layout, start, width):
    frequency = jnp.array([theta ** (-2.0 * i / width) for i in range(width // 2)], F32)  # of float64, rounded once
    angle = positions[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs, axis = ((width // 2, 2), -1) if layout == "interleaved" else ((2, width // 2), -2)
    turned = x[..., start : start + width].reshape(*x.shape[:-1], *pairs).astype(F32)
    a, b = jnp.moveaxis(turned, axis, 0)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis).reshape(*x.shape[:-1], width).astype(x.dtype)
    return jnp.concatenate([x[..., :start], turned, x[..., start + width :]], axis=-1)


# -- products with weights -----------------------------------------------------------------------------------------------


@compiled()
def embedding(ids, table):
    return table[ids]


@compiled("out")
def linear(x, w, *, out):
    return dot("tk,nk->tn", x, w).astype(out)


@compiled()
def head_linear(x, w):
    return dot("tnk,nmk->tnm", x, w).astype(x.dtype)


@compiled("k", "scale", "n_group", "topk_group")
def moe_route(logits, bias, *, k, scale, n_group=1, topk_group=1):
    s = jax.nn.sigmoid(logits)
    scores = ranked(s + bias)
    if n_group > 1:
        groups = scores.reshape(len(scores), n_group, scores.shape[1] // n_group)
        best = jax.lax.top_k(groups, min(2, groups.shape[-1]))[0].sum(-1)
        kept = jax.lax.top_k(ranked(best), topk_group)[1]
        chosen = (kept[:, None] == jnp.arange(n_group)[None, :, None]).any(-1, keepdims=True)
        scores = jnp.where(chosen, groups, -jnp.inf).reshape(scores.shape)
    ids = jax.lax.top_k(scores, k)[1]
    s = jnp.take_along_axis(s, ids, axis=1)
    return ids, scale * s / (s.sum(-1, keepdims=True) + 1e-20)


@compiled("first_expert")
def moe_experts(x, w13, w2, ids, weights, *, first_expert=0):
    """Expert by expert, those that nobody chose skipped: `ragged_dot` on a CPU multiplies every row by every expert."""

    def expert(e, y):
        chosen = ids == e + first_expert

        def add_to(y):
            out = dot("ti,hi->th", silu_mul(linear(x, w13[e], out=x.dtype)), w2[e])
            share = jnp.where(chosen, weights, 0).sum(-1, keepdims=True)
            return y + jnp.where(chosen.any(-1, keepdims=True), share * out, 0)

        return jax.lax.cond(chosen.any(), add_to, lambda y: y, y)

    return jax.lax.fori_loop(0, len(w13), expert, jnp.zeros(x.shape, F32)).astype(x.dtype)


# -- the cache -----------------------------------------------------------------------------------------------------------


@partial(jax.jit, donate_argnums=0)
def write(field, slots, rows):
    """Into the cache's own memory, which the caller gives away. A negative index counts from the end: -1 must not stay."""
    return field.at[jnp.where(slots < 0, len(field), slots)].set(rows, mode="drop")


def _slots(table, positions, block_size):
    """Of positions of one request with this row of the block table."""
    return table[positions // block_size] * block_size + positions % block_size


@compiled("S", "scale", "block_size")
def indexer_scores(iq, w, keys, plan, *, S, scale, block_size):
    """[T, S], one row after another: keys that are gathered for all rows at once do not fit."""
    positions = jnp.arange(S)

    def row(given):
        iq, w, request, visible = given
        k = keys[_slots(plan["table"][request], positions, block_size)]
        scores = scale * dot("h,hs->s", w.astype(F32), jax.nn.relu(dot("hd,sd->hs", iq, k)))
        return jnp.where(positions < visible, scores, -jnp.inf)

    return jax.lax.map(row, (iq, w, plan["request"], plan["visible"]))


@compiled("k")
def topk(scores, visible, *, k):
    """Ties go to the lowest position, so hidden ones come after the visible ones even where these are -inf."""
    positions = jnp.arange(scores.shape[1])
    length = jnp.minimum(visible, k)
    best = jax.lax.top_k(jnp.where(positions < visible[:, None], ranked(scores), -jnp.inf), min(k, scores.shape[1]))[1]
    best = jnp.pad(best, ((0, 0), (0, k - best.shape[1])))
    return jnp.where(jnp.arange(k) < length[:, None], best, -1), length


@compiled("scale", "block_size")
def sparse_mla(q_latent, q_rope, c, kp, indices, length, plan, *, scale, block_size):
    def row(given):
        q_latent, q_rope, indices, length, request = given
        there = jnp.arange(len(indices)) < length
        slots = _slots(plan["table"][request], jnp.maximum(indices, 0), block_size)
        latent, key = (jnp.where(there[:, None], field[slots], 0) for field in (c, kp))
        logits = scale * (dot("nc,sc->ns", q_latent, latent) + dot("nr,sr->ns", q_rope, key))
        logits = jnp.where(there, logits, -jnp.inf)
        top = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
        o = dot("ns,sc->nc", weights, latent.astype(F32)) / jnp.maximum(weights.sum(-1, keepdims=True), 1e-37)
        return o.astype(q_latent.dtype)

    return jax.lax.map(row, (q_latent, q_rope, indices, length, plan["request"]))


@compiled()
def select_rows(indices, length, rows):
    return indices[rows], length[rows]


# -- tokens --------------------------------------------------------------------------------------------------------------


@compiled()
def argmax(logits):
    return jnp.argmax(ranked(logits), axis=-1).astype(jnp.int32)


@compiled()
def check_finite(logits, ids):
    top = jnp.where(jnp.isnan(logits), jnp.inf, logits).max(-1)  # the maximum of a row with a NaN is a number on a CPU
    return jnp.where((ids >= 0) & ~jnp.isfinite(top), -2, ids)


def _drawn_from(logits, temperature, top_k, top_p):
    """Ids by falling logit, and their weights: 0 for those that cannot be drawn."""
    V = logits.shape[-1]
    best, order = jax.lax.top_k(ranked(logits.astype(F32)), V)
    temperature, top_k, top_p = temperature[..., None], top_k[..., None], top_p[..., None]
    certain = (temperature == 0) | ~jnp.isfinite(best[..., :1])
    weights = jnp.exp((best - best[..., :1]) / jnp.where(certain, 1, temperature))
    weights = jnp.where(certain, jnp.arange(V) == 0, weights)
    cumulated = jnp.cumsum(weights, axis=-1)
    limit = jnp.minimum(jnp.where(top_k == 0, V, top_k), (weights > 0).sum(-1, keepdims=True))
    within = cumulated / jnp.take_along_axis(cumulated, limit - 1, axis=-1)
    kept = jnp.minimum((within < top_p).sum(-1, keepdims=True) + 1, limit)
    return order, jnp.where(jnp.arange(V) < kept, weights, 0)


def _drawn(weights, u):
    """The first place where the sum exceeds u times the whole, never one of weight 0."""
    cumulated = jnp.cumsum(weights, axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[..., ::-1] > 0, axis=-1)
    return jnp.minimum((cumulated <= u[..., None] * cumulated[..., -1:]).sum(-1), last)


@compiled()
def sample(logits, u, temperature, top_k, top_p):
    order, weights = _drawn_from(logits, temperature, top_k, top_p)
    return jnp.take_along_axis(order, _drawn(weights, u)[:, None], axis=1)[:, 0]


@compiled()
def speculative_verify(logits, draft, u, temperature, top_k, top_p, draft_probs=None):
    """All rows at once, then the first rejected one of each request."""
    n, V = draft.shape[1], logits.shape[-1]
    order, weights = _drawn_from(logits, *(x[:, None] for x in (temperature, top_k, top_p)))
    weights = weights / weights.sum(-1, keepdims=True)
    p = jnp.put_along_axis(jnp.zeros(logits.shape, F32), order, weights, axis=-1, inplace=False)
    q = jax.nn.one_hot(draft, V, dtype=F32) if draft_probs is None else draft_probs
    p_draft, q_draft = (jnp.take_along_axis(x, draft[..., None], axis=2)[..., 0] for x in (p[:, :n], q))
    kept = jnp.cumprod(u[:, :n] * q_draft < p_draft, axis=1).sum(1, keepdims=True)
    p = jnp.take_along_axis(p, kept[..., None], axis=1)[:, 0]
    q = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), kept[..., None], axis=1)[:, 0]  # none after the last
    rest = jnp.maximum(p - q, 0)
    rest = jnp.where((rest > 0).any(-1, keepdims=True), rest, p)  # p equals q: a rejection came from rounding
    place = jnp.arange(n + 1)
    tokens = jnp.where(place < kept, jnp.pad(draft, ((0, 0), (0, 1))), -1)
    return jnp.where(place == kept, _drawn(rest, u[:, n])[:, None], tokens).astype(jnp.int32)
