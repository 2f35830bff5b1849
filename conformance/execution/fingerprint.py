"""What an operand is in its backend's own form, leaf by leaf: taken before a call and again after it.

Dataclasses, tuples, lists and dicts are walked; leaves are arrays and plain values. A call may add entries, which are
memos (a table that a plan keeps from its first use on), and fill what was None. Anything else that differs is a mutation.
What can be neither walked nor read is counted, and never taken for unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cached_property
from typing import Any

import numpy as np

from porthal.conformance.execution.outcome import Array, same_bits
from porthal.hal import Backend, Batch, Operand, Pages, Rows, Selection, Weight

WHOLE = 2**20  # bytes of an array that is kept; of a larger one only its hash
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, np.generic, np.dtype)
EMPTY = "NoneType None"  # a leaf that a call may fill
DERIVED = [name for name, member in vars(Batch).items() if isinstance(member, cached_property)]


class Fingerprint:
    """leaves: path -> an array, the hash of a large one, or a plain value as text; unread: the types of what cannot be read."""

    def __init__(self, backend: Backend, value: Any, what: str) -> None:
        self.backend = backend
        self.leaves: dict[str, Any] = {}
        self.lengths: dict[str, int] = {}
        self.unread: list[str] = []
        self._seen: dict[int, Any] = {}
        self._walk(what, value)

    def _walk(self, path: str, value: Any) -> None:
        if isinstance(value, (np.ndarray, self.backend.array_type)):
            return self._array(path, value)
        if isinstance(value, PLAIN):
            self.leaves[path] = f"{type(value).__name__} {value!r}"
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value  # kept, so that no other object gets its id
        if (inside := list(_inside(value))) or isinstance(value, (tuple, list, dict)) or is_dataclass(value):
            if isinstance(value, (tuple, list)):
                self.lengths[path] = len(value)
            for name, part in inside:
                self._walk(path + name, part)
        elif (memory := _memory(value)) is not None:
            self._array(path, memory)
        else:
            self.unread.append(type(value).__name__)

    def _array(self, path: str, value: Any) -> None:
        with suppress(Exception):  # a kind of array that the backend does not read back
            read = value if isinstance(value, np.ndarray) else np.asarray(self.backend.to_numpy(value))
            if read.dtype.hasobject:
                raise TypeError
            self.leaves[path] = read.copy() if read.nbytes <= WHOLE else _hash(read)
            return
        self.unread.append(type(value).__name__)

    def change(self, after: Fingerprint) -> str:
        """The first leaf that is not as before, in words, or ""."""
        for path, length in self.lengths.items():
            if (now := after.lengths.get(path)) != length:
                return f"{path} has {now or 'no'} entries, it had {length}"
        for path, old in self.leaves.items():
            if isinstance(old, str) and old == EMPTY:
                continue
            if path not in after.leaves:
                return f"{path} is gone"
            if why := _difference(path, old, after.leaves[path]):
                return why
        return ""


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, each with what it adds to the path."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", part) for name, part in zip(value._fields, value))
    elif isinstance(value, (tuple, list)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        names = {**value.__dataclass_fields__, **getattr(value, "__dict__", {})}  # with what a cached property has put there
        yield from ((f".{name}", getattr(value, name)) for name in names if hasattr(value, name))


def _memory(value: Any) -> Array | None:
    """The bytes of what shows its memory to Python."""
    with suppress(TypeError):
        return np.asarray(memoryview(value))
    return None


def _difference(path: str, old: Any, new: Any) -> str:
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"{path} is {new.dtype} {list(new.shape)}, it was {old.dtype} {list(old.shape)}"
        if same_bits(old.reshape(-1), new.reshape(-1)):
            return ""
        word = f"u{old.dtype.itemsize}"
        at = [int(i[0]) for i in np.nonzero(old.view(word) != new.view(word))] if old.ndim else []
        return f"{path} changed at {at}"
    if isinstance(old, str) and isinstance(new, str):
        return "" if old == new else f"{path} is {new}, it was {old}"
    return "" if isinstance(old, bytes) and isinstance(new, bytes) and old == new else f"{path} changed"


def _hash(array: Array) -> bytes:
    dense = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{dense.dtype} {dense.shape}".encode())
    digest.update(dense.reshape(-1).view(np.uint8).data)
    return digest.digest()


def beyond_logical(backend: Backend, operand: Operand) -> Any:
    """What an operand is made of that its logical form does not show, None where that is nothing."""
    native = operand.native
    if isinstance(operand, Batch):
        for name in DERIVED:  # made here, so that a kernel cannot be the first to make one and change it
            getattr(operand, name)
        return operand
    if isinstance(operand, Pages) and isinstance(native, dict):
        fields = {name for name, _ in operand.spec.fields}
        return {name: part for name, part in native.items() if name not in fields} or None
    plain = isinstance(native, Rows) if isinstance(operand, Selection) else isinstance(native, backend.array_type)
    return None if plain else native


def shown_whole(operand: Operand, fingerprint: Fingerprint | None) -> bool:
    """Whether a fingerprint says all of an operand, so that its logical form need not be read as well."""
    return bool(fingerprint and not fingerprint.unread and isinstance(operand, (Batch, Weight, Selection)))
