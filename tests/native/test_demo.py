"""The demo checkpoint on the native CPU backend, against the reference."""

from tests.demo import SameAsReference


class TestCpu(SameAsReference):
    backend = "cpu"
