from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array


@contract(
    "ids[T], table: Weight[V, H] -> x[T, H]",
    dtypes={"ids": "int32", "table": FLOATS, "x": "table"},
    cost=lambda d, b: (0, 2 * d.T * d.H * b.x + 4 * d.T),
    independent=("T", "H"),
    cases={"V": (4096, 256, 1, 65800), "H": (6144, 96)},
    ranges={"ids": (0, "V")},
    exact=True,
    values={"table": ("normal", "special", "huge", "denormal", "extreme", "signed")},
    profiles=("inference",),
)
def embedding(ids: Array, table: Array) -> Array:
    """x[t] = table[ids[t]]."""
    return table[ids]
