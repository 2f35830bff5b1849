"""From logits to tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from porthal.backends.reference.backend import Reference
from porthal.hal import limits

Array = np.ndarray[Any, Any]
ROWS = limits(provider="C++", batch_invariant=True)


class Tokens(Reference):
    """Each row by itself, in float32."""

    native: Any

    @ROWS
    def argmax(self, logits: Array) -> Array:
        ids = self.empty((logits.shape[0],), "int32")
        self.native.argmax(logits, ids)
        return ids

    @ROWS
    def check_finite(self, logits: Array, ids: Array) -> Array:
        checked = self.empty((logits.shape[0],), "int32")
        self.native.check_finite(logits, ids, checked)
        return checked

    @ROWS
    def log_softmax(self, logits: Array) -> Array:
        logp = self.empty(logits.shape, "float32")
        self.native.log_softmax(logits, logp)
        return logp

    @ROWS
    def gather_logprob(self, logits: Array, ids: Array) -> Array:
        logp = self.empty((logits.shape[0],), "float32")
        self.native.gather_logprob(logits, ids, logp)
        return logp

    @ROWS
    def sample(self, logits: Array, u: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
        ids = self.empty((logits.shape[0],), "int32")
        self.native.sample(logits, u, temperature, top_k, top_p, ids)
        return ids

    @ROWS
    def speculative_verify(
        self,
        logits: Array,
        draft: Array,
        u: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        draft_probs: Array | None = None,
    ) -> Array:
        tokens = self.empty(u.shape, "int32")
        self.native.speculative_verify(logits, draft, u, temperature, top_k, top_p, draft_probs, tokens)
        return tokens
