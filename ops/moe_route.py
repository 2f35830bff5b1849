import numpy as np

from porthal.hal import contract
from porthal.hal.numerics import Array, choose, elementary, sigmoid, single, total
from porthal.hal.spans import ROUTED


@contract(
    "logits[T, E], bias[E] -> ids[T, k], weights[T, k]",
    dtypes={"logits": "float32", "bias": "float32", "ids": "int32", "weights": "float32"},
    cost=lambda d, b: (8 * d.T * d.E, 4 * d.T * (d.E + 2 * d.k)),
    independent=("T",),
    cases={"E": (256, 16, 17), "k": (8, 1, 2, 24), "scale": (2.5, 1.0), "n_group": (1, 8), "topk_group": (1, 4)},
    legal={
        "scale": ROUTED,
        "n_group": lambda f: [n for n in range(1, f.E + 1) if f.E % n == 0],
        "topk_group": lambda f: range(1, f.n_group + 1),
        "k": lambda f: range(1, f.topk_group * (f.E // f.n_group) + 1),
    },
    choice="ids",
    values={
        "logits": ("normal", "large", "ties", "sunk", "special", "shelves", "rising", "summit", "small"),
        "bias": ("normal", "ties", "tiers", "below", "small"),
    },
    profiles=("inference", "moe"),
)
def moe_route(
    logits: Array, bias: Array, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1
) -> tuple[Array, Array]:
    """s = sigmoid(logits); ids = the k highest of s + bias, ties to the lowest; weights = scale * s[ids] / sum s[ids].

    The bias only selects. 1e-20 is added to the sum. With n_group > 1 only experts of the topk_group groups with the
    highest sum of their two best biased scores can be chosen. A NaN counts as -inf; ids are in range and distinct.
    Source: DeepSeek-V3 (noaux_tc); GLM-5 has one group.
    """
    ids = choose(_scores(logits, bias, k=k, scale=scale, n_group=n_group, topk_group=topk_group), k)
    return ids, _finish(logits, bias, ids, scale=scale)["weights"]


@moe_route.scored
def _scores(logits: Array, bias: Array, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1) -> Array:
    biased = single(elementary(sigmoid, logits) + bias)
    if n_group == 1:
        return biased
    groups = biased.reshape(len(biased), n_group, biased.shape[1] // n_group)
    best_two = single(np.sort(np.where(np.isnan(groups), -np.inf, groups), axis=-1)[..., -2:].sum(-1))
    kept = np.zeros((len(biased), n_group), bool)
    np.put_along_axis(kept, choose(best_two, topk_group), True, axis=1)
    return np.where(kept[..., None], groups, -np.inf).reshape(biased.shape)


@moe_route.finished
def _finish(logits: Array, bias: Array, choice: Array, *, scale: float, **_: object) -> dict[str, Array]:
    s = np.take_along_axis(elementary(sigmoid, logits), choice.astype(np.int64), axis=1)
    return {"weights": single(scale * s / (total(s, keepdims=True) + 1e-20))}
