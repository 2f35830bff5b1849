"""The demo checkpoint as a gate for whole backends: bits per byte, and text that differs only where logits nearly tie."""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import porthal
from porthal.model import DEMO, Glm5, load
from porthal.model.evaluate import bits_per_token

HELD_OUT = Path(textwrap.__file__).read_bytes()[:1537]
SHORT = HELD_OUT[:769]  # two windows that overlap, and still index_topk < context; tests/proof takes the whole
PROMPT = list(b"def ")


@cache
def model(backend: str, dtype: str) -> Glm5:
    config = porthal.model.Config.read(DEMO)
    return load(DEMO, porthal.bind(backend, profile=porthal.model.profile(config, dtype)), dtype=dtype)


@cache
def bits_per_byte(backend: str, dtype: str, held_out: bytes = SHORT) -> float:
    return bits_per_token(model(backend, dtype), list(held_out), window=512)


@cache
def text(backend: str, dtype: str, tokens: int = 48, speculative: int = 0) -> list[int]:
    return model(backend, dtype).generate(PROMPT, tokens, speculative=speculative)


def explained(backend: str, dtype: str, tokens: int = 48) -> bool:
    """Whether two texts are equal up to a position at which the reference's own rounding could turn the choice.

    The budget of the logits there is what rounding to `dtype` does to the reference's logits: the largest difference
    between its `dtype` and its float32 logits, both ways.
    """
    ours, theirs = text(backend, dtype, tokens), text("reference", dtype, tokens)
    if ours == theirs:
        return True
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    shared = PROMPT + theirs[:at]
    narrow, wide = (model("reference", d).forward(shared)[-1] for d in (dtype, "float32"))
    top = np.sort(narrow)[-2:]
    return bool(top[1] - top[0] <= 2 * np.abs(narrow - wide).max())


class SameAsReference:
    """What every backend owes the demo checkpoint; a subclass names the backend."""

    backend: str

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_bits_per_byte_are_the_references(self, dtype):
        assert bits_per_byte(self.backend, dtype) == pytest.approx(bits_per_byte("reference", dtype), rel=1e-3)

    def test_text_is_the_references_in_float32_with_and_without_drafts(self):
        expected = text("reference", "float32")
        assert text(self.backend, "float32") == expected
        assert text(self.backend, "float32", speculative=3) == expected

    def test_text_differs_in_bfloat16_only_where_logits_nearly_tie(self):
        assert explained(self.backend, "bfloat16")
