"""The demo model on each chip against the reference: bits per byte of 1,537 held-out bytes, text of an emulated NPU; and the
tiny models in lockstep over 40 tokens."""

import pytest

from porthal.backends.ascend import emulated as ascend
from tests import demo
from tests.lockstep import Honest

PROVES = (
    "hal",
    "ops",
    "model",
    "backends",
    "conformance/diff",
    "conformance/judgement",
    "tests/demo.py",
    "tests/lockstep.py",
    "tests/oracles",
)


@pytest.fixture(scope="module")
def torch_npu():
    return ascend.install()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "torch", "ascend"])
def test_bits_per_byte_are_the_references(backend, dtype, torch_npu):
    theirs = demo.bits_per_byte("reference", dtype, demo.HELD_OUT)
    assert demo.bits_per_byte(backend, dtype, demo.HELD_OUT) == pytest.approx(theirs, rel=1e-3)


def test_text_of_an_emulated_npu_is_the_references(torch_npu):
    assert demo.text("ascend", "float32") == demo.text("reference", "float32")
    assert demo.explained("ascend", "bfloat16")


class TestCpu(Honest):
    backend, tokens = "cpu", 40


class TestTorch(Honest):
    backend, tokens = "torch", 40
