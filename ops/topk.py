import numpy as np

from porthal.hal import Batch, Rows, Selection, SelectionSpec, contract
from porthal.hal.numerics import Array, choose


@contract(
    "scores[T, S], batch: Batch[T, R, S] -> sel: Selection[T, k]",
    dtypes={"scores": "float32"},
    cost=lambda d, b: (0, 4 * d.T * (d.S + d.k)),
    cases={"k": (2048, 128, 1, 7)},
    rules=[("k >= 1", lambda f: f.k >= 1)],
    exact=True,
    choice="sel",
    values={"scores": ("normal", "ties", "equal", "signed", "large", "special")},
)
def topk(scores: Array, batch: Batch, *, k: int) -> Selection:
    """The positions of the min(k, visible[t]) highest scores among the first visible[t]: valid first, then -1.

    Ties go to the lowest position; NaN counts as -inf; the order inside the row is free. Columns from visible[t] on are
    never read.
    """
    indices = np.full((batch.T, k), -1, np.int32)
    length = np.minimum(batch.visible, k).astype(np.int32)
    step = max(1, 2**18 // max(1, scores.shape[1]))
    for rows in (slice(t, t + step) for t in range(0, batch.T, step)):
        best = choose(_scores(scores[rows], batch.visible[rows]), k)  # what is hidden loses to all that is visible
        indices[rows, : best.shape[1]] = np.where(np.arange(best.shape[1]) < length[rows, None], best, -1)
    return Selection(SelectionSpec(batch.T, k), Rows(indices, length))


@topk.scored
def _(scores: Array, batch: Batch, **_: object) -> Array:
    return _scores(scores, batch.visible)


def _scores(scores: Array, visible: Array) -> Array:
    return np.where(np.arange(scores.shape[1]) >= visible[:, None], -np.inf, scores)
