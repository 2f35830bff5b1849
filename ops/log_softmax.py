import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, elementary, single, softmax


@contract(
    "logits[T, V] -> logp[T, V]",
    dtypes={"logits": FLOATS, "logp": "float32"},
    cost=lambda d, b: (5 * d.T * d.V, d.T * d.V * (b.logits + 4)),
    independent=("T",),
    cases={"V": (154880, 256, 7)},
    values={"logits": ("normal", "large", "blocked", "halved", "rising", "seesaw", "offset")},
)
def log_softmax(logits: Array) -> Array:
    """logp = logits - log(sum exp(logits)) over the last axis, in float32; natural logarithm."""
    _, norm = softmax(logits)
    top = np.max(logits, axis=-1, keepdims=True, initial=-np.inf)
    return single(single(logits - top) - elementary(np.log, norm))
