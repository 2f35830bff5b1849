"""Which backends exist, which of them are here, and how one is made.

A backend is a package: a folder of porthal/backends, or what an entry point of group `porthal.backends` names. Its
`__init__` is light: `requires` lists the modules it needs, `rank` decides which available backend is chosen when none
is named, and an optional `probe()` looks for the chip; `libraries` and `variables` name the packages and the environment
variables that a report about this machine must tell. Its module `backend` holds the one subclass of `Backend`, and is
imported only when the backend is used. A module `emulated` with `install()` imitates the chip's device on this CPU.

A package may be somebody else's: whatever it raises or returns, it costs its own backend alone, and one sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from threading import Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from porthal.hal.errors import PorthalError, Unavailable, UsageError, foreign

if TYPE_CHECKING:
    from porthal.hal.backend import Backend

INSTALLED = 1000  # the rank of a plugin that states none: somebody installed it, so it comes first
PATIENCE = 3.0  # seconds in which a probe must answer
State = Literal["available", "not here", "broken"]
NAMES = {"requires": "modules", "libraries": "modules", "variables": "environment variables"}


@dataclass(frozen=True)
class Probe:
    """Whether a backend can be used on this machine, and why not.

    mistake  whether it is the user who can mend that: no other backend takes its place, which would hide it
    """

    state: State
    why: str = ""
    mistake: bool = False


@dataclass(frozen=True)
class _Package:
    """What the `__init__` of a backend's package states, or why it states nothing."""

    name: str
    requires: tuple[str, ...] = ()
    rank: int | None = None  # None: chosen only by name
    probe: Callable[[], Any] = lambda: Probe("available")
    libraries: tuple[str, ...] = ()  # modules beside those required
    variables: tuple[str, ...] = ()
    broken: str = ""


def backend_names() -> tuple[str, ...]:
    """All known backends, the highest rank first; by name where ranks are equal."""
    return tuple(sorted(_packages(), key=lambda name: (-(_package(name).rank or 0), name)))


def probe(name: str) -> Probe:
    """Look, without importing any vendor's package."""
    _known(name)
    return probes([name])[name]


def surroundings(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modules and the environment variables that a backend depends on, as its package states them."""
    _known(name)
    package = _package(name)
    return (*package.requires, *package.libraries), package.variables


def probes(names: Iterable[str] | None = None) -> dict[str, Probe]:
    """Look for all backends, or for these, side by side; one that does not answer within PATIENCE is broken."""
    names = list(names or backend_names())
    found = {name: _silent[name] for name in names if name in _silent}
    looks = {name: Thread(target=_look, args=(name, found), daemon=True) for name in names if name not in found}
    for look in looks.values():  # a daemon, so that one which hangs does not keep the process from ending
        look.start()
    end = time.monotonic() + PATIENCE
    for name, look in looks.items():
        look.join(max(end - time.monotonic(), 0.0))
        if name not in found:
            why = f"{_package(name).name}: its probe did not answer within {PATIENCE:g} s"
            found[name] = _silent[name] = Probe("broken", why)
    return {name: found[name] for name in names}


used: ContextVar[str | None] = ContextVar("porthal_backend", default=None)  # what porthal.use chooses
_silent: dict[str, Probe] = {}  # those that hang: asked once is enough


def _look(name: str, found: dict[str, Probe]) -> None:
    package = _package(name)
    try:
        with foreign(package.name):
            found[name] = Probe("broken", package.broken) if package.broken else _probed(package)
    except PorthalError as error:  # must not hide the other backends
        found[name] = Probe("broken", str(error))


def _probed(package: _Package) -> Probe:
    for module in package.requires:
        if importlib.util.find_spec(module.partition(".")[0]) is None:  # a dotted name would import its parents
            return Probe("not here", f"needs the Python package {module}")
    answer = package.probe()
    if not isinstance(answer, Probe) or answer.state not in get_args(State) or not isinstance(answer.why, str):
        raise UsageError(f"{package.name}: its probe returned {answer!r}, expected a Probe of {', '.join(get_args(State))}")
    return answer


def backend_class(name: str) -> type[Backend]:
    """The backend's class; Unavailable says why it cannot be used."""
    found = probe(name)
    if found.state != "available":
        raise Unavailable(f"backend {name!r} is {found.state}: {found.why}")
    return _loaded(name)


def create(spec: str, emulated: bool = False) -> Backend:
    """A backend from "name" or "name:device", as in torch:cuda:1; on an emulated device if asked."""
    from porthal.hal.backend import Place

    name, _, device = spec.partition(":")
    if emulated:
        _emulate(name)
    cls = backend_class(name)
    with foreign(_broken(name)):
        backend = cls(device)
        if backend.place not in get_args(Place):
            raise TypeError(f"place is {backend.place!r}, expected one of {', '.join(get_args(Place))}")
        if emulated and backend.place == "hardware":
            raise TypeError("place is 'hardware' on an emulated device: let it be 'emulated device' there")
        str(backend)  # in every report
    return backend


def running(backend: Backend) -> AbstractContextManager[None]:
    """Around what runs on a backend: whatever it raises becomes Unavailable, a sentence that names backend and package."""
    return foreign(f"running on {backend} of {type(backend).__module__.rpartition('.')[0]} failed")


def best() -> str:
    """The first backend in the stated order, of those that have a rank, that is available or would be but for a mistake."""
    for name in backend_names():
        if _package(name).rank is not None and ((found := probe(name)).state == "available" or found.mistake):
            return name
    raise Unavailable("no backend is available: reinstall porthal")


def selected() -> tuple[str, str]:
    """The backend that a bare bind() takes, and the rule that says so."""
    if name := used.get():
        return name, "porthal.use"
    if name := os.environ.get("PORTHAL_BACKEND"):
        return name, "PORTHAL_BACKEND"
    return best(), "the first available in this order"


def emulatable() -> tuple[str, ...]:
    """The backends whose package can emulate their device on this CPU."""
    return tuple(name for name in backend_names() if _has_stand_in(_package(name)))


def _has_stand_in(package: _Package) -> bool:
    with suppress(ImportError):  # of a module, which is no package
        return not package.broken and importlib.util.find_spec(f"{package.name}.emulated") is not None
    return False


def _emulate(name: str) -> None:
    if name not in emulatable():
        raise UsageError(f"backend {name!r} cannot be emulated: expected one of {', '.join(emulatable())}")
    module = f"{_package(name).name}.emulated"
    with foreign(f"backend {name!r} cannot be emulated: {module}"):
        importlib.import_module(module).install()


@cache
def _packages() -> dict[str, set[str]]:
    """The packages that have each name: one, unless a plugin takes the name of another backend."""
    import importlib.metadata  # takes longer than the rest of this file

    folder = importlib.import_module("porthal.backends").__path__  # by name: hal imports nothing above it
    found = {m.name: {f"porthal.backends.{m.name}"} for m in pkgutil.iter_modules(folder) if m.ispkg}
    with foreign("the entry points of the installed packages cannot be read"):
        for entry in importlib.metadata.entry_points(group="porthal.backends"):
            found.setdefault(entry.name, set()).add(entry.value)
    return found


@cache
def _package(name: str) -> _Package:
    package, *others = sorted(_packages()[name])
    if others:
        every = " and ".join([package, *others])
        return _Package(every, broken=f"{every} both have the name {name}: uninstall one, or rename its entry point")
    own = package.startswith("porthal.backends.")
    try:
        with foreign(package):
            module = importlib.import_module(package)
            rank = getattr(module, "rank", None if own else INSTALLED)
            requires, libraries, variables = names = [getattr(module, what, ()) for what in NAMES]
            for what, given in zip(NAMES, names):
                if not isinstance(given, (tuple, list)) or not all(isinstance(m, str) and m for m in given):
                    raise UsageError(f"{package}: {what} is {given!r}, expected a tuple of names of {NAMES[what]}")
            if type(rank) is not int and (rank is not None or hasattr(module, "rank")):
                raise UsageError(f"{package}: rank is {rank!r}, expected a whole number")
            asked = getattr(module, "probe", _Package.probe)
            return _Package(package, tuple(requires), rank, asked, tuple(libraries), tuple(variables))
    except PorthalError as error:
        return _Package(package, broken=str(error))


def _broken(name: str) -> str:
    return f"backend {name!r} is broken: {_package(name).name}"


def _known(name: str) -> None:
    if name not in _packages():
        from difflib import get_close_matches

        close = get_close_matches(name.lower(), _packages(), 1)
        hint = f", did you mean {close[0]!r}?" if close else ";"
        states = ", ".join(f"{n} ({p.state + (p.why and f': {p.why}')})" for n, p in probes().items())
        raise UsageError(f"unknown backend {name!r}{hint} known are {states}")


@cache
def _loaded(name: str) -> type[Backend]:
    from porthal.hal.backend import Backend

    with foreign(_broken(name)):
        module = importlib.import_module(f"{_package(name).name}.backend")
        own = list(defined(module))
    if len(own) != 1:
        found = " and ".join(sorted(cls.__name__ for cls in own)) or "no class"
        raise Unavailable(f"backend {name!r} is broken: {module.__name__} has {found}, expected one backend")
    if base := vars(own[0]).get("base"):
        raise Unavailable(
            f"backend {name!r} has base = {base!r}: write it as a base class instead, "
            f"class {own[0].__name__}({str(base).capitalize()}), after "
            f"from porthal.backends.{base}.backend import {str(base).capitalize()}"
        )
    backends = {f"{package}.backend": other for other, packages in _packages().items() for package in packages}
    for cls in own[0].__mro__:  # a plugin may derive from a plugin, whose kernels it then inherits
        if cls.__module__ in backends and issubclass(cls, Backend):
            cls.name = backends[cls.__module__]
    return own[0]


def defined(module: ModuleType) -> Iterator[type[Backend]]:
    """The backends that a module defines, none that it imports."""
    from porthal.hal.backend import Backend

    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Backend) and value.__module__ == module.__name__:
            yield value
