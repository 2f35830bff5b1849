from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, choose


@contract(
    "logits[T, V] -> ids[T]",
    dtypes={"logits": FLOATS, "ids": "int32"},
    cost=lambda d, b: (d.T * d.V, d.T * d.V * b.logits),
    independent=("T",),
    cases={"V": (154880, 256, 7)},
    rules=[("V >= 1", lambda f: f.V >= 1)],
    exact=True,
    choice="ids",
    values={"logits": ("normal", "ties", "equal", "signed", "special", "blocked", "halved", "shelves", "rising", "summit")},
    profiles=("inference",),
)
def argmax(logits: Array) -> Array:
    """ids[t] = position of the highest logit of row t, the lowest one among equals; NaN counts as -inf."""
    return choose(logits, 1)[:, 0]


@argmax.scored
def _(logits: Array) -> Array:
    return logits
