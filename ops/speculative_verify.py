import numpy as np

from porthal.hal import contract
from porthal.hal.numerics import Array, choose, softmax, softmax_slack


@contract(
    "logits[R, n+1, V], draft[R, n], temperature[R], u[R, n+1], draft_probs[R, n, V]? -> tokens[R, n+1]",
    dtypes={
        "logits": "float32",
        "draft": "int32",
        "temperature": "float32",
        "u": "float32",
        "draft_probs": "float32",
        "tokens": "int32",
    },
    cost=lambda d, b: (6 * d.R * (d.n + 1) * d.V, 4 * d.R * (2 * d.n + 1) * d.V),
    rows="R",
    cases={"V": (4096, 256), "n": (3, 1, 7), "R": (4, 1)},
    ranges={"draft": (0, "V"), "tokens": (-1, "V")},
    choice="tokens",
    values={
        "logits": ("normal", "masked"),
        "u": ("uniform",),
        "temperature": ("temperature",),
        "draft_probs": ("distribution",),
    },
    profiles=("inference",),
)
def speculative_verify(
    logits: Array, draft: Array, temperature: Array, u: Array, draft_probs: Array | None = None
) -> Array:
    """Keep the longest accepted prefix of the drafts and emit one more token: tokens[r] = drafts kept, token, then -1.

    Row i of a request judges draft i. Temperature 0: a draft is accepted when it is the row's argmax (lowest id among
    equals), and the token is the argmax at the first rejected row, or of the last row. Otherwise with p = softmax(logits /
    temperature) and q the draft's distribution (absent: all mass on the draft), draft i is accepted when
    u[i] * q(draft) < p(draft); the token is drawn at u[n] from max(p - q, 0) normalised after a rejection, from p after
    the last draft, in the order of ids. No token of probability 0 is emitted. The text is then distributed as without
    drafts. Source: Leviathan et al. 2023.
    """
    R, n = draft.shape
    tokens = np.full((R, n + 1), -1, np.int32)
    for r in range(R):
        greedy = temperature[r] == 0
        best = choose(logits[r], 1)[:, 0]
        p = _probabilities(logits[r], temperature[r])
        q = _draft_distribution(draft[r], logits.shape[-1], None if draft_probs is None else draft_probs[r])
        at = np.arange(n), draft[r]
        accepted = draft[r] == best[:n] if greedy else u[r, :n] * q[at] < p[at]
        kept = int(np.argmin([*accepted, False]))
        tokens[r, :kept] = draft[r, :kept]
        tokens[r, kept] = best[kept] if greedy else _draw(_residual(p, q, kept), u[r, n])
    return tokens


def _probabilities(logits: Array, temperature: float) -> Array:
    weights, norm = softmax(logits / (temperature or 1.0))
    return np.asarray(weights / norm)


def _draft_distribution(draft: Array, V: int, given: Array | None) -> Array:
    return np.eye(V)[draft] if given is None else given


def _residual(p: Array, q: Array, i: int) -> Array:
    rest = np.maximum(p[i] - q[i], 0.0) if i < len(q) else p[i]
    return rest if rest.sum() > 0 else p[i]  # p equals q: a rejection came from rounding


def _draw(p: Array, u: float) -> int:
    cumulated = np.cumsum(p)
    return int(min(np.searchsorted(cumulated, u * cumulated[-1], side="right"), len(p) - 1))


@speculative_verify.adjusted
def _(logits: Array, draft: Array, **_: object) -> None:
    """Makes two of three drafts likely, so that prefixes of all lengths are accepted."""
    for r, i in np.ndindex(*draft.shape):
        if (r + i) % 3 != 2:
            logits[r, i, draft[r, i]] += 8


@speculative_verify.admitted(softmax_slack)
def _(
    logits: Array,
    draft: Array,
    temperature: Array,
    u: Array,
    draft_probs: Array | None = None,
    *,
    results: Array,
    slack: float,
) -> int | None:
    """The first request whose result is impossible with probabilities off by at most `slack`, or None."""
    R, n = draft.shape
    for r in range(R):
        i = int((results[r] >= 0).sum()) - 1
        token = int(results[r, i])
        best = choose(logits[r], 1)[:, 0]
        if i < 0 or (results[r, i + 1 :] != -1).any() or (results[r, :i] != draft[r, :i]).any():
            return r
        if temperature[r] == 0:
            prefix = [bool(draft[r, j] == best[j]) for j in range(n)]
            if not all(prefix[:i]) or (i < n and prefix[i]) or token != best[i]:
                return r
            continue
        p = _probabilities(logits[r], temperature[r])
        q = _draft_distribution(draft[r], logits.shape[-1], None if draft_probs is None else draft_probs[r])
        margin = [p[j, draft[r, j]] - u[r, j] * q[j, draft[r, j]] for j in range(n)]
        if any(m < -slack for m in margin[:i]) or (i < n and margin[i] > slack):
            return r
        if any(p[j, results[r, j]] == 0 for j in range(i + 1)):
            return r
        cumulated = np.cumsum(_residual(p, q, i))
        target = u[r, n] * cumulated[-1]
        before = cumulated[token - 1] if token else 0.0
        if not before - slack <= target <= cumulated[token] + slack:
            return r
    return None
