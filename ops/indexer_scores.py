import numpy as np

from porthal.hal import FLOATS, Batch, Pages, contract
from porthal.hal.numerics import Array, dot, may_round, single
from porthal.hal.scheme import KEYS, product
from porthal.hal.spans import SCALE


@contract(
    "iq[T, G, D], w[T, G], keys: Pages{k[D]}, batch: Batch[T, R, S] -> scores[T, S]",
    dtypes={"iq": FLOATS, "w": "float32 | iq", "keys": "iq", "scores": "float32"},
    cost=lambda d, b: (2 * d.T * d.S * d.G * (d.D + 1), d.R * d.S * d.D * b.keys + 4 * d.T * d.S),
    independent=("T",),
    cases={"G": (32, 8, 1, 40), "D": (128,), "scale": (32**-0.5 * 128**-0.5, 0.1021)},
    legal={"scale": SCALE},
    values={"iq": ("normal", "integer", "large"), "w": ("normal", "negative"), "keys": ("normal", "hollow", "seesaw")},
    schemes={"keys": KEYS},
)
def indexer_scores(iq: Array, w: Array, keys: Pages, batch: Batch, *, scale: float) -> Array:
    """scores[t, s] = scale * sum_h w[t, h] * max(0, iq[t, h] . k_s) for the visible s <= position of t, else -inf.

    Head weights may be negative. Under a scheme of the keys each head's query is quantised too, as `Scheme.other` says.
    Source: DeepSeek-V3.2 lightning indexer; GLM-5 has 32 heads of 128.
    """
    scores = np.full((batch.T, batch.max_kv), -np.inf)
    for r in range(batch.R):
        rows = slice(batch.cu_q[r], batch.cu_q[r + 1])
        k = keys["k"][batch.slots_of(r)]
        products = may_round("products", product("thd,sd->ths", iq[rows], k), to="float32")
        per_key = single(scale * dot("th,ths->ts", w[rows], np.maximum(products, 0.0)))
        hidden = np.arange(len(k)) >= batch.visible[rows, None]
        scores[rows, : len(k)] = np.where(hidden, -np.inf, per_key)
    return scores
