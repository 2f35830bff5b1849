import numpy as np

from porthal.hal import FLOATS, Batch, Pages, Selection, contract
from porthal.hal.numerics import Array, dot, may_round, single, softmax
from porthal.hal.scheme import LATENTS, sides
from porthal.hal.spans import SCALE


@contract(
    "q_latent[T, N, C], q_rope[T, N, R], kv: Pages{c[C], kp[R]}, sel: Selection[T, k], batch: Batch[T] -> o[T, N, C]",
    dtypes={"q_latent": FLOATS, "q_rope": "q_latent", "kv": "q_latent", "o": "q_latent"},
    cost=lambda d, b: (
        2 * d.T * d.N * d.k * (2 * d.C + d.R),
        d.T * d.N * (2 * d.C + d.R) * b.q_latent + d.T * d.k * (d.C + d.R) * b.kv,
    ),
    independent=("T", "N"),
    cases={"N": (64, 8, 1, 20), "C": (512,), "R": (64,), "k": (2048, 128, 16), "scale": (0.0625, 0.25, 0.1021)},
    legal={"scale": SCALE},
    values={"q_latent": ("normal", "large", "zeros", "seesaw", "sinking"), "kv": ("normal", "hollow", "seesaw")},
    schemes={"kv": LATENTS},
    profiles=("inference",),
)
def sparse_mla(
    q_latent: Array, q_rope: Array, kv: Pages, sel: Selection, batch: Batch, *, scale: float
) -> Array:
    """o[t, n] = sum_s softmax_s(scale * (q_latent[t, n] . c_s + q_rope[t, n] . kp_s)) c_s over the selected s of row t.

    Absorbed multi-head latent attention: one key of C + R values for all heads, whose first C are the value. A row that
    selects nothing gives 0. Scores and the softmax are float32; the probabilities may be rounded to the input's dtype
    before the second product; so may be the latents c of a cache under a scheme, in both.
    Source: DeepSeek-V2 (MLA), DeepSeek-V3.2 (sparse); GLM-5 has C=512, R=64, scale 1/16.
    """
    o = np.zeros(q_latent.shape)
    indices, length = sel.native
    for t in np.nonzero(length)[0]:
        position = indices[t, : length[t]].astype(np.int64)
        page = batch.block_table[batch.row_request[t]][position // batch.block_size].astype(np.int64)
        slot = page * batch.block_size + position % batch.block_size
        c, kp = (kv[name][slot] for name, _ in kv.spec.fields)
        q, c = sides(q_latent[t], c)
        logits = single(scale * (dot("nc,sc->ns", q, c) + dot("nr,sr->ns", q_rope[t], kp)))
        weights, norm = softmax(logits)
        o[t] = single(dot("ns,sc->nc", may_round("probabilities", weights, to="q_latent"), c) / norm)
    return o
