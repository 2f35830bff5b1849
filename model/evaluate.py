"""How well a model predicts a text: the number by which two backends are compared as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from porthal.hal import NotFinite, UsageError
from porthal.model.tokens import check_ids, ids_array, log2_sum

if TYPE_CHECKING:
    from porthal.model.glm5 import Glm5


def bits_per_token(model: Glm5, tokens: Sequence[int], window: int = 512) -> float:
    """Mean -log2 p of tokens[1:], as `logprobs` scores them. For a byte-level vocabulary these are bits per byte."""
    found = logprobs(model, tokens, window)
    return -log2_sum(found) / len(found)


def logprobs(model: Glm5, tokens: Sequence[int], window: int = 512) -> list[float]:
    """Natural log probabilities of tokens[1:], in windows that overlap by half: all but the first score only their second half.

    UsageError for fewer than 2 tokens or a window that does not fit the context; NotFinite where a log probability is NaN
    or infinite, -inf included: no mean has a value then.
    """
    context = model.config.max_position_embeddings
    if not 2 <= window <= context:
        raise UsageError(f"window is {window}: expected 2 to {context}, the context")
    ids = check_ids(tokens, model.config.vocab_size, max(len(tokens), 1))
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} token: expected at least 2")
    scores: list[float] = []
    scored = 1
    while scored < len(ids):
        start = max(0, scored - window // 2) if scored > 1 else 0
        piece = ids[start : start + window]
        targets = ids[scored : start + window + 1]
        found = _logprobs(model, piece, [*ids[start + 1 : start + window + 1]], scored - start - 1)
        for i, logprob in enumerate(found, scored):
            if not math.isfinite(logprob):
                raise NotFinite(
                    f"the log probability of token {i} is {logprob}: look for NaN and infinity in the checkpoint, or let "
                    "`porthal diff` name the op that makes them"
                )
        scores += found
        scored += len(targets)
    return scores


def _logprobs(model: Glm5, piece: list[int], following: list[int], first: int) -> list[float]:
    """Natural log probabilities of following[first:], each after the rows of `piece` up to it."""
    ops = model.ops
    cache = model.new_cache([len(piece)])
    batch = ops.plan(cache.step([cache.new_request()], [len(piece)]))
    hidden = model.hidden(ops.from_numpy(ids_array(piece)), batch, cache)[first : len(following)]
    found = ops.gather_logprob(model.logits(hidden), ops.from_numpy(ids_array(following[first:])))
    return [float(x) for x in ops.to_numpy(found)]
