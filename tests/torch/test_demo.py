"""The demo checkpoint on the torch backend, against the reference."""

from tests.demo import SameAsReference


class TestTorch(SameAsReference):
    backend = "torch"
