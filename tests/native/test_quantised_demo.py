"""What a published format costs the demo checkpoint: bits per byte of its own kind of text, beside bfloat16's."""

from __future__ import annotations

from pathlib import Path

import pytest

from porthal.conformance.diff.curve import stored
from porthal.hal import bind
from porthal.model.evaluate import bits_per_token
from porthal.model.load import DEMO, load
from porthal.model.quantising import FORMATS, quantise

# More bits per byte than in bfloat16, in thousandths: measured in November 2026 (docs/checkpoints.md), and as much again.
MORE = {"fp8": 3, "int8": 10, "int4": 52, "nvfp4": 7, "mxfp4": 5, "ascend-w8a8": 4, "ascend-w4a8": 25}


def bits(directory: Path) -> float:
    text = stored().texts["source code"].encode()[:1024]
    return bits_per_token(load(directory, bind("cpu"), dtype="bfloat16"), list(text))


@pytest.fixture(scope="module")
def plain() -> float:
    return bits(DEMO)


@pytest.mark.parametrize("scheme", FORMATS)
def test_bits_per_byte(scheme: str, plain: float, tmp_path: Path) -> None:
    quantise(DEMO, tmp_path, scheme)
    assert abs(bits(tmp_path) - plain) <= MORE[scheme] / 1000
