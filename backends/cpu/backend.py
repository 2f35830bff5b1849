"""Native kernels for NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from porthal.backends.cpu import _native, policy
from porthal.backends.cpu.attention import Attention
from porthal.backends.cpu.collectives import Collectives
from porthal.backends.cpu.composites import Composites
from porthal.backends.cpu.copies import Copies
from porthal.backends.cpu.elementwise import Elementwise
from porthal.backends.cpu.peaks import peaks
from porthal.backends.cpu.quantising import Quantising
from porthal.backends.cpu.routing import Routing
from porthal.backends.cpu.tokens import Tokens
from porthal.hal import Peak, Traits, UsageError


class Cpu(Attention, Collectives, Copies, Elementwise, Composites, Quantising, Routing, Tokens):
    """Native kernels; what is not packed lies as in the reference."""

    def __init__(self, device: str = "") -> None:
        if device:
            raise UsageError(f"{self.name} has no device {device!r}: expected {self.name!r} alone")
        super().__init__()
        policy.apply(_native)

    @property
    def traits(self) -> Traits:
        return Traits(flushes_denormals=policy.flushes(_native))

    def describe(self) -> str:
        flushes = ", products of bfloat16 read subnormals as zero" if policy.flushes(_native) else ""
        return f"{super().describe()} ({policy.text(_native)}{flushes})"

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A list of native calls. What a kernel does in Python is not in it: one of a class derived from this that computes
        there says `capturable = False`.
        """
        recording = self.native.Recording()
        results = recording.record(run)

        def replay() -> Any:
            recording.replay()
            return results

        return replay

    def peaks(self) -> Mapping[str, Peak]:
        return peaks()
