"""Golden values on disk, shared by workers, runs and backends: content-addressed, bounded in size, checked when read.

An entry's key hashes everything its arrays are a function of: the operands' own bytes and the attributes (a changed or
poisoned copy of a case's inputs has another key), the contract with its version, the suite's version, the source of all
references and of what they call, NumPy's version and the kind of processor. A broken entry is computed again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from porthal.conformance.cases.inputs import Array, Inputs
from porthal.conformance.level import SUITE
from porthal.hal import Contract, Operand, cache_folder, note
from porthal.hal.dtypes import dtype

LIMIT = 2**32  # bytes of all entries
IN_MEMORY = 2**26  # bytes that a process keeps in memory, and
IN_MEMORY_EACH = 2**20  # of one entry
SLICE = 2**28  # bytes written between two checks of the limit
WORTH = 0.008  # seconds of computing, for an entry and again for each MiB of it, below which keeping it saves nothing
NAMES = "names"  # an array of those of all others: the archive's own list of them has no checksum
Arrays = dict[str, Array]
_written = 0


def folder() -> Path:
    """Where the entries lie: PORTHAL_CACHE, else golden in the user's cache folder."""
    return cache_folder("golden")


def recall(inputs: Inputs, part: str, compute: Callable[[], Arrays]) -> Arrays:
    """What `compute` gives for these inputs, taken from memory or disk where it has been kept before; read-only."""
    name = key(inputs, part)
    if name not in _memory:
        found = _from_disk(folder() / f"{name}.npz", compute)
        if _size(found) > IN_MEMORY_EACH:
            return found
        _memory.add(name, found)
    return _memory[name]


class _Memory(dict[str, Arrays]):
    """Small entries, the oldest first."""

    held = 0  # bytes

    def add(self, name: str, arrays: Arrays) -> None:
        for array in arrays.values():
            array.flags.writeable = False
        self.held += _size(arrays)
        while self and self.held > IN_MEMORY:
            self.held -= _size(self.pop(next(iter(self))))
        self[name] = arrays


_memory = _Memory()


def _from_disk(file: Path, compute: Callable[[], Arrays]) -> Arrays:
    with suppress(Exception):  # zip and NumPy raise many kinds
        with np.load(file) as kept:  # checks each array's checksum; objects are refused
            found = dict(kept)
        os.utime(file)
        if found.pop(NAMES).tolist() == list(found):
            return found
    started = time.process_time()
    found = compute()
    if time.process_time() - started > WORTH * (1 + _size(found) / 2**20):
        _keep(file, found)
    return found


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def key(inputs: Inputs, part: str) -> str:
    """The hash of all that a part of the golden values depends on."""
    digest = hashlib.sha256()  # which processors compute
    facts = inputs.contract.name, inputs.contract.version, part, inputs.case.stream, sorted(inputs.attrs.items())
    digest.update(repr((*facts, _sources(inputs.contract))).encode())
    for name, array in _arrays(inputs):
        digest.update(f"{name} {dtype(array)} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _arrays(inputs: Inputs) -> Iterator[tuple[str, Array]]:
    for name, value in inputs.operands.items():
        if isinstance(value, Operand):
            yield from ((f"{name}.{part}", array) for part, array in value.parts().items())
        elif value is not None:
            yield name, value


@cache
def _sources(contract: Contract) -> str:
    """Hash of the programs that compute golden values: the reference's folder, all of ops and hal, and the budget."""
    from porthal import hal, ops

    here = Path(__file__)
    files = [here.with_name("golden.py"), here.parents[1] / "execution" / "invariance.py", *contract.files()]
    for package in (hal, ops):
        files += sorted(Path(package.__path__[0]).rglob("*.py"))
    digest = hashlib.blake2b(f"{SUITE} {np.__version__} {platform.machine()}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _keep(file: Path, arrays: Arrays) -> None:
    """Whole or not at all; a full or read-only disk only costs time."""
    global _written
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return note(f"porthal: nothing is kept for the next run: {file.parent} cannot be made: {error.strerror}")
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as out:
            try:
                np.savez(out, **arrays, **{NAMES: np.array(list(arrays), str)})  # type: ignore[arg-type]  # allow_pickle
                out.close()
                os.replace(out.name, file)
            except BaseException:
                os.unlink(out.name)
                raise
        if not _written or _written > SLICE:
            trim(LIMIT)
            _written = 0
        _written += file.stat().st_size


def trim(limit: int) -> None:
    """Remove the entries not used for longest, until the rest is within `limit` bytes."""
    with os.scandir(folder()) as entries:
        known = [(e.stat(), e.path) for e in entries if e.name.endswith((".npz", ".part", ".jsonl"))]
    total = sum(s.st_size for s, _ in known)
    for stat, path in sorted(known, key=lambda e: e[0].st_mtime):
        if total <= limit:
            return
        with suppress(OSError):  # another worker was faster
            os.unlink(path)
        total -= stat.st_size
