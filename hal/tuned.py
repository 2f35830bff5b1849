"""What `porthal tune` has measured: for calls of an op, how long each of a chip's kernels took on this device.

A table holds for one device and one set of versions, the sources of the backend's package among them. It lies in the cache
folder, or in that package, in `tuned`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import packages_distributions, version
from math import inf
from pathlib import Path
from sys import float_info
from typing import TYPE_CHECKING, Any

from porthal.hal.contract import CallSpec, Contract, contracts
from porthal.hal.errors import UsageError, message_of
from porthal.hal.scheme import NONE
from porthal.hal.sources import digest, library_files, package_files

if TYPE_CHECKING:
    from porthal.hal.backend import Backend, Kernel

SCHEMA = 2
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
    date: str = ""

    @classmethod
    def read(cls, facts: Mapping[str, Any], backend: Backend) -> Timed:
        """From a file; ValueError, KeyError or TypeError where it is no call of this backend's kernels."""
        made = cls(**{**facts, "spec": CallSpec(**facts["spec"])})
        contract, spec = contracts()[made.op], made.spec
        sizes, given = spec.dims.items(), {*spec.dtypes, *spec.schemes}
        if wrong := [f"{name} is {size!r}" for name, size in sizes if type(size) is not int or size < 0]:
            raise ValueError(wrong[0])
        hash(spec)
        lacking = {contract.rows} - {"", *spec.dims}
        unknown = {*spec.dims, *spec.attrs} - {*contract.facts()} | given - {o.name for o in contract.signature.operands}
        unknown |= made.seconds.keys() - {k.provider for k in backend.candidates(contract)}
        if lacking or unknown:
            raise ValueError(f"{made.op} has no {min(unknown)}" if unknown else f"{min(lacking)} is not there")
        for provider, took in made.seconds.items():
            if took is not None and not (type(took) in (int, float) and 0 < took < inf):
                raise ValueError(f"{provider} took {took!r} s")
        if type(made.token) is not str or type(made.date) is not str:
            raise ValueError(f"{made.token!r} of {made.date!r}")
        return made


@dataclass(frozen=True)
class Table:
    """Measured calls. `why` says, where there are none, what stands against it."""

    calls: tuple[Timed, ...] = ()
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    why: str = ""

    @property
    def date(self) -> str:
        """The first day of measuring, and the last."""
        days = sorted(call.date for call in self.calls)
        return " to ".join(dict.fromkeys((days[0], days[-1])))

    @classmethod
    def of(cls, backend: Backend) -> Table:
        """That of a backend's device and versions, if there is one."""
        if backend.place != "hardware":
            return cls(why=f"{backend} runs on: {backend.place}, which has no speed")
        package = getattr(sys.modules.get(backend.__module__.rpartition(".")[0]), "__file__", None)
        shipped = [Path(package).parent / "tuned" / file_of(backend).name] if package else []
        found = [cls._read(file, backend) for file in (file_of(backend), *shipped) if file.is_file()]
        nothing = cls(why=f"nothing is measured on {backend.describe()}")
        return next((table for table in found if table.calls), (*found, nothing)[0])

    @classmethod
    def _read(cls, file: Path, backend: Backend) -> Table:
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["schema"] != SCHEMA:
                return cls(why=f"{file} has another schema than {SCHEMA}")
            calls = tuple(Timed.read(call, backend) for call in kept["calls"])
            if not calls:
                raise ValueError("it has no calls")
            then, here = kept["versions"], versions(backend, calls)
            other = next((name for name in (*here, *then) if here.get(name) != then.get(name)), "")
            if kept["device"] != backend.describe():
                return cls(why=f"{file} was measured on {kept['device']}, this is {backend.describe()}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            return cls(why=f"{file} is no table of porthal tune ({message_of(error)})")
        if other:
            was, now = then.get(other, "of a version that it does not say"), here.get(other, "not found")
            return cls(why=f"{file} was measured with {other} {was}, here it is {now}")
        return cls(calls, kept["device"], then)

    @classmethod
    def updated(cls, backend: Backend, calls: Sequence[Timed]) -> Table:
        """What is kept for this device and these versions, with calls that were measured now."""
        now = {(call.op, call.spec) for call in calls}
        before = [call for call in backend.tuned.calls if (call.op, call.spec) not in now]
        every = (*before, *calls)
        return cls(every, backend.describe(), versions(backend, every))

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
    """The mean of the contexts in which all of these kernels were measured, else of all; inf where one was ever wrong."""
    every = {p for call in calls for p in call.seconds}
    whole = [call for call in calls if call.seconds.keys() == every] or calls
    alike = [p for p in whole[0].seconds if all(p in call.seconds for call in whole)]
    wrong = {p: inf for call in calls for p, took in call.seconds.items() if took is None}
    return {p: sum(call.seconds[p] or inf for call in whole) / len(whole) for p in alike} | wrong


def at(turns: Mapping[int, Seconds], rows: int) -> Seconds:
    """Of the last turn that has no more rows; {} with fewer than were measured."""
    return turns[max(fewer)] if (fewer := [n for n in turns if n <= rows]) else {}


def in_order(kernels: Iterable[Kernel], seconds: Seconds) -> list[Kernel]:
    """The kernels that were measured first, the fastest before all; then the others as they stand, and what was wrong."""
    return sorted(kernels, key=lambda k: seconds.get(k.provider, float_info.max))


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
    """Of porthal, of the modules that the backend needs, and of the libraries that the calls were measured with. A digest
    stands for the backend's own package, and for a library that is in no distribution."""
    package = backend.__module__.rpartition(".")[0]
    named = *(p for call in calls for p in call.seconds), *getattr(sys.modules.get(package), "requires", ())
    found = {"porthal": sys.modules["porthal"].__version__, package: f"of sources {digest(package_files(package))}"}
    names = _distributions()
    for module in sorted({name.partition(".")[0] for name in named} - {"porthal", package}):
        if module in names:
            found[module] = ", ".join(f"{d} {version(d)}".removeprefix(f"{module} ") for d in sorted({*names[module]}))
        elif files := library_files(module):
            found[module] = f"of sources {digest(files)}"
    return found


_distributions = cache(packages_distributions)  # looks at every package that is installed
