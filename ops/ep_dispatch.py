from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from porthal.hal import FLOATS, contract, scheme_of
from porthal.hal.numerics import Array
from porthal.hal.scheme import NONE
from porthal.hal.spans import EXPERTS

PAYLOADS = (NONE, "int8_token", "fp8_group")


def arrived(x: Array, payload: str) -> Array:
    """Rows once they were sent: under a scheme what its codes and scales say."""
    return x if payload == NONE else scheme_of(payload).rounded(x)


@contract(
    "x[N, H], ids[N, k], comm: Communicator[ranks] -> rows[M, H], expert[M, 1]",
    dtypes={"x": FLOATS, "ids": "int32", "rows": "x", "expert": "int32"},
    cost=lambda d, b: (0, d.N * d.H * b.x * (1 + d.k) + d.M * d.H * b.x),
    cases={"H": (6144, 5), "k": (8, 2, 1), "E": (256, 8, 3), "N": (16, 7, 0), "M": (1024, 128), "payload": PAYLOADS},
    legal={"E": EXPERTS, "payload": PAYLOADS},
    ranges={"ids": (-1, "E")},
    uneven=("N",),
    exact="payload",
    values={"x": ("tagged", "normal", "special"), "ids": ("routed", "crowded", "nowhere", "deserted", "holes", "repeated")},
    profiles=("distributed",),
)
def ep_dispatch(
    x: Sequence[Array], ids: Sequence[Array], comm: Sequence[Any], *, E: int, M: int, payload: str = NONE
) -> list[tuple[Array, Array]]:
    """Send each row of x to the ranks that have its experts, once per expert: rank r has experts r*E//ranks to
    (r+1)*E//ranks - 1. expert[m] is the expert that rows[m] is for.

    Rows arrive in the order of their ranks, of one rank in the order of expert, then of t*k + j; behind them expert is -1 and
    rows may hold anything. Ids of -1 go nowhere. More than M rows for one rank are an error on all. Under the scheme `payload`
    a row is sent as its codes and scales, see `quantize`, and rows are what these say.
    Source: DeepEP dispatch; npu_moe_distribute_dispatch.
    """
    ranks, x = len(x), [arrived(each, payload) for each in x]
    found = []
    for r in range(ranks):
        rows, expert = np.zeros((M, x[r].shape[1]), x[r].dtype), np.full((M, 1), -1, np.int32)
        at = 0
        for theirs, flat in zip(x, (i.reshape(-1) for i in ids)):
            order = np.argsort(flat, kind="stable")
            order = order[(flat[order] >= r * E // ranks) & (flat[order] < (r + 1) * E // ranks)]
            rows[at : at + len(order)] = theirs[order // ids[0].shape[1]]
            expert[at : at + len(order), 0] = flat[order]
            at += len(order)
        found.append((rows, expert))
    return found


@ep_dispatch.specified_rows
def _(expert: Array, **_: Array) -> dict[str, int]:
    return {"rows": int((expert >= 0).sum())}


@ep_dispatch.tells
def sent(ids: Array, facts: Any) -> list[int]:
    """How many rows this rank sends to each expert."""
    return list(np.bincount(ids[ids >= 0].astype(np.int64), minlength=facts.E))


@ep_dispatch.fitting
def overflow(told: Array, facts: Any) -> str:
    cuts = [r * facts.E // facts.ranks for r in range(facts.ranks + 1)]
    for r, (low, high) in enumerate(pairwise(cuts)):
        if (count := told[:, low:high].sum()) > facts.M:
            return f"rank {r} is sent {count} rows, expected at most M = {facts.M}"
    return ""
