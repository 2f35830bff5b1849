"""Which backends exist, which of them are here, and how one is made.

A backend is a package: a folder of porthal/backends, or what an entry point of group `porthal.backends` names. Its
`__init__` is light: `requires` lists the modules it needs, and an optional `probe()` says more. Its module `backend`
holds the one subclass of `Backend`, and is imported only when the backend is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Literal

from porthal.hal.backend import Backend
from porthal.hal.errors import Unavailable, UsageError

# Best first, when no name is given. A plugin somebody installed comes before all of these.
ORDER = ("ascend", "cpu", "torch", "reference")


@dataclass(frozen=True)
class Probe:
    """Whether a backend can be used on this machine, and why not."""

    state: Literal["available", "not here", "broken"]
    why: str = ""


def backend_names() -> tuple[str, ...]:
    """All known backends, plugins first, best first."""
    known = _packages()
    plugins = sorted(set(known) - set(ORDER))
    return (*plugins, *(n for n in ORDER if n in known))


def probe(name: str) -> Probe:
    """Look, without importing any vendor's package."""
    _known(name)
    try:
        package = importlib.import_module(_packages()[name])
        for module in getattr(package, "requires", ()):
            if importlib.util.find_spec(module.partition(".")[0]) is None:  # a dotted name would import its parents
                return Probe("not here", f"needs the Python package {module}")
        check = getattr(package, "probe", None)
        return check() if check else Probe("available")
    except Exception as error:  # a plugin's own failure must not hide the other backends
        return Probe("broken", f"{type(error).__name__}: {error}")


def backend_class(name: str) -> type[Backend]:
    """The backend's class, with its base's class behind it."""
    found = probe(name)
    if found.state != "available":
        raise Unavailable(f"backend {name!r} is {found.state}: {found.why}")
    return _compose(name)


def create(spec: str) -> Backend:
    """A backend from "name" or "name:device", as in torch:cuda:1."""
    name, _, device = spec.partition(":")
    return backend_class(name)(device)


def best() -> str:
    """The first available backend in the stated order."""
    for name in backend_names():
        if probe(name).state == "available":
            return name
    raise Unavailable("no backend is available: reinstall porthal")


@cache
def _packages() -> dict[str, str]:
    folder = importlib.import_module("porthal.backends").__path__  # by name: hal imports nothing above it
    found = {m.name: f"porthal.backends.{m.name}" for m in pkgutil.iter_modules(folder) if m.ispkg}
    for entry in importlib.metadata.entry_points(group="porthal.backends"):
        found[entry.name] = entry.value
    return found


def _known(name: str) -> None:
    known = _packages()
    if name not in known:
        close = get_close_matches(name, known, 1)
        hint = f", did you mean {close[0]!r}?" if close else ";"
        states = ", ".join(f"{n} ({_brief(n)})" for n in backend_names())
        raise UsageError(f"unknown backend {name!r}{hint} known are {states}")


def _brief(name: str) -> str:
    found = probe(name)
    return found.state + (f": {found.why}" if found.why else "")


@cache
def _compose(name: str) -> type[Backend]:
    try:
        module = importlib.import_module(f"{_packages()[name]}.backend")
    except Exception as error:
        raise Unavailable(f"backend {name!r} is broken: {type(error).__name__}: {error}") from error
    own = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Backend) and c.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise Unavailable(f"backend {name!r} is broken: {module.__name__} defines {len(own)} backends, expected one")
    own[0].name = name
    base = own[0].base
    if base is None:
        return own[0]
    return type(own[0].__name__, (own[0], backend_class(base)), {"name": name, "__module__": module.__name__})
