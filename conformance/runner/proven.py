"""Inherited cases that need not run again: the backend they are inherited from has passed them in the same circumstances.

The same means: the kernels of the op and of what it is composed of, which call nothing that the plugin overrides; no
service of the base overridden; level, device, place, the sources and native code of all that takes part, the versions of
what is installed, the processor, and the settings of NumPy and PyTorch that a package may change for its whole process.
Only what passed is kept, as a line in a file beside the golden values. A chip's own kernels always run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.execution.bindings import Bound
from porthal.conformance.judgement.golden_cache import folder
from porthal.conformance.level import SUITE
from porthal.conformance.report.facts import environment
from porthal.conformance.report.results import Result, reused
from porthal.hal import Backend, contracts
from porthal.hal.backend import names_in
from porthal.hal.sources import package_files

Kernels = dict[str, list[list[str]]]  # op -> owner, provider and limits of each kernel, the first choice first


class Proven:
    """What the registered bases of a backend have passed at a level, in earlier runs of any backend that inherits it."""

    def __init__(self, backend: Backend, level: str) -> None:
        self.backend, self.level = backend, level
        chain = [c for c in type(backend).__mro__ if issubclass(c, Backend) and vars(c).get("name")]
        known, self.plugin = set(contracts()), cast("Any", type(backend))
        self.bases: dict[str, Any] = {c.name: c for c in chain if overridden(self.plugin, cast("Any", c)) <= known}
        self.files = {name: folder() / f"proven-{self._circumstances(c)}.jsonl" for name, c in self.bases.items()}
        self.known = {name: dict(_lines(file)) for name, file in self.files.items()}

    def recall(self, case: Case) -> Result | None:
        """The result of a case that a base has passed, as that of the kernel inherited from it."""
        for owner, known in self.known.items():
            line = known.get(case.token)
            if owner != self.backend.name and line and self._kernels(list(line["kernels"]), owner) == line["kernels"]:
                return reused(Result.read(line["result"]), owner)
        return None

    def keep(self, case: Case, bound: Bound, result: Result) -> None:
        """Remember a case that passed, if every kernel in it is of one base and does what it does there.

        A base's own fusion of a composite proves nothing: who inherits from it may compose that of other ops.
        """
        owners = {choice.owner for choice in bound.made_of if choice.status != "composed"}
        if result.verdict != "PASS" or len(owners) != 1 or (owner := owners.pop()) not in self.files:
            return
        kernels = self._kernels([choice.op for choice in bound.made_of], owner)
        fused = owner == self.backend.name and contracts()[case.op].decomposition
        if kernels is None or fused or case.token in self.known[owner]:
            return
        self.known[owner][case.token] = kept = {"result": vars(result), "kernels": kernels}
        with suppress(OSError):
            self.files[owner].parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(kept)
            with self.files[owner].open("a", encoding="utf-8") as file:
                file.write(f"{_checksum(text)} {text}\n")

    def _kernels(self, ops: list[str], owner: str) -> Kernels | None:
        """All kernels that the backend has for these ops, which decide what each call gets; None if one calls its own, or
        takes what its data decide."""
        base, known = self.bases[owner], contracts()
        if any(called(base, op) & overridden(self.plugin, base) for op in ops):
            return None
        found = {op: self.backend.candidates(known[op]) for op in ops if op in known}
        theirs = {vars(c).get("name") for c in base.__mro__}
        if any(k.limits.needs and k.owner not in theirs for kernels in found.values() for k in kernels):
            return None
        return {op: [[k.owner, k.provider, k.limits.text] for k in kernels] for op, kernels in found.items()}

    def _circumstances(self, base: type[Backend]) -> str:
        versions = {name: contract.version for name, contract in contracts().items()}
        installed = sorted({**environment(base), **environment(self.plugin)}.items())
        where = self.backend.device, self.backend.place, Backend.describe(self.backend)
        digest = hashlib.blake2b(
            repr((SUITE, self.level, where, installed, versions, settings())).encode(), digest_size=16
        )
        for file in sources(base):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()


@cache
def overridden(plugin: type[Any], base: type[Any]) -> frozenset[str]:
    """What the base has and the classes above it define anew, besides a name and a description."""
    above = plugin.__mro__[: plugin.__mro__.index(base)]
    every_class_has = {"name", "describe", "__annotations__", *vars(type("Empty", (base,), {"__doc__": ""}))}
    return frozenset(n for c in above for n in vars(c) if hasattr(base, n) and n not in every_class_has)


@cache
def called(base: type[Any], method: str) -> frozenset[str]:
    """The names that a method of the base uses, and those that the methods of these names use."""
    found: set[str] = set()
    left = [method]
    while left:
        function = inspect.unwrap(getattr(base, left.pop(), None))  # type: ignore[arg-type]
        names = set(names_in(code)) if (code := getattr(function, "__code__", None)) else set()
        left += names - found
        found |= names
    return frozenset(found)


def settings() -> list[Any]:
    """What a package may set at import for its whole process, and every kernel then computes with."""
    tiny = np.full(4, 2.0**-126, np.float32)
    found: list[Any] = [np.geterr(), np.getbufsize()]
    with np.errstate(all="ignore"):
        found.append(bool((tiny * np.float32(0.5)).any()))  # whether subnormals are kept
    if torch := sys.modules.get("torch"):
        matmul = torch.backends.cuda.matmul
        flags = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
        found += [flags, torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, torch.get_num_threads()]
        found += [torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()]
        found += [bool((torch.full((4,), 2.0**-126) * 0.5).any())]
    return found


def sources(base: type[Backend]) -> Iterator[Path]:
    """Whatever computes and judges: hal, ops, conformance, contracts from elsewhere, and the packages of the base and of
    what that is based on, with the native code that they have loaded."""
    root = Path(str(sys.modules["porthal"].__file__)).parent
    for room in ("hal", "ops", "conformance"):
        yield from sorted((root / room).rglob("*.py"))
    yield from sorted({file for c in contracts().values() for file in c.files()} - set((root / "ops").resolve().glob("*.py")))
    for c in base.__mro__:
        if vars(c).get("name"):
            yield from package_files(c.__module__.rpartition(".")[0])


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is kept, by token; a line that was cut off or changed is left out."""
    with suppress(OSError):
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            checksum, _, kept = text.partition(" ")
            if checksum == _checksum(kept):
                line = json.loads(kept)
                yield line["result"]["token"], line


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
