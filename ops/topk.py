import numpy as np

from porthal.hal import Batch, Rows, Selection, SelectionSpec, contract
from porthal.hal.numerics import Array, choose
from porthal.hal.spans import SELECTED


@contract(
    "scores[T, S], batch: Batch[T, R, S] -> sel: Selection[T, k]",
    dtypes={"scores": "float32"},
    cost=lambda d, b: (0, 4 * d.T * (d.S + d.k)),
    independent=("T",),
    cases={"k": (2048, 128, 1, 7)},
    legal={"k": SELECTED},
    exact=True,
    choice="sel",
    values={
        "scores": ("normal", "ties", "crest", "signed", "large", "special", "blocked", "halved", "shelves", "rising", "summit")
    },
)
def topk(scores: Array, batch: Batch, *, k: int) -> Selection:
    """The positions of the min(k, visible[t]) highest scores among the first visible[t]: valid first, then -1.

    Ties go to the lowest position; NaN counts as -inf; the order inside the row is free. Columns from visible[t] on are
    never read.
    """
    length = np.minimum(batch.visible, k).astype(np.int32)
    best = choose(_scores(scores, batch), k)  # hidden positions come after all visible ones
    indices = np.full((batch.T, k), -1, np.int32)
    indices[:, : best.shape[1]] = np.where(np.arange(best.shape[1]) < length[:, None], best, -1)
    return Selection(SelectionSpec(batch.T, k), Rows(indices, length))


@topk.unread
def _hidden(scores: Array, batch: Batch) -> dict[str, Array]:
    return {"scores": np.arange(scores.shape[1]) >= batch.visible[:, None]}


@topk.scored
def _scores(scores: Array, batch: Batch, **_: object) -> Array:
    return np.where(_hidden(scores, batch)["scores"], -np.inf, scores)
