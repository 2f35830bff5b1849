"""A planted defect: an edit of a kernel's source, and the backend that the edited source makes."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from porthal.conformance.cases.domain import first_float
from porthal.conformance.selftest import compiled
from porthal.hal import Backend, UsageError, contracts

# The sources that edits apply to, and the module and class that each makes; the C++ ones make a native module for theirs.
SOURCES = {
    "backend": ("porthal.backends.torch.backend", "Torch"),
    "ranking": ("porthal.backends.torch.ranking", "Torch"),
    "schemes": ("porthal.backends.torch.schemes", "Torch"),
    "capture": ("porthal.backends.torch.capture", "Capturing"),
    "fused": ("porthal.conformance.selftest.fused", "Fused"),
    "kept": ("porthal.conformance.selftest.kept", "Kept"),
    **dict.fromkeys(compiled.SOURCES, ("porthal.backends.cpu.backend", "Cpu")),
}
THEMES = (
    "dense", "rows", "few", "repeated", "experts", "cache", "attention", "tokens", "composites", "capture", "state", "native",
    "native_attention", "native_schemes", "values", "schemes",
)  # fmt: skip
SCORED = ("float32", "bfloat16")


@dataclass(frozen=True)
class Defect:
    """One mistake in one op.

    kind         the class of mistake, in words that recur
    old, new     the edit: a snippet that stands exactly once in the source, and what takes its place
    source       which source, a key of SOURCES
    dtypes       of SCORED, those in which the edit changes what is computed; `why` says so where it is not both
    equivalent   the proof that no permitted call can tell the edited kernel from the right one; scored apart
    discrepancy  the number in docs/discrepancies of a real mistake of this kind, 0 where there is none
    """

    op: str
    name: str
    kind: str
    old: str
    new: str
    source: str = "backend"
    dtypes: tuple[str, ...] = SCORED
    why: str = ""
    equivalent: str = ""
    discrepancy: int = 0

    @property
    def key(self) -> str:
        """The defect's stable name: "linear/last-column-dropped"."""
        return f"{self.op}/{self.name}"

    @property
    def native(self) -> bool:
        """Whether it is planted in C++, which takes a compiler."""
        return self.source in compiled.SOURCES

    @property
    def scored(self) -> tuple[str, ...]:
        """The dtypes it must be found in; one empty word where the contract fixes every dtype."""
        return self.dtypes if first_float(contracts()[self.op]) else ("",)


@cache
def defects() -> tuple[Defect, ...]:
    """Every planted defect, by theme."""
    found = [d for t in THEMES for d in importlib.import_module(f"porthal.conformance.selftest.{t}").DEFECTS]
    keys = [d.key for d in found]
    if twice := {k for k in keys if keys.count(k) > 1}:
        raise UsageError(f"two defects are named {', '.join(sorted(twice))}: give each a name of its own")
    return tuple(found)


def plantable(ops: Sequence[str] = ()) -> tuple[Defect, ...]:
    """The defects of these ops, or of all, that can be planted on this machine."""
    return tuple(d for d in defects() if (not ops or d.op in ops) and not (d.native and compiled.lacking()))


def unplanted(ops: Sequence[str] = ()) -> str:
    """One sentence on those that cannot, or ""."""
    left = sum(not ops or d.op in ops for d in defects()) - len(plantable(ops))
    return f"{left} defects in C++ were not planted: {compiled.lacking()}" if left else ""


def text(source: str) -> str:
    if source in compiled.SOURCES:
        return (compiled.HERE / source).read_text(encoding="utf-8")
    return _text(SOURCES[source][0])


def _text(module: str) -> str:
    return Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8")


def edited(source: str, edits: tuple[tuple[str, str], ...], what: str) -> str:
    """A source with every edit applied; UsageError where a snippet does not stand in it exactly once."""
    found = text(source)
    for old, new in edits:
        if (n := found.count(old)) != 1:
            raise UsageError(f"{what}: its snippet stands {n} times in {source}, expected once; renew it: {old!r}")
        found = found.replace(old, new)
    return found


def plant(name: str, source: str, *edits: tuple[str, str]) -> Backend:
    """A backend whose kernels come from the edited source, which lives in a module nobody else sees."""
    place, kind = SOURCES[source]
    changed = edited(source, edits, name)
    native = source in compiled.SOURCES
    module = _compiled(f"planted {name}", _text(place) if native else changed)
    if source in ("ranking", "schemes"):  # which the backend imports
        importlib.import_module(SOURCES["backend"][0])  # with all that it imports, which must not meet the edited module
        before = sys.modules[place]
        sys.modules[place] = module
        try:
            module = _compiled(f"planted {name}", text("backend"))
        finally:
            sys.modules[place] = before
    made: type[Backend] = vars(module)[kind]
    made.name = "planted"
    if native:
        made.native = compiled.load(source, changed, name)  # type: ignore[attr-defined]  # of Cpu
    return made()


def _compiled(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(source, f"<{name}>", "exec", dont_inherit=True), vars(module))
    return module


def planted(defect: Defect) -> Backend:
    return plant(defect.key, defect.source, (defect.old, defect.new))
