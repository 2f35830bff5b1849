import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, choose, softmax, softmax_slack
from porthal.hal.spans import SHARE, TEMPERATURE, UNIT


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
    independent=("T",),
    cases={"V": (4096, 154880, 7)},
    ranges={"top_k": (0, "V+1"), "ids": (0, "V")},
    legal={"u": UNIT, "temperature": TEMPERATURE, "top_p": SHARE},
    choice="ids",
    values={
        "logits": ("normal", "ties", "masked", "special", "blocked", "halved", "shelves", "offset", "rising", "summit"),
        "u": ("uniform",),
        "temperature": ("temperature", "cold", "hot", "greedy"),
        "top_p": ("probability", "nucleus", "brink"),
        "top_k": ("top_k", "brim"),
    },
    profiles=("inference",),
)
def sample(logits: Array, u: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """Draw ids[t] from softmax(logits[t] / temperature[t]) by inverting its distribution function at u[t] in [0, 1).

    Candidates are sorted by falling logit, ties by id. The first top_k[t] are kept (0: all), and of those the shortest
    prefix whose probability reaches top_p[t], at least one; ids[t] is the first kept candidate at which the cumulated
    probability exceeds u[t] times the probability kept. Temperature 0 is argmax. A logit of -inf is never drawn, and NaN
    counts as -inf; where the highest logit is not finite, the row is drawn as at temperature 0.
    Randomness is the input u: the result does not depend on the batch or the chip.
    """
    ids = np.zeros(len(logits), np.int32)
    for t in range(len(logits)):
        order, cumulated = candidates(logits[t], temperature[t])
        kept = kept_of(cumulated, int(top_k[t]), top_p[t])
        ids[t] = order[min(np.searchsorted(cumulated, u[t] * cumulated[kept - 1], side="right"), kept - 1)]
    return ids


def candidates(row: Array, temperature: float) -> tuple[Array, Array]:
    """The ids that may be drawn, in order, and their cumulated probabilities."""
    order = choose(row[None], len(row))[0]
    if temperature == 0 or not np.isfinite(row[order[0]]):
        return order[:1], np.ones(1)
    order = order[np.isfinite(row[order])]
    weights, norm = softmax(row[order] / temperature)
    return order, np.cumsum(weights / norm)


def kept_of(cumulated: Array, top_k: int, top_p: float) -> int:
    """How many candidates are kept."""
    limit = min(top_k or len(cumulated), len(cumulated))
    return int(min(np.searchsorted(cumulated[:limit] / cumulated[limit - 1], top_p) + 1, limit))


@sample.admitted(softmax_slack)
def _(
    logits: Array, u: Array, temperature: Array, top_k: Array, top_p: Array, *, results: Array, slack: Array
) -> int | None:
    """The first row whose id cannot be drawn with its probabilities off by at most its `slack`, or None."""
    for t, drawn in enumerate(results):
        order, cumulated = candidates(logits[t], temperature[t])
        fewest, most = (kept_of(cumulated, int(top_k[t]), top_p[t] + off) for off in (-slack[t], slack[t]))
        place = np.flatnonzero(order[:most] == drawn)
        if not place.size:
            return t
        before = cumulated[place[0] - 1] if place[0] else 0.0
        low, high = u[t] * cumulated[fewest - 1] - slack[t], u[t] * cumulated[most - 1] + slack[t]
        if before > high or low > cumulated[place[0]]:
            return t
    return None
