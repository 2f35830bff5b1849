from typing import Any

from porthal.hal import FLOATS, Batch, Pages, Selection, contract
from porthal.hal.numerics import Array
from porthal.hal.scheme import KEYS
from porthal.hal.spans import SCALE, SELECTED
from porthal.ops.indexer_scores import indexer_scores
from porthal.ops.topk import topk


@contract(
    "iq[T, G, D], w[T, G], keys: Pages{k[D]}, batch: Batch[T, R, S] -> sel: Selection[T, k]",
    dtypes={"iq": FLOATS, "w": "float32 | iq", "keys": "iq"},
    cost=lambda d, b: (2 * d.T * d.S * d.G * (d.D + 1), d.R * d.S * d.D * b.keys + 4 * d.T * d.k),
    independent=("T",),
    cases={"G": (32, 8, 1, 40), "D": (128,), "k": (2048, 128, 16), "scale": (32**-0.5 * 128**-0.5, 0.1021)},
    legal={"k": SELECTED, "scale": SCALE},
    choice="sel",
    values={
        "iq": ("normal", "integer", "zeros"),
        "w": ("normal", "negative", "integer"),
        "keys": ("normal", "hollow", "seesaw"),
    },
    schemes={"keys": KEYS},
    profiles=("inference",),
)
def indexer_topk(iq: Array, w: Array, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
    """The min(k, visible) positions each row attends to: topk(indexer_scores(iq, w, keys, batch)).

    Exact ties are common (the ReLU zeroes whole keys) and go to the lowest position. An empty row selects nothing.
    Source: DeepSeek-V3.2; GLM-5 selects 2048.
    """
    return topk.reference(indexer_scores.reference(iq, w, keys, batch, scale=scale), batch, k=k)


@indexer_topk.scored
def _scores(iq: Array, w: Array, keys: Pages, batch: Batch, *, scale: float, **_: object) -> Array:
    return indexer_scores.reference(iq, w, keys, batch, scale=scale)


@indexer_topk.decomposed()
def _decomposed(ops: Any, iq: Any, w: Any, keys: Any, batch: Any, *, k: int, scale: float) -> Any:
    return ops.topk(ops.indexer_scores(iq, w, keys, batch, scale=scale), batch, k=k)
