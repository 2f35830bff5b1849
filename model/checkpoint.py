"""Weights under their published names: one safetensors file or a sharded index, memory-mapped, read slice by slice."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from porthal.hal import (
    FLOATS,
    Binding,
    UsageError,
    Weight,
    WeightSpec,
    dtype,
    narrow,
    note,
    numpy_dtype,
    scheme_of,
    widen,
)
from porthal.hal.scheme import NONE
from porthal.model import quantised

Array = np.ndarray[Any, Any]
Reader = Callable[[slice], Array]
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn"} | {
    **{"I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64", "F8_E8M0": "uint8"}  # the last as its codes
}
FILES = ("model", "quant_model_weights")  # the second is AscendV1's
ALL = slice(None)
SLICE = 4096  # rows that are compared at a time
PIECES, PIECE = 64, 256  # of a file, and the bytes of each, by which checkpoints are told apart
BLOCK = 2**18  # numbers that stay in a core's cache while they are looked at twice


class Source(Protocol):
    """Where tensors come from. `read` gives rows of one tensor in float64 or its stored dtype, perhaps read-only."""

    def read(self, name: str, shape: Sequence[int], rows: slice) -> Array: ...

    def holds(self, prefix: str) -> bool:
        """Is there a tensor whose name begins so?"""


class TensorFile:
    """One safetensors file, memory-mapped: the header's length in 8 bytes, a JSON header, the tensors' bytes.

    Read here because the package safetensors gives NumPy no float8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: Array = np.asarray(np.memmap(path, np.uint8, "r"))
            start = 8 + int.from_bytes(self._bytes[:8].tobytes(), "little")
            self.header: dict[str, Any] = json.loads(self._bytes[8:start].tobytes(), object_pairs_hook=_once)
            metadata = self.header.pop("__metadata__", None)
            self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
            places = sorted((*map(int, entry["data_offsets"]), name) for name, entry in self.header.items())
            end, last = max(((end, name) for _, end, name in places), default=(0, ""))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a safetensors file, or is truncated: {error}") from None
        self._data = self._bytes[start:]
        if end > len(self._data):
            raise UsageError(f"{path} is truncated: {last!r} ends at byte {end} of its data, which has {len(self._data)}")
        at = 0  # one tensor begins where another ends, else one of them is not what was saved
        for begin, end, name in places:
            if begin != at or end < begin:
                raise UsageError(f"{path} is damaged: {name!r} begins at byte {begin} of its data, expected {at}")
            at = end
        if at < len(self._data):
            raise UsageError(f"{path} is damaged: {len(self._data) - at} bytes follow its last tensor, {last!r}")

    def tensor(self, name: str) -> Array:
        """A view: its bytes are read when used."""
        entry = self.header[name]
        if entry.get("dtype") not in DTYPES:
            raise UsageError(f"{self.path}: {name!r} is {entry.get('dtype')}, expected one of {', '.join(DTYPES)}")
        try:
            begin, end = entry["data_offsets"]
            return self._data[begin:end].view(numpy_dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])
        except (ValueError, TypeError, LookupError):
            raise UsageError(f"{self.path} is damaged: its header has {entry} for {name!r}") from None

    def sample(self) -> bytes:
        """Pieces of the data, the last bytes among them: what other weights of the same shapes hardly share."""
        last = max(len(self._data) - PIECE, 0)
        return b"".join(self._data[n * last // PIECES :][:PIECE].tobytes() for n in range(PIECES + 1))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


class Checkpoint:
    """A directory's safetensors files. Quantised matrices are dequantised as they are read.

    Of a tensor that is in several files the one counts that the index names. A fault in a header, or a tensor that the
    index does not name, is a UsageError here; what is wrong with one tensor's name, shape, dtype or scale is one when it
    is read, be it for no rows at all.
    """

    def __init__(self, directory: str | Path, fp8_block: tuple[int, int] | None = None) -> None:
        self.directory = Path(directory)
        self.block = fp8_block or (128, 128)
        self._asked: set[str] = set()
        self.schemes: dict[str, str] = {}  # of what has been read, how codes say it; "" where it holds plain numbers
        self._kept: dict[str, str] = {}  # and the scheme of calls that takes these
        found = [self.directory / f"{name}.safetensors{end}" for name in FILES for end in (".index.json", "")]
        there = [file for file in found if file.is_file()]
        if there[1:]:
            both = f"{there[1].name} and {there[0].name}"
            raise UsageError(f"{self.directory} has both {both}: remove the one that is out of date")
        if not there:
            raise UsageError(f"{self.directory} has neither {found[1].name} nor {found[0].name}")
        index = there[0]
        if index.suffix == ".json":
            try:
                entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._where = {name: self.directory / file for name, file in entries.items()}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UsageError(f"{index} is not a safetensors index with a weight_map: {error}") from None
        else:
            self._where = dict.fromkeys(TensorFile(index).header, index)
        self._files = self._opened()
        self._names = sorted(self._where)

    def _opened(self) -> dict[Path, TensorFile]:
        """All files, whose headers hold what the index says and nothing that it does not name."""
        files: dict[Path, TensorFile] = {}
        for name, file in self._where.items():
            if file not in files:
                if not file.is_file():
                    raise UsageError(f"{file} does not exist, though the index of {self.directory} names it for {name!r}")
                files[file] = TensorFile(file)
            if name not in files[file].header:
                raise UsageError(f"{file} does not hold {name!r}, though the index of {self.directory} says so")
        for file in files.values():
            for name in file.header:
                if name not in self._where:
                    raise UsageError(f"{file.path} holds {name!r}, which the index of {self.directory} does not name")
                if self._where[name] != file.path:
                    note(f"{file.path} holds {name!r} too: used is that of {self._where[name].name}, which the index names")
        return files

    def digest(self) -> str:
        """Of names, shapes and dtypes of all tensors, and a sample of their numbers: do two ranks read the same checkpoint?"""
        found = hashlib.sha256()
        for file, opened in sorted(self._files.items()):
            found.update(json.dumps([file.name, opened.header], sort_keys=True).encode() + opened.sample())
        return found.hexdigest()[:16]

    def holds(self, prefix: str) -> bool:
        at = bisect_left(self._names, prefix)
        return at < len(self._names) and self._names[at].startswith(prefix)

    def unasked(self) -> list[str]:
        """The tensors of which no row, not even an empty slice, has been read."""
        return [name for name in self._names if name not in self._asked]

    def equal(self, one: str, other: str, shape: Sequence[int]) -> bool:
        """Do two tensors hold the same numbers? They are read a few rows at a time."""
        parts = (slice(start, start + SLICE) for start in range(0, shape[0], SLICE))
        return all(
            np.array_equal(widen(self.read(one, shape, part)), widen(self.read(other, shape, part))) for part in parts
        )

    def read(self, name: str, shape: Sequence[int], rows: slice) -> Array:
        """Rows of a tensor, those of the file itself where that is possible: who keeps them copies them. UsageError names a
        tensor that is missing, has another shape or dtype, or lacks a usable scale.
        """
        if not self._scheme_of(name, shape):
            values = np.require(self._tensor(name, shape)[rows], requirements="A")
        elif len(shape) == 2:
            values = quantised.values(self._matrix(name), (shape[0], shape[1]), self.block, rows)
        else:
            matrix, (count, high, wide) = self._matrix(name), shape
            parts = [quantised.values(matrix.at(i), (high, wide), self.block, slice(None)) for i in range(*rows.indices(count))]
            values = np.stack(parts) if parts else np.empty((0, high, wide))
        if not _finite(values):
            codes = ", or codes that are NaN" if self._scheme_of(name, shape) else ""
            raise UsageError(f"{self.file(name).path}: {name!r} holds NaN or infinity{codes}, expected finite numbers")
        return values

    def kept(self) -> dict[str, str]:
        """Of what has been read, be it for no rows at all: the matrices that calls take as they are stored, and under which
        scheme."""
        return {name: scheme for name, scheme in self._kept.items() if scheme != NONE}

    def parts(self, name: str, shape: tuple[int, int]) -> dict[str, Array]:
        """Codes and scales of a matrix that is kept."""
        return quantised.parts(self._matrix(name), shape, self.block)

    def _scheme_of(self, name: str, shape: Sequence[int]) -> str:
        if name not in self.schemes:
            self.schemes[name] = self._scheme(self._matrix(name), shape)
        return self.schemes[name]

    def _scheme(self, matrix: _Matrix, shape: Sequence[int]) -> str:
        kind = matrix.dtype("weight") if "weight" in matrix else ""
        if kind in FLOATS and (beside := [name for part, name in matrix.names.items() if part != "weight"]):
            raise matrix.wrong("weight", f"is {kind}, but has {beside[0]!r} beside it: expected codes")
        if kind in FLOATS or not (kind or "weight_packed" in matrix):
            return ""
        if len(shape) not in (2, 3):
            raise matrix.wrong("weight", f"is {kind}, expected one of {', '.join(FLOATS)}")
        one = matrix.at(0) if shape[2:] else matrix
        found = quantised.scheme(one, (shape[-2], shape[-1]), self.block)
        if not shape[2:]:
            self._kept[matrix.name] = quantised.kept(one, found, (shape[0], shape[1]))
        return str(found)

    def _matrix(self, name: str) -> _Matrix:
        """The tensors of a matrix."""
        stem = name.removesuffix("weight")
        spelled = {part: stem + part.removeprefix("weight" if stem == name else "") for part in ("weight", *quantised.PARTS)}
        block = 0
        module, _, last = name.rpartition(".")
        flat = {part: f"{module}._{last}_{end}" for part, end in quantised.TORCHAO.items()}
        if flat["weight"] in self._where:
            spelled, block = flat, self._tiled(name, flat["weight"])
        parts = {part: name for part, name in spelled.items() if name in self._where}
        self._asked.update(parts.values())
        return _Matrix(self, name, parts, block)

    def _tiled(self, name: str, codes: str) -> int:
        """Of a matrix of torchao's whose scales are in tiles, the columns that share one; else 0."""
        file = self.file(codes)
        try:
            about = json.loads(file.metadata[name])
            kind, facts = about["_type"], about["_data"]
            block = int(facts["block_size"]) if facts.get("is_swizzled_scales") else 0
        except (LookupError, ValueError, TypeError, AttributeError):
            what = f"{codes!r} is of torchao, but the file's metadata does not say of which class"
            raise UsageError(f"{file.path}: {what}: expected {name!r} there") from None
        if kind not in quantised.TORCHAO_CLASSES:
            known = ", ".join(quantised.TORCHAO_CLASSES)
            raise UsageError(f"{file.path}: {name!r} is of torchao's class {kind!r}, expected one of {known}")
        return block

    def file(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        return self._files[self._where[name]]

    def _tensor(self, name: str, shape: Sequence[int]) -> Array:
        self._asked.add(name)
        if name not in self._where:
            raise UsageError(f"{self.directory} lacks tensor {name!r} of shape {list(shape)}")
        file = self.file(name)
        tensor = file.tensor(name)
        if tensor.shape != tuple(shape):
            raise UsageError(
                f"{file.path}: {name!r} has shape {list(tensor.shape)}, expected {list(shape)} by config.json"
            )
        return tensor


@dataclass(frozen=True)
class _Matrix:
    """The tensors of a quantised matrix, or of one of a stack of them, by their part of its name."""

    checkpoint: Checkpoint
    name: str
    names: Mapping[str, str]
    tiled: int = 0  # where scales are in tiles: the columns that share one
    index: int | None = None

    def at(self, index: int) -> _Matrix:
        return replace(self, index=index)

    def __contains__(self, part: str) -> bool:
        return part in self.names

    def dtype(self, part: str) -> str:
        return dtype(self._whole(part))

    def shape(self, part: str) -> tuple[int, ...]:
        shape = self._whole(part).shape
        return shape if self.index is None else shape[1:]

    def array(self, part: str) -> Array:
        whole = self._whole(part)
        return whole if self.index is None else whole[self.index]

    def wrong(self, part: str, what: str) -> UsageError:
        name = self.names.get(part) or next(iter(self.names.values()))
        return UsageError(f"{self.checkpoint.file(name).path}: {name!r} {what}")

    def _whole(self, part: str) -> Array:
        tensor = self.checkpoint.file(self.names[part]).tensor(self.names[part])
        if part != "weight_scale" or not self.tiled:
            return tensor
        codes = self._whole("weight")
        high, wide = codes.shape[0], codes.shape[-1] * (2 if codes.dtype == np.uint8 else 1)
        scales = quantised.in_rows(tensor, high, -(-wide // self.tiled)) if codes.ndim == 2 else None
        if scales is None:
            expected = f"expected tiles of 128 x 4 scales of {high} x {wide} numbers"
            raise self.wrong(part, f"has shape {list(tensor.shape)}, {expected}")
        return scales


def _finite(values: Array) -> bool:
    """Whether no number is NaN or infinite."""
    if dtype(values) != "bfloat16":
        return bool(np.isfinite(values).all())
    bits = values.reshape(-1).view(np.uint16)  # of which the infinities and NaN are the greatest, of either sign
    parts = (bits[at : at + BLOCK] for at in range(0, bits.size, BLOCK))
    return all(part.max() < 0xFF80 and part.view(np.int16).max() < 0x7F80 for part in parts)


class Blank:
    """Every tensor, as zeros that take no memory: for tracing a model without its weights."""

    def holds(self, prefix: str) -> bool:
        return True

    def read(self, name: str, shape: Sequence[int], rows: slice) -> Array:
        count = len(range(*rows.indices(shape[0]))) if shape else 0
        return np.broadcast_to(np.float32(0), (count, *shape[1:]))

class Loader:
    """Prepares a source's tensors for a binding, in the dtype of the activations; those of `kept` under their scheme."""

    def __init__(self, source: Source, binding: Binding, activations: str, kept: Mapping[str, str]) -> None:
        self.source = source
        self.binding = binding
        self.dtype = activations
        self.kept = kept

    def array(self, name: str, *shape: int, dtype: str = "") -> Any:
        """A small tensor as a backend array: norm weights, biases."""
        return self.binding.from_numpy(np.array(self.rows(name, shape, dtype)(slice(None))))

    def rows(self, name: str, shape: Sequence[int], to: str = "") -> Reader:
        """What reads rows of a tensor, in the dtype of the activations; its header is judged at once.

        A number that float16 cannot hold is a UsageError when it is read.
        """
        self.source.read(name, shape, slice(0, 0))
        wanted = to or self.dtype

        def read(rows: slice) -> Array:
            stored = self.source.read(name, shape, rows)
            if dtype(stored) == wanted:
                return stored
            wide = widen(stored)
            values = narrow(wide, wanted)
            if wanted == "float16" and (lost := np.isinf(values) & np.isfinite(wide)).any():
                raise UsageError(f"{name!r} holds {wide[lost][0]}, too large for float16: load it in bfloat16 or float32")
            return values

        return read

    def weight(self, use: str, name: str, *shape: int) -> Weight:
        """A tensor prepared for `use` = "op.operand"."""
        return self._made(use, shape, [[name]], self.rows(name, shape))

    def _made(self, use: str, shape: tuple[int, ...], names: Sequence[Sequence[str]], read: Reader) -> Weight:
        """A weight of these tensors, one below the other for each matrix of it: of their codes where all are kept alike, and
        no block reaches from one into the next."""
        found = {self.kept.get(name, NONE) for group in names for name in group}
        high = shape[-2] // len(names[0])
        name = found.pop() if len(found) == 1 else NONE
        if name == NONE or (names[0][1:] and high % (scheme_of(name).block[0] or 1)):
            return self.build(use, shape, read)

        def parts(index: Any) -> dict[str, Array]:
            if isinstance(index, int) or not shape[2:]:
                return self._below(names[index] if shape[2:] else names[0], high, shape[-1])
            form = scheme_of(name).form((len(names[index]), *shape[1:]))
            made = {part: np.empty(size, numpy_dtype(kind)) for part, (size, kind) in form.items()}
            for at, group in enumerate(names[index]):  # one matrix at a time beside the whole
                for part, array in self._below(group, high, shape[-1]).items():
                    made[part][at] = array
            return made

        op, operand = use.split(".")
        return self.binding.prepare(WeightSpec(op, operand, tuple(shape), self.dtype, name), parts)

    def _below(self, names: Sequence[str], high: int, wide: int) -> dict[str, Array]:
        """Codes and scales of matrices one below the other."""
        assert isinstance(self.source, Checkpoint)
        found = [self.source.parts(name, (high, wide)) for name in names]
        return {part: np.concatenate([one[part] for one in found]) for part in found[0]}

    def part(self, use: str, name: str, shape: tuple[int, int], rows: slice = ALL, columns: slice = ALL) -> Weight:
        """Some rows and columns of a matrix, prepared for `use`; of others only what lies in the same rows is read."""
        high, wide = (len(range(*s.indices(n))) for s, n in zip((rows, columns), shape))
        if (high, wide) == shape:
            return self.weight(use, name, *shape)  # the codes too, where they are kept
        read = within(self.rows(name, shape), rows, shape[0])
        return self.build(use, (high, wide), lambda r: read(r)[:, columns])

    def build(self, use: str, shape: tuple[int, ...], read: Reader) -> Weight:
        """A weight whose rows along the first axis `read` gives, one slice at a time."""
        op, operand = use.split(".")

        def rows(index: Any) -> Array:
            if isinstance(index, slice):
                return read(index)
            single: Array = read(slice(index, index + 1))[0]
            return single

        return self.binding.prepare(WeightSpec(op, operand, tuple(shape), self.dtype), rows)

    def stacked(self, use: str, shape: tuple[int, ...], names: Sequence[Sequence[str]]) -> Weight:
        """[E, rows, columns]: per entry, the concatenation of the named tensors along their rows."""
        parts = [[self.rows(n, (shape[1] // len(group), shape[2])) for n in group] for group in names]

        def read(rows: slice) -> Array:
            found = [_below(group) for group in parts[rows]]
            return np.stack(found) if len(found) > 1 else found[0][None]

        return self._made(use, shape, names, read)

    def joined(self, use: str, shape: tuple[int, int], names: Sequence[str], share: slice = ALL) -> Weight:
        """[rows, columns]: the named tensors one below the other, with equally many rows; of each the same `share` of rows."""
        each = shape[0] // len(names)
        parts = [within(self.rows(n, (each, shape[1])), share, each) for n in names]
        high = len(range(*share.indices(each)))

        def read(rows: slice) -> Array:
            start, stop, _ = rows.indices(high * len(parts))
            ends = [(max(start - i * high, 0), min(stop - i * high, high)) for i in range(len(parts))]
            found = [part(slice(*end)) for part, end in zip(parts, ends) if end[0] < end[1]]
            return np.concatenate(found) if len(found) > 1 else found[0]

        if share == ALL:
            return self._made(use, shape, [names], read)
        return self.build(use, (high * len(parts), shape[1]), read)


def within(read: Reader, part: slice, size: int) -> Reader:
    """What reads rows of a part of so many."""
    inside = range(*part.indices(size))

    def rows(index: slice) -> Array:
        chosen = inside[index]
        return read(slice(chosen.start, max(chosen.start, chosen.stop)))

    return rows


def chosen(read: Reader, which: Sequence[int]) -> Reader:
    """What reads chosen rows as if they were all; neighbours at once."""

    def rows(index: slice) -> Array:
        runs: list[list[int]] = []
        for row in which[index]:
            if runs and runs[-1][-1] + 1 == row:
                runs[-1].append(row)
            else:
                runs.append([row])
        found = [read(slice(run[0], run[-1] + 1)) for run in runs]
        return np.concatenate(found) if len(found) > 1 else found[0] if found else read(slice(0, 0))

    return rows


def _below(parts: Sequence[Reader]) -> Array:
    """One below the other."""
    found = [part(slice(None)) for part in parts]
    return np.concatenate(found) if len(found) > 1 else found[0]
