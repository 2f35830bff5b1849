import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array
from porthal.ops.log_softmax import log_softmax


@contract(
    "logits[T, V], ids[T] -> logp[T]",
    dtypes={"logits": FLOATS, "ids": "int32", "logp": "float32"},
    cost=lambda d, b: (5 * d.T * d.V, d.T * d.V * b.logits),
    independent=("T",),
    cases={"V": (154880, 256, 7)},
    ranges={"ids": (0, "V")},
    values={"logits": ("normal", "large", "blocked", "halved", "rising", "seesaw", "offset")},
)
def gather_logprob(logits: Array, ids: Array) -> Array:
    """logp[t] = log_softmax(logits)[t, ids[t]], in float32; natural logarithm."""
    return np.take_along_axis(log_softmax.reference(logits), ids[:, None].astype(np.int64), axis=1)[:, 0]
