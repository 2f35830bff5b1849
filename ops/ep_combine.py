from collections.abc import Sequence
from typing import Any

import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array, single, total
from porthal.hal.scheme import NONE
from porthal.hal.spans import EXPERTS
from porthal.ops.ep_dispatch import PAYLOADS, arrived, overflow, sent


@contract(
    "rows[M, H], ids[N, k], weights[N, k], comm: Communicator[ranks] -> y[N, H]",
    dtypes={"rows": FLOATS, "ids": "int32", "weights": "float32", "y": "rows"},
    cost=lambda d, b: (2 * d.N * d.k * d.H, (d.M + d.N * d.k) * d.H * b.rows + d.N * d.H * b.y),
    cases={"H": (6144, 5), "k": (8, 2, 1), "E": (256, 8, 3), "N": (16, 7, 0), "M": (1024, 128), "payload": PAYLOADS},
    legal={"E": EXPERTS, "payload": PAYLOADS},
    ranges={"ids": (-1, "E")},
    uneven=("N",),
    values={"ids": ("routed", "crowded", "nowhere", "deserted", "holes", "repeated"), "rows": ("normal", "integer")},
    profiles=("distributed",),
)
def ep_combine(
    rows: Sequence[Array],
    ids: Sequence[Array],
    weights: Sequence[Array],
    comm: Sequence[Any],
    *,
    E: int,
    payload: str = NONE,
) -> list[Array]:
    """y[t] = sum over j of weights[t, j] * (the row that ids[t, j] gave back), added in the order of j in float32.

    `rows` lie on each rank as ep_dispatch of these ids has left them, and each goes back to where it came from; an id of -1
    adds nothing. No result depends on the number of ranks. Under the scheme `payload` rows are sent as their codes and scales.
    Source: DeepEP combine; npu_moe_distribute_combine.
    """
    ranks, found = len(rows), []
    rows = [arrived(each, payload) for each in rows]
    at = [0] * ranks  # of each rank's rows, the first that belongs to the rank in turn
    for theirs, gates in zip(ids, weights):
        parts = np.zeros((theirs.size, rows[0].shape[1]))
        flat = theirs.reshape(-1)
        order = np.argsort(flat, kind="stable")
        for r in range(ranks):
            here = order[(flat[order] >= r * E // ranks) & (flat[order] < (r + 1) * E // ranks)]
            parts[here] = rows[r][at[r] : at[r] + len(here)]
            at[r] += len(here)
        found.append(total(single(parts.reshape(*theirs.shape, parts.shape[1]) * gates[..., None]), axis=1))
    return found


ep_combine.tells(sent)
ep_combine.fitting(overflow)
