"""The demo checkpoint on the native CPU backend, against the reference."""

import pytest

from tests import demo


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_per_byte_are_the_references(dtype):
    assert demo.bits_per_byte("cpu", dtype) == pytest.approx(demo.reference_bits(dtype), rel=1e-3)


def test_text_is_the_references_in_float32_with_and_without_drafts():
    expected = demo.text("reference", "float32")
    assert demo.text("cpu", "float32") == expected
    assert demo.text("cpu", "float32", speculative=3) == expected


def test_text_differs_in_bfloat16_only_where_logits_nearly_tie():
    assert demo.explained("cpu", "bfloat16")
