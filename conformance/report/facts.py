"""What a report says of a backend and of what took part, sent from the process where the backend runs."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from porthal.conformance.cases.edges import edges
from porthal.conformance.execution.traits import unasked
from porthal.conformance.report.waivers import Waiver, waivers
from porthal.hal import Backend
from porthal.hal.errors import message_of
from porthal.hal.sources import digest, package_files, stored_files


@dataclass(frozen=True)
class Facts:
    """A backend, where its kernels run, versions, waivers.

    kernels  the ops for which it has kernels of its own, with the provider of each, "" where none is named
    device   the device and its driver, as the backend describes them
    sources  a digest of the files of porthal and of each backend that takes part
    captures whether it captures graphs
    edges    tokens of calls at the ends of what its kernels state
    unasked  what no case is asked there, because of what the backend's arrays are like
    """

    backend: str
    place: str
    environment: Mapping[str, str]
    waivers: tuple[Waiver, ...]
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    device: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    unasked: tuple[str, ...] = ()
    captures: bool = False
    edges: tuple[str, ...] = ()

    @classmethod
    def of(cls, backend: Backend) -> Facts:
        return cls(
            str(backend),
            backend.place,
            environment(type(backend)) | {"processor": Backend.describe(backend)} | _version(backend) | _tuned(backend),
            waivers(backend),
            {op: tuple(k.provider for k in kernels) for op, kernels in backend.own().items()},
            _described(backend),
            sources(type(backend)),
            unasked(backend),
            backend.captures,
            tuple(case.token for case in edges(backend)),
        )


def _described(backend: Backend) -> str:
    try:
        return " ".join(str(backend.describe()).split())
    except Exception as error:  # a hook of the plugin's: a report without it is better than none
        return f"no description of the device: {message_of(error)}"


def sources(backend: type[Backend]) -> dict[str, str]:
    """A digest of the Python files of porthal, and one of the backend's own package with its native code."""
    found = {"porthal": digest(stored_files("porthal"))}
    package = backend.__module__.rpartition(".")[0]
    if getattr(sys.modules.get(package), "__file__", None):
        found[backend.name] = digest(package_files(package))
    return found


def _version(backend: Backend) -> dict[str, str]:
    """The version of the distribution that brings a plugin."""
    entries = importlib.metadata.entry_points(group="porthal.backends", name=backend.name)
    return {e.name: e.dist.version for e in entries if e.dist}


def _tuned(backend: Backend) -> dict[str, str]:
    """The table of `porthal tune` by which kernels are chosen, where there is one."""
    with suppress(Exception):  # a hook of the plugin's, as above
        if table := backend.tuned.calls and backend.tuned:
            return {"kernels chosen by": f"{len(table.calls)} calls timed on {table.date}"}
    return {}


def environment(backend: type[Backend]) -> dict[str, str]:
    """Versions of what took part, including the packages that the backend needs."""
    package = sys.modules.get(backend.__module__.rpartition(".")[0])
    names = (*getattr(package, "requires", ()), *getattr(package, "libraries", ()))
    needed = {name: version for name in names if (version := _installed(name))}
    return needed | {
        "porthal": sys.modules["porthal"].__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _installed(module: str) -> str:
    """The version of its package, or what it says itself where the package has another name; "" where nobody knows."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(module)
    return str(getattr(sys.modules.get(module), "__version__", ""))
