"""Mistakes planted in the adapters of chips: each is an edit of their source, which a case of the op must notice.

PyTorch takes one vendor's device per process, so that each vendor needs a process of its own.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from porthal.conformance.cases.case import Case
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.selftest.run import first_failing, plan
from porthal.hal import Backend
from porthal.hal.discovery import defined

FILES = "packed", "slots", "flash_mla", "deep_gemm", "deep_gemm_fp8"
OWN = {"cambricon": ("calls", "int8"), "kunlunxin": ("calls", "int8")}  # beside `backend`, as they import each other
SHARED = tuple(f"porthal.backends.torch.interfaces.{name}" for name in FILES)  # as they import


class Mistake(NamedTuple):
    """An edit in a file of the chip's folder, or of the shared ones, named by `where`; `old` stands there exactly once. `token`
    is the case that must notice it, "" where a planned one of the dtype does."""

    op: str
    what: str
    old: str
    new: str
    where: str = "backend"
    dtype: str = "bfloat16"
    token: str = ""


def edits(where: str, token: str) -> Callable[..., list[Mistake]]:
    """Mistakes in one file that one case must notice, each (what, old, new)."""
    return lambda *each: [Mistake(token.partition(",")[0], *one, where, "", token) for one in each]


def remade(names: Sequence[str], edited: str, what: str, old: str, new: str) -> types.ModuleType:
    """The last of these modules, all made anew of their sources, of which one is edited; nobody else sees them."""
    files = {name: Path(str(importlib.import_module(name).__file__)) for name in names}  # before one is edited
    with pytest.MonkeyPatch.context() as patch:
        for name, file in files.items():
            source = file.read_text(encoding="utf-8")
            if name == edited:
                assert source.count(old) == 1, f"{what}: its snippet must stand once in {name}: {old!r}"
                source = source.replace(old, new)
            made = types.ModuleType(name)
            exec(compile(source, f"<{what}>", "exec", dont_inherit=True), vars(made))
            patch.setitem(sys.modules, name, made)
    return made


def planted(vendor: str, mistake: Mistake) -> Backend:
    """The vendor's backend, with the mistake in it."""
    own = [f"porthal.backends.{vendor}.{name}" for name in (*OWN.get(vendor, ()), "backend")]
    [edited] = [name for name in (*SHARED, *own) if name.rpartition(".")[2] == mistake.where]
    [kind] = defined(remade((*SHARED, *own), edited, mistake.what, mistake.old, mistake.new))
    return kind()


def caught(vendor: str, mistake: Mistake) -> str:
    """The token of the case that notices it, "" where none does."""
    given = [Case.from_token(mistake.token)] if mistake.token else plan(mistake.op, mistake.dtype, level="bring-up")
    result, _ = first_failing(given, Bindings(planted(vendor, mistake)), "bring-up")
    return result.token if result else ""


def escaped(vendor: str) -> list[str]:
    """The mistakes of tests/planted that nothing notices, and the ops whose kernels fail as they are, which proves nothing."""
    importlib.import_module(f"porthal.backends.{vendor}.emulated").install()
    mistakes: tuple[Mistake, ...] = importlib.import_module(f"tests.planted.{vendor}").MISTAKES
    unedited = {Mistake(m.op, "unedited", "import torch\n", "import torch\n", "backend", m.dtype, m.token) for m in mistakes}
    return [f"{m.op}: {m.what}" for m in mistakes if not caught(vendor, m)] + [
        f"{m.op} fails as it is" for m in sorted(unedited) if caught(vendor, m)
    ]
