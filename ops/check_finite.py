import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array

NOT_FINITE = -2


@contract(
    "logits[T, V], ids[T] -> checked[T]",
    dtypes={"logits": FLOATS, "ids": "int32", "checked": "int32"},
    cost=lambda d, b: (d.T * d.V, d.T * d.V * b.logits),
    independent=("T",),
    cases={"V": (154880, 256, 7)},
    rules=[("V >= 1", lambda f: f.V >= 1)],
    ranges={"ids": (-1, "V")},
    exact=True,
    values={"logits": ("normal", "special", "masked", "blocked", "halved", "summit", "extreme", "rim")},
    profiles=("inference",),
)
def check_finite(logits: Array, ids: Array) -> Array:
    """checked[t] = ids[t], or -2 where the highest logit of row t, NaN above all, is not finite; an id of -1 stays.

    Not finite are rows with a NaN, with +inf, or with nothing but -inf; a -inf among others is a mask, and legal. Chosen
    ids pass through here on their way to the host, so that numbers gone wrong never become a text.
    """
    top = np.max(logits, axis=-1)
    return np.where((ids >= 0) & ~np.isfinite(top), np.int32(NOT_FINITE), ids)
