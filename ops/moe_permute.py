import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array
from porthal.hal.spans import EXPERTS, FIRST_EXPERT


@contract(
    "x[T, H], ids[T, k] -> sorted[T*k, H], counts[E], source[T*k]",
    dtypes={"x": FLOATS, "ids": "int32", "sorted": "x", "counts": "int32", "source": "int32"},
    cost=lambda d, b: (0, d.T * d.H * b.x * (1 + d.k) + 8 * d.T * d.k),
    independent=("H",),
    cases={"H": (6144, 96), "k": (8, 1, 2), "E": (256, 1, 16), "first_expert": (0, 3)},
    legal={"E": EXPERTS, "first_expert": FIRST_EXPERT},
    exact=True,
    values={
        "x": ("normal", "special", "huge", "denormal", "extreme", "signed"),
        "ids": ("routed", "crowded", "nowhere", "deserted", "holes", "away", "eldest", "central", "even", "ragged"),
    },
)
def moe_permute(x: Array, ids: Array, *, E: int, first_expert: int = 0) -> tuple[Array, Array, Array]:
    """Copy each row once per local expert it goes to, sorted by expert, then by row.

    Local experts are first_expert .. first_expert + E - 1. source[m] = t*k + j says where sorted row m came from;
    counts[e] is the number of rows of local expert e. Other ids and -1 are dropped: their places are at the tail, with
    source -1 and zero rows. Source: MegaBlocks; npu_moe_init_routing_v2.
    """
    flat = ids.reshape(-1).astype(np.int64) - first_expert
    local = (flat >= 0) & (flat < E)
    order = np.argsort(np.where(local, flat, E), kind="stable")
    kept = local[order]
    source = np.where(kept, order, -1).astype(np.int32)
    rows = np.where(kept[:, None], x[order // ids.shape[1]], 0.0) if len(order) else np.zeros((0, x.shape[1]))
    return rows, np.bincount(flat[local], minlength=E).astype(np.int32), source
