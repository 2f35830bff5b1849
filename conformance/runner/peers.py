"""Peers: backends in interpreters of their own, since the packages that they need do not go together with these here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porthal.conformance.report.files import read
from porthal.hal import UsageError


@dataclass(frozen=True)
class Peers:
    """The interpreter of each peer by name, as a file of JSON lists them: {"NAME": "PATH"}, relative to the file."""

    file: Path
    pythons: Mapping[str, str]

    @classmethod
    def read(cls, file: Path) -> Peers:
        """UsageError for a file that is something else."""
        return cls(file, read(file, _pythons))

    def python(self, backend: str) -> str:
        """The interpreter of a backend; "" for one that is no peer. UsageError where it is not there."""
        name = backend.partition(":")[0]
        if name not in self.pythons:
            return ""
        found = (self.file.parent / self.pythons[name]).absolute()  # a link followed would lead out of its environment
        if not (found.is_file() and os.access(found, os.X_OK)):
            raise UsageError(f"{self.file}: {name} has no Python at {found}: install the peer there, or name another one")
        return str(found)

    def option(self, backend: str) -> str:
        """What a command line needs to find it."""
        return f" --peers {self.file}" if self.python(backend) else ""


def _pythons(data: dict[str, Any]) -> dict[str, str]:
    for name, path in data.items():
        if not isinstance(path, str):
            raise UsageError(f"no file of peers: {name!r} is {path!r}, expected the path of its Python")
    return data
