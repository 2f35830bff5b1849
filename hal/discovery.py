"""Which backends exist, which of them are here, and how one is made.

A backend is a package: a folder of porthal/backends, or what an entry point of group `porthal.backends` names. Its
`__init__` is light: `requires` lists the modules it needs, `rank` decides which available backend is chosen when none
is named, and an optional `probe()` looks for the chip. Its module `backend` holds the one subclass of `Backend`, and is
imported only when the backend is used. A module `emulated` with `install()` imitates the chip's device on this CPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Literal

from porthal.hal.backend import Backend
from porthal.hal.errors import Unavailable, UsageError

INSTALLED = 1000  # the rank of a plugin that states none: somebody installed it, so it comes first


@dataclass(frozen=True)
class Probe:
    """Whether a backend can be used on this machine, and why not."""

    state: Literal["available", "not here", "broken"]
    why: str = ""


def backend_names() -> tuple[str, ...]:
    """All known backends, the highest rank first; by name where ranks are equal."""
    return tuple(sorted(_packages(), key=lambda name: (-(_rank(name) or 0), name)))


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
    """The backend's class; Unavailable says why it cannot be used."""
    found = probe(name)
    if found.state != "available":
        raise Unavailable(f"backend {name!r} is {found.state}: {found.why}")
    return _loaded(name)


def create(spec: str, emulated: bool = False) -> Backend:
    """A backend from "name" or "name:device", as in torch:cuda:1; on an emulated device if asked."""
    name, _, device = spec.partition(":")
    if emulated:
        _emulate(name)
    return backend_class(name)(device)


def best() -> str:
    """The first available backend in the stated order, of those that have a rank."""
    for name in backend_names():
        if _rank(name) is not None and probe(name).state == "available":
            return name
    raise Unavailable("no backend is available: reinstall porthal")


def emulatable() -> tuple[str, ...]:
    """The backends whose package can emulate their device on this CPU."""
    return tuple(name for name in backend_names() if _has_stand_in(name))


def _has_stand_in(name: str) -> bool:
    with suppress(Exception):  # a package that does not import has none; probe says why
        return importlib.util.find_spec(f"{_packages()[name]}.emulated") is not None
    return False


def _emulate(name: str) -> None:
    if name not in emulatable():
        raise UsageError(f"backend {name!r} cannot be emulated: expected one of {', '.join(emulatable())}")
    try:
        importlib.import_module(f"{_packages()[name]}.emulated").install()
    except ImportError as error:
        raise Unavailable(f"emulating {name} needs a package that is not installed: {error}") from None
    except RuntimeError as error:  # the vendor's real package is loaded
        raise Unavailable(str(error)) from None


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


def _rank(name: str) -> int | None:
    """A backend's rank; None: chosen only by name."""
    installed = not _packages()[name].startswith("porthal.backends.")
    try:
        package: ModuleType | None = importlib.import_module(_packages()[name])
    except Exception:  # probe says why
        package = None
    return getattr(package, "rank", INSTALLED if installed else None)


@cache
def _loaded(name: str) -> type[Backend]:
    try:
        module = importlib.import_module(f"{_packages()[name]}.backend")
    except Exception as error:
        raise Unavailable(f"backend {name!r} is broken: {type(error).__name__}: {error}") from error
    own = list(defined(module))
    if len(own) != 1:
        raise Unavailable(f"backend {name!r} is broken: {module.__name__} defines {len(own)} backends, expected one")
    if base := vars(own[0]).get("base"):
        raise Unavailable(
            f"backend {name!r} has base = {base!r}: write it as a base class instead, "
            f"class {own[0].__name__}({str(base).capitalize()}), after "
            f"from porthal.backends.{base}.backend import {str(base).capitalize()}"
        )
    backends = {f"{package}.backend": other for other, package in _packages().items()}
    for cls in own[0].__mro__:  # a plugin may derive from a plugin, whose kernels it then inherits
        if cls.__module__ in backends and issubclass(cls, Backend):
            cls.name = backends[cls.__module__]
    return own[0]


def defined(module: ModuleType) -> Iterator[type[Backend]]:
    """The backends that a module defines, none that it imports."""
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Backend) and value.__module__ == module.__name__:
            yield value
