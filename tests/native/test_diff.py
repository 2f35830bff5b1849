"""The native CPU backend in lockstep with the reference."""

from tests.lockstep import Honest


class TestCpu(Honest):
    backend = "cpu"
