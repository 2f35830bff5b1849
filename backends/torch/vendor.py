"""A chip whose vendor ships a PyTorch: its device, and kernels that are declined where their library is not here."""

from __future__ import annotations

from typing import ClassVar

import torch

from porthal.backends.torch.backend import Torch
from porthal.backends.torch.interfaces.library import lacks
from porthal.hal import CallSpec, Kernel, Place


class Vendor(Torch):
    """`kind` is the device's type in PyTorch, `collectives` the name by which torch.distributed knows its library."""

    kind: ClassVar[str]
    collectives: ClassVar[str]

    def __init__(self, device: str = "") -> None:
        super().__init__(f"{self.kind}:{device or 0}")

    def __str__(self) -> str:
        return f"{self.name}:{torch.device(self.device).index or 0}"

    @property
    def place(self) -> Place:
        return "emulated device" if "emulated" in self.describe() else "hardware"

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        return lacks(kernel.provider) or super().refuses(op, kernel, spec)
