"""What a report says of a backend and of what took part, sent from the process where the backend runs."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from porthal.conformance.report.waivers import Waiver, waivers
from porthal.hal import Backend


@dataclass(frozen=True)
class Facts:
    """A backend, where its kernels run, versions, waivers; and the ops for which it has kernels of several providers."""

    backend: str
    place: str
    environment: Mapping[str, str]
    waivers: tuple[Waiver, ...]
    providers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, backend: Backend, providers: Mapping[str, tuple[str, ...]] | None = None) -> Facts:
        return cls(str(backend), backend.place, environment(type(backend)), waivers(backend), providers or {})


def environment(backend: type[Backend]) -> dict[str, str]:
    """Versions of what took part, including the packages that the backend needs."""
    package = sys.modules.get(backend.__module__.rpartition(".")[0])
    needed = {}
    for name in getattr(package, "requires", ()):
        with suppress(importlib.metadata.PackageNotFoundError):  # a module whose package has another name
            needed[name] = importlib.metadata.version(name)
    return needed | {
        "porthal": sys.modules["porthal"].__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }
