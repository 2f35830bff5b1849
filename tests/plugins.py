"""Plugins made on the spot, in a folder on sys.path, as an installer leaves them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

from porthal.hal import discovery

EMPTY = """
    from porthal.backends.reference.backend import Reference

    class Chip(Reference): ...
"""


def install(folder: Path, name: str, init: str = "", backend: str | None = EMPTY, **files: str) -> Path:
    """The package NAME_plugin with an entry point NAME; returns its folder."""
    package = folder / f"{name}_plugin"
    package.mkdir()
    (package / "__init__.py").write_text(dedent(init))
    for module, text in {"backend": backend, **files}.items():
        if text is not None:
            (package / f"{module}.py").write_text(dedent(text))
    announce(folder, name, package.name)
    return package


def announce(folder: Path, name: str, package: str, distribution: str = "") -> None:
    """The entry point alone."""
    distribution = distribution or package
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[porthal.backends]\n{name} = {package}\n")


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """Within, this process sees the plugins that are in the folder; afterwards it has forgotten them."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        forget()
        yield
    forget()
    for name in {m for m in set(sys.modules) - before if "_plugin" in m}:
        del sys.modules[name]


def forget() -> None:
    for known in (discovery._packages, discovery._package, discovery._loaded):
        known.cache_clear()
    discovery._silent.clear()
