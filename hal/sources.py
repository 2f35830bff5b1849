"""Which files a package or a library consists of, and a digest of them: what tells one state of it from another."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path


def package_files(package: str) -> tuple[Path, ...]:
    """The Python files of a package that is imported, and its native code: what it has loaded, and what ctypes may load."""
    loaded = [getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    native = {Path(file) for file in loaded if file and not file.endswith(".py")}
    return tuple(sorted({*stored_files(package), *native}))


def stored_files(package: str) -> tuple[Path, ...]:
    """What lies in the folders of a package that is imported."""
    return _inside(getattr(sys.modules.get(package), "__path__", ()))  # several of a namespace package


def library_files(module: str) -> tuple[Path, ...]:
    """Those of a module that may not be imported yet; () where nobody finds it, or where it is part of Python itself."""
    with suppress(ImportError, ValueError):
        if module not in sys.stdlib_module_names and (spec := find_spec(module)):
            single = [Path(spec.origin)] if spec.has_location and spec.origin else []
            return _inside(spec.submodule_search_locations or ()) or tuple(single)
    return ()


def _inside(homes: Iterable[str]) -> tuple[Path, ...]:
    folders = [folder for home in map(Path, homes) for folder in (home, *home.glob("*/"))]  # porthal's may be links
    return tuple(sorted({file for folder in folders for kind in ("*.py", "*.so") for file in folder.rglob(kind)}))


@cache
def digest(files: tuple[Path, ...]) -> str:
    """Of names and contents."""
    found = blake2b(digest_size=6)
    for file in files:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()
