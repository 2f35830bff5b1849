"""Which backend a command is about."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from porthal.cli import text
from porthal.hal import UsageError

if TYPE_CHECKING:
    from porthal.conformance.runner.peers import Peers


def named(backend: str | None, emulated: bool) -> str:
    """The selected backend's name; one that can be emulated where that is asked for."""
    from porthal.hal import emulatable, selected

    name, rule = (backend, "--backend") if backend else selected()
    if emulated and name.partition(":")[0] not in emulatable():
        raise UsageError(f"--emulated with {name} ({rule}): expected one of {', '.join(emulatable())}, give --backend NAME")
    return name


def tested(backend: str | None, emulated: bool) -> str:
    """The name of a backend whose kernels are tested as they are; says that a fallback is not used for that."""
    if (given := os.environ.get("PORTHAL_FALLBACK", "error")) != "error":
        text.note(f"porthal: not used here: PORTHAL_FALLBACK={given}; conform, check and replay test the backend's own kernels")
    return named(backend, emulated)


def among(peers: Path | None) -> Peers | None:
    """The peers that a file lists, where one is given."""
    from porthal.conformance.runner.peers import Peers

    return Peers.read(peers) if peers else None
