"""Bits per token, against a loop over windows written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from porthal.hal import UsageError, bind
from porthal.model import load
from porthal.model.evaluate import bits_per_token
from tests.oracles import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    directory: Path = tmp_path_factory.mktemp("tiny")
    tiny.build(directory, "glm5")
    return load(directory, bind("reference"))


def test_overlapping_windows_score_every_token_once(model):  # type: ignore[no-untyped-def]
    ids = np.random.default_rng(0).integers(0, 160, 150).tolist()
    bits = 0.0
    for start, first, last in ((0, 1, 64), (33, 65, 97), (66, 98, 130), (99, 131, 149)):
        logits = model.forward(ids[start : start + 64]).astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        bits -= sum(logp[i - start - 1, ids[i]] for i in range(first, last + 1)) / np.log(2)
    assert bits_per_token(model, ids, window=64) == pytest.approx(bits / 149, abs=1e-6)


@pytest.mark.parametrize(
    ("ids", "window", "message"),
    [
        ([1], 64, "the text has 1 token: expected at least 2"),
        ([1, 2], 1, "window is 1: expected 2 to 512"),
        ([1, 2], 513, "window is 513"),
        ([1, 160], 64, "token 1 is 160"),
    ],
)
def test_bad_input_is_named(model, ids, window, message):  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        bits_per_token(model, ids, window)
