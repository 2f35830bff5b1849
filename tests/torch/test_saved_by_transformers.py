"""What transformers saves, in the published format or in its own with fused experts, loads without a word as the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", minversion="5.23")

from porthal import Binding
from porthal.model import load
from tests.oracles import tiny

TOLERANCE = 2e-5  # logits have a standard deviation near 1


@pytest.mark.parametrize("original", [True, False])
def test_logits_are_those_of_the_saved_model(
    directory: Path, tmp_path: Path, reference: Binding, caplog: pytest.LogCaptureFixture, original: bool
) -> None:
    tiny.hf_model(directory).save_pretrained(tmp_path, save_original_format=original)
    difference = load(tmp_path, reference).forward(tiny.PROMPT) - tiny.hf_logits(directory, tiny.PROMPT)
    assert np.abs(difference).max() < TOLERANCE
    assert not [record for record in caplog.records if record.name == "porthal"]
