"""The torch backend in lockstep with the reference."""

from tests.lockstep import Honest


class TestTorch(Honest):
    backend = "torch:cpu"
