import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, choose, softmax, softmax_slack


@contract(
    "logits[T, V], u[T], temperature[T], top_k[T], top_p[T] -> ids[T]",
    dtypes={
        "logits": FLOATS,
        "u": "float32",
        "temperature": "float32",
        "top_k": "int32",
        "top_p": "float32",
        "ids": "int32",
    },
    cost=lambda d, b: (8 * d.T * d.V, d.T * d.V * b.logits),
    cases={"V": (4096, 154880, 7)},
    ranges={"top_k": (0, "V+1"), "ids": (0, "V")},
    choice="ids",
    values={
        "logits": ("normal", "ties", "masked"),
        "u": ("uniform",),
        "temperature": ("temperature",),
        "top_p": ("probability",),
        "top_k": ("top_k",),
    },
    profiles=("inference",),
)
def sample(logits: Array, u: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """Draw ids[t] from softmax(logits[t] / temperature[t]) by inverting its distribution function at u[t] in [0, 1).

    Candidates are sorted by falling logit, ties by id. The first top_k[t] are kept (0: all), and of those the shortest
    prefix whose probability reaches top_p[t], at least one; ids[t] is the first kept candidate at which the cumulated
    probability exceeds u[t] times the probability kept. Temperature 0 is argmax. A logit of -inf is never drawn.
    Randomness is the input u: the result does not depend on the batch or the chip.
    """
    ids = np.zeros(len(logits), np.int32)
    for t in range(len(logits)):
        order, cumulated = _candidates(logits[t], temperature[t])
        kept = _kept(cumulated, temperature[t], int(top_k[t]), top_p[t])
        ids[t] = order[min(np.searchsorted(cumulated, u[t] * cumulated[kept - 1], side="right"), kept - 1)]
    return ids


def _candidates(row: Array, temperature: float) -> tuple[Array, Array]:
    """Ids in order, and their cumulated probabilities."""
    order = choose(row[None], len(row))[0]
    weights, norm = softmax(row[None, order] / (temperature or 1.0))
    return order, np.cumsum(weights[0] / norm[0])


def _kept(cumulated: Array, temperature: float, top_k: int, top_p: float) -> int:
    """How many candidates are kept."""
    limit = 1 if temperature == 0 else top_k or len(cumulated)
    within = cumulated[:limit] / cumulated[limit - 1]
    return int(min(np.searchsorted(within, top_p) + 1, limit))


@sample.admitted(softmax_slack)
def _(
    logits: Array, u: Array, temperature: Array, top_k: Array, top_p: Array, *, results: Array, slack: float
) -> int | None:
    """The first row whose id cannot be drawn with probabilities off by at most `slack`, or None."""
    for t, drawn in enumerate(results):
        order, cumulated = _candidates(logits[t], temperature[t])
        fewest, most = (_kept(cumulated, temperature[t], int(top_k[t]), top_p[t] + off) for off in (-slack, slack))
        at = int(np.nonzero(order == drawn)[0][0])
        before = cumulated[at - 1] if at else 0.0
        low, high = u[t] * cumulated[fewest - 1] - slack, u[t] * cumulated[most - 1] + slack
        if np.isneginf(logits[t, drawn]) or at >= most or before > high or low > cumulated[at]:
            return t
    return None
