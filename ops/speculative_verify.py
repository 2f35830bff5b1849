import numpy as np

from porthal.hal import contract
from porthal.hal.numerics import Array, softmax_slack
from porthal.hal.spans import SHARE, TEMPERATURE, UNIT
from porthal.ops.sample import candidates, kept_of


@contract(
    "logits[R, n+1, V], draft[R, n], u[R, n+1], temperature[R], top_k[R], top_p[R], draft_probs[R, n, V]? "
    "-> tokens[R, n+1]",
    dtypes={
        **dict.fromkeys(("logits", "u", "temperature", "top_p", "draft_probs"), "float32"),
        **dict.fromkeys(("draft", "top_k", "tokens"), "int32"),
    },
    cost=lambda d, b: (8 * d.R * (d.n + 1) * d.V, 4 * d.R * (2 * d.n + 1) * d.V),
    version=2,
    rows="R",
    independent=("R",),
    cases={"V": (4096, 256), "n": (3, 1, 7, 9), "R": (4, 1)},
    ranges={"draft": (0, "V"), "top_k": (0, "V+1"), "tokens": (-1, "V")},
    legal={"u": UNIT, "temperature": TEMPERATURE, "top_p": SHARE, "draft_probs": SHARE},
    choice="tokens",
    values={
        "logits": ("normal", "masked", "special", "blocked", "halved", "shelves", "offset", "rising", "summit"),
        "u": ("uniform", "zeros", "refused", "stopped"),
        "temperature": ("temperature", "cold", "hot", "greedy"),
        "top_k": ("top_k", "brim"),
        "top_p": ("probability", "nucleus", "brink"),
        "draft_probs": ("distribution",),
    },
    profiles=("inference",),
)
def speculative_verify(
    logits: Array, draft: Array, u: Array, temperature: Array, top_k: Array, top_p: Array, draft_probs: Array | None = None
) -> Array:
    """Keep the longest accepted prefix of the drafts and emit one more token: tokens[r] = drafts kept, token, then -1.

    Row i of a request judges draft i. Let p be what `sample` draws from: softmax(logits / temperature) of the candidates
    that top_k and top_p keep, divided by their sum, 0 for all others; at temperature 0, or where the highest logit is not
    finite, all of it on the argmax; NaN counts as -inf. Let q be the draft's distribution (absent: all of it on the draft).
    Draft i is accepted when u[i] * q(draft) < p(draft); the token is drawn at u[n] from max(p - q, 0) normalised after a
    rejection, from p after the last draft, in the order of ids. No token of probability 0 is emitted. The text is then
    distributed as without drafts. Source: Leviathan et al. 2023.
    """
    R, n = draft.shape
    tokens = np.full((R, n + 1), -1, np.int32)
    for r in range(R):
        for i in range(n + 1):
            p, _ = _target(logits[r, i], temperature[r], int(top_k[r]), top_p[r])
            q = _proposed(draft, draft_probs, r, i, len(p))
            if i < n and u[r, i] * q[draft[r, i]] < p[draft[r, i]]:
                tokens[r, i] = draft[r, i]
                continue
            cumulated = np.cumsum(_residual(p, q))
            tokens[r, i] = np.searchsorted(cumulated, u[r, n] * cumulated[-1], side="right")
            break
    return tokens


def _target(row: Array, temperature: float, top_k: int, top_p: float) -> tuple[Array, float]:
    """p [V], and the probability of the candidates that are kept; of one alone it is certain."""
    order, cumulated = candidates(row, temperature)
    kept = kept_of(cumulated, top_k, top_p)
    p = np.zeros(len(row))
    p[order[:kept]] = np.diff(cumulated[:kept], prepend=0.0) / cumulated[kept - 1]
    return p, float(cumulated[kept - 1]) if kept > 1 else np.inf


def _proposed(draft: Array, draft_probs: Array | None, r: int, i: int, V: int) -> Array:
    """q [V] of draft i; nothing behind the last one."""
    if i == draft.shape[1]:
        return np.zeros(V)
    return np.eye(1, V, draft[r, i])[0] if draft_probs is None else draft_probs[r, i]


def _residual(p: Array, q: Array) -> Array:
    rest = np.maximum(p - q, 0.0)
    return rest if rest.any() else p  # p equals q: a rejection came from rounding


@speculative_verify.adjusted
def _(logits: Array, draft: Array, **_: object) -> None:
    """Makes all drafts likely but one of three, or of as many as there are, so that prefixes of all lengths are accepted."""
    every = max(draft.shape[1], 3)
    for r, i in np.ndindex(*draft.shape):
        if (r + i) % every != every - 1:
            logits[r, i, draft[r, i]] += 8


@speculative_verify.admitted(softmax_slack)
def _(
    logits: Array, draft: Array, u: Array, temperature: Array, top_k: Array, top_p: Array, draft_probs: Array | None = None,
    *, results: Array, slack: Array,
) -> int | None:
    """The first request whose result is impossible with its probabilities off by at most its `slack`, or None."""
    R, n = draft.shape

    def possible(r: int, i: int, last: bool, cut: float) -> bool:
        """Whether row i gives what it gave, as a draft or as the last token, where top_p is off by `cut`."""
        p, mass = _target(logits[r, i], temperature[r], int(top_k[r]), top_p[r] + cut)
        q, token, off = _proposed(draft, draft_probs, r, i, len(p)), results[r, i], 3 * slack[r] / mass
        passed = p[draft[r, i]] - u[r, i] * q[draft[r, i]] if i < n else 0.0
        if not last:
            return bool(p[token] > 0 and passed > -off)
        cumulated = np.cumsum(_residual(p, q))
        target, before = u[r, n] * cumulated[-1], cumulated[token - 1] if token else 0.0
        drawn = before - off <= target <= cumulated[token] + off or np.maximum(p - q, 0.0).sum() <= off  # nothing but errors
        return bool(p[token] > 0 and passed <= off and drawn)

    for r in range(R):
        last = int((results[r] >= 0).sum()) - 1
        if last < 0 or (results[r, last + 1 :] != -1).any() or (results[r, :last] != draft[r, :last]).any():
            return r
        if not all(any(possible(r, i, i == last, cut) for cut in (-slack[r], slack[r])) for i in range(last + 1)):
            return r
    return None
