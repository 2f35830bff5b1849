"""Inherited cases that need not run again: the backend they are inherited from has passed them in the same circumstances.

The same means: the kernels of the op and of what it is composed of, every service of the backend (a plugin that
overrides one runs all cases), level, device, place, the sources of all that takes part, the versions of what is
installed, and the settings of NumPy and PyTorch that a plugin may change for its whole process. Only what passed is kept,
as a line in a file beside the golden values. A chip's own kernels always run.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.execution.bindings import Bound
from porthal.conformance.judgement.golden_cache import folder
from porthal.conformance.level import SUITE
from porthal.conformance.report.facts import environment
from porthal.conformance.report.results import Result, reused
from porthal.hal import Backend, contracts

# What a kernel may ask of its backend, and what decides which kernel it is.
SERVICES = (
    *("__init__", "place", "from_numpy", "to_numpy", "empty", "refuses_array", "plan", "alloc_pages", "prepare"),
    *("from_logical", "to_logical", "rows", "derive", "candidates", "refuses"),
)
Kernels = list[list[str]]  # owner and provider of each, the first choice first


class Proven:
    """What the registered bases of a backend have passed at a level, in earlier runs of any backend that inherits it."""

    def __init__(self, backend: Backend, level: str) -> None:
        self.backend, self.level = backend, level
        bases = [c for c in type(backend).__mro__ if issubclass(c, Backend) and vars(c).get("name")]
        untouched = [c for c in bases if all(getattr(c, s) is getattr(type(backend), s) for s in SERVICES)]
        self.files = {c.name: folder() / f"proven-{self._circumstances(c)}.jsonl" for c in untouched}
        self.known = {name: dict(_lines(file)) for name, file in self.files.items() if name != backend.name}

    def recall(self, case: Case) -> Result | None:
        """The result of a case that a base has passed, as that of the kernel inherited from it."""
        for owner, known in self.known.items():
            if (line := known.get(case.token)) and self._kernels(line["kernels"]) == line["kernels"]:
                return reused(Result(**line["result"]), owner, composed=not line["kernels"][case.op])
        return None

    def keep(self, case: Case, bound: Bound, result: Result) -> None:
        """Remember a case that passed, if every kernel in it is of one base and none of its services is changed."""
        owners = {choice.owner for choice in bound.made_of if choice.status != "composed"}
        if result.verdict != "PASS" or len(owners) != 1 or (owner := owners.pop()) not in self.files:
            return
        kernels = self._kernels([choice.op for choice in bound.made_of])
        line = json.dumps({"result": vars(result), "kernels": kernels})
        with suppress(OSError):
            self.files[owner].parent.mkdir(parents=True, exist_ok=True)
            with self.files[owner].open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _kernels(self, ops: object) -> dict[str, Kernels]:
        """All kernels that the backend has for these ops, which decide what each call gets."""
        assert isinstance(ops, (list, dict))
        known = contracts()
        return {op: [[k.owner, k.provider] for k in self.backend.candidates(known[op])] for op in ops}

    def _circumstances(self, base: type[Backend]) -> str:
        versions = {name: contract.version for name, contract in contracts().items()}
        where = self.backend.device, self.backend.place, platform.processor()
        facts = SUITE, self.level, where, environment(base), versions, settings()
        digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
        for file in _sources(base):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()


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


def _sources(base: type[Backend]) -> Iterator[Path]:
    """Whatever computes and judges: hal, ops, conformance, and the packages of the base and of what that is based on."""
    root = Path(str(sys.modules["porthal"].__file__)).parent
    folders = [root / room for room in ("hal", "ops", "conformance")]
    folders += [Path(str(sys.modules[c.__module__].__file__)).parent for c in base.__mro__ if vars(c).get("name")]
    for place in folders:
        yield from sorted(file for file in place.rglob("*") if file.suffix in (".py", ".so"))


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is kept, by token; a line that was cut off is left out."""
    with suppress(OSError):
        for text in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                line["result"]["foreign"] = tuple(line["result"]["foreign"])
                yield line["result"]["token"], line
