"""A chip whose vendor ships a PyTorch: its device, and kernels that are declined where their library is not here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from porthal.backends.torch.backend import Torch
from porthal.backends.torch.collectives import number_of_rank
from porthal.backends.torch.interfaces.library import lacks
from porthal.hal import CallSpec, Kernel, Place, Unavailable


class Vendor(Torch):
    """`kind` is the device's type in PyTorch, which it has from `package`; `visible` the variable that says which devices are
    seen; `engine` the name by which torch.distributed knows the chip's library."""

    kind: ClassVar[str]
    package: ClassVar[str]
    visible: ClassVar[str]

    def __init__(self, device: str = "") -> None:
        number = self._number(device)
        super().__init__(f"{self.kind}:{number}")
        getattr(torch, self.kind).set_device(number)  # some libraries run on the current one, wherever their tensors are

    def _number(self, device: str) -> int:
        """Of a device that is there; where none is named, that of this rank."""
        count = self._count()
        if device and not (device.isdecimal() and int(device) < count):
            shown = f", which {self.visible}={os.environ[self.visible]} shows" if self.visible in os.environ else ""
            raise Unavailable(f"{self.name} has no device {device!r}: {self.package} sees {count}, numbered from 0{shown}")
        return int(device) if device else number_of_rank(count)

    def _count(self) -> int:
        count: int = getattr(torch, self.kind).device_count()
        return count

    def __str__(self) -> str:
        return f"{self.name}:{torch.device(self.device).index or 0}"

    @property
    def place(self) -> Place:
        return "emulated device" if "emulated" in self.describe() else "hardware"

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        return lacks(kernel.provider) or super().refuses(op, kernel, spec)

    # -- graph capture -----------------------------------------------------------------------------------------------

    @property
    def captures(self) -> bool:
        return hasattr(getattr(torch, self.kind), f"{self.kind.upper()}Graph")

    @torch.no_grad()
    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        device = getattr(torch, self.kind)
        run()  # compiles what is not compiled yet, and makes what plans keep from its first use on
        graph = getattr(device, f"{self.kind.upper()}Graph")()
        with device.graph(graph):
            results = run()

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def device_facts(self) -> Mapping[str, Callable[[], Any]]:
        module, device = getattr(torch, self.kind), torch.device(self.device)
        return {
            "count": module.device_count,
            "name": lambda: module.get_device_name(device),
            "properties": lambda: module.get_device_properties(device),
            "free and total bytes": lambda: module.mem_get_info(device),
            "collectives": lambda: self.engine,
        }
