"""What `porthal tune` has measured: for calls of an op, how long each of a chip's kernels took on this device.

A table holds for one device and one set of versions. It lies in the cache folder, or in the backend's own package, in `tuned`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import packages_distributions, version
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porthal.hal.contract import CallSpec, Contract
from porthal.hal.errors import UsageError
from porthal.hal.scheme import NONE

if TYPE_CHECKING:
    from porthal.hal.backend import Backend, Kernel

SCHEMA = 1
FREE = {"P"}  # dims that change with every step, beside those of a batch
Seconds = Mapping[str, float]  # by provider; inf where its result was wrong


def cache_folder(kind: str) -> Path:
    """PORTHAL_CACHE, else the folder of this kind in the user's cache folder."""
    if named := os.environ.get("PORTHAL_CACHE"):
        path = Path(named)
        if any(os.path.exists(p) and not os.path.isdir(p) for p in (path, *path.parents)):
            raise UsageError(f"PORTHAL_CACHE is {named!r}, which is or lies in a file: expected a folder, there or to be made")
        return path
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "porthal" / kind


@dataclass(frozen=True)
class Timed:
    """A call of exact sizes, and the seconds of each provider's kernel: None where it was wrong."""

    op: str
    spec: CallSpec
    seconds: Mapping[str, float | None]
    token: str = ""  # of the case that was timed

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Timed:
        made = cls(**{**facts, "spec": CallSpec(**facts["spec"])})
        made.spec.key()  # raises what other facts raise
        return replace(made, seconds={p: None if s is None else float(s) for p, s in made.seconds.items()})


@dataclass(frozen=True)
class Table:
    """Measured calls. `why` says, where there are none, what stands against it."""

    calls: tuple[Timed, ...] = ()
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    why: str = ""

    @classmethod
    def of(cls, backend: Backend) -> Table:
        """That of a backend's device and versions, if there is one."""
        if backend.place != "hardware":
            return cls(why=f"{backend} runs on: {backend.place}, which has no speed")
        package = getattr(sys.modules.get(backend.__module__.rpartition(".")[0]), "__file__", None)
        shipped = [Path(package).parent / "tuned" / file_of(backend).name] if package else []
        for file in (file_of(backend), *shipped):
            if file.is_file():
                return cls._read(file, backend)
        return cls(why=f"nothing is measured on {backend.describe()}: run porthal tune --backend {backend}")

    @classmethod
    def _read(cls, file: Path, backend: Backend) -> Table:
        again = f"run porthal tune --backend {backend}"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept.pop("schema") != SCHEMA:
                return cls(why=f"{file} has another schema than {SCHEMA}: {again}")
            calls = tuple(map(Timed.read, kept.pop("calls")))
            found, here = cls(calls, **kept), versions(backend, calls)
            other = next((f"{name} {v}" for name, v in found.versions.items() if here.get(name) != v), "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return cls(why=f"{file} is no table of porthal tune ({type(error).__name__}): {again}")
        return cls(why=f"{file} was measured with {other}, which is not here: {again}") if other else found

    def save(self, file: Path) -> None:
        """Write it whole, or leave what is there."""
        text = json.dumps({"schema": SCHEMA, **{k: v for k, v in asdict(self).items() if k != "why"}}, indent=1)
        part = file.with_name(f"{file.name}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(file)
        except OSError as error:
            raise UsageError(f"cannot write {file}: {error.strerror}; set PORTHAL_CACHE to a folder of your own") from None

    def turns(self, contract: Contract, spec: CallSpec) -> dict[int, Seconds]:
        """From each measured number of rows on, rising, the seconds of each provider; {} where no such call was measured."""
        found: dict[int, list[Timed]] = {}
        for call in self.calls:
            if call.op == contract.name and kind_of(contract, call.spec) == kind_of(contract, spec):
                found.setdefault(first_of(call.spec, contract), []).append(call)
        return {rows: _together(found[rows]) for rows in sorted(found)}


def turns_of(backend: Backend, contract: Contract, kernels: Sequence[Kernel], spec: CallSpec) -> Mapping[int, Seconds]:
    """By rows, how long each of these kernels took for calls like this; {} where there is no choice, or none was timed."""
    return backend.tuned.turns(contract, spec) if sum(k.owner == backend.name for k in kernels) > 1 else {}


def kind_of(contract: Contract, spec: CallSpec) -> tuple[Any, ...]:
    """What calls have in common that one measurement stands for: all but rows, requests and context."""
    signature = contract.signature
    known = {*signature.symbols(), *(["block_size"] if signature.of_kind("Pages") else [])}
    free = FREE | {contract.rows} | {d for o in signature.of_kind("Batch") for d in o.dims}
    dims = {name: size for name, size in spec.dims.items() if name in known - free}
    return CallSpec(dims, spec.dtypes, spec.attrs, {o: s for o, s in spec.schemes.items() if s != NONE}).key()


def first_of(spec: CallSpec, contract: Contract) -> int:
    """The rows of a call, the fewest of a range; 0 where it has none."""
    rows = spec.dims.get(contract.rows, 0)
    return rows if isinstance(rows, int) else rows[0]


def _together(calls: Sequence[Timed]) -> Seconds:
    """The mean of all contexts that were measured; inf where a kernel was wrong, or left out, in one of them."""
    return {p: sum(call.seconds.get(p) or inf for call in calls) / len(calls) for call in calls for p in call.seconds}


def at(turns: Mapping[int, Seconds], rows: int) -> Seconds:
    """Of the last turn that has no more rows; with fewer than all, of the first."""
    return turns[max((n for n in turns if n <= rows), default=min(turns))] if turns else {}


def in_order(kernels: Iterable[Kernel], seconds: Seconds) -> list[Kernel]:
    """The kernels that were measured first, the fastest before all; then the others as they stand."""
    return sorted(kernels, key=lambda k: seconds.get(k.provider, inf))


def said(turns: Mapping[int, Seconds]) -> str:
    """In words, for reports."""
    parts = []
    for rows, seconds in turns.items():
        pairs = sorted(seconds.items(), key=lambda pair: pair[1])
        each = ", ".join(f"{p} {'wrong' if s == inf else f'{s * 1e6:.3g} µs'}" for p, s in pairs)
        parts.append(f"at {rows} row{'s' * (rows != 1)} {each}")
    return f"measured: {'; '.join(parts)}"


def file_of(backend: Backend) -> Path:
    """Where the table of this backend's device is kept."""
    return cache_folder("tuned") / f"tuned-{backend.name}-{sha256(backend.describe().encode()).hexdigest()[:12]}.json"


def versions(backend: Backend, calls: Iterable[Timed]) -> dict[str, str]:
    """Of the modules that the backend needs, and of the libraries that the calls were measured with."""
    package = sys.modules.get(backend.__module__.rpartition(".")[0])
    modules = {p.partition(".")[0] for call in calls for p in call.seconds if "." in p} | {*getattr(package, "requires", ())}
    names = packages_distributions()
    return {m: ", ".join(f"{d} {version(d)}" for d in sorted({*names.get(m, ())})) for m in sorted(modules)}
