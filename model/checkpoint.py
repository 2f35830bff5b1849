"""Weights under their published names: one safetensors file or a sharded index, memory-mapped, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from porthal.hal import Binding, UsageError, Weight, WeightSpec, dtype, narrow, numpy_dtype, widen

Array = np.ndarray[Any, Any]
SCALE = "_scale_inv"  # multiplied, despite its name
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn"}


class Source(Protocol):
    """Where tensors come from. `read` gives rows of one tensor in float64 or its stored dtype."""

    def read(self, name: str, shape: Sequence[int], rows: slice) -> Array: ...

    def has(self, name: str) -> bool: ...


class TensorFile:
    """One safetensors file, memory-mapped: the header's length in 8 bytes, a JSON header, the tensors' bytes.

    Read here because the package safetensors gives NumPy no float8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: Array = np.asarray(np.memmap(path, np.uint8, "r"))
            start = 8 + int.from_bytes(self._bytes[:8].tobytes(), "little")
            self.header: dict[str, Any] = json.loads(self._bytes[8:start].tobytes())
            self.header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in self.header.values()), default=0)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a safetensors file, or is truncated: {error}") from None
        self._data = self._bytes[start:]
        if end > len(self._data):
            raise UsageError(f"{path} is truncated: its tensors need {end} bytes, it has {len(self._data)}")

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


class Checkpoint:
    """A directory's safetensors files. FP8 tensors (with a `_scale_inv` beside them) are dequantised as they are read."""

    def __init__(self, directory: str | Path, fp8_block: tuple[int, int] | None = None) -> None:
        self.directory = Path(directory)
        self.block = fp8_block or (128, 128)
        self._files: dict[Path, TensorFile] = {}
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._where = {name: self.directory / file for name, file in entries.items()}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UsageError(f"{index} is not a safetensors index with a weight_map: {error}") from None
        else:
            file = self.directory / "model.safetensors"
            if not file.is_file():
                raise UsageError(f"{self.directory} has neither model.safetensors nor model.safetensors.index.json")
            self._where = dict.fromkeys(self._open(file).header, file)

    def has(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str, shape: Sequence[int], rows: slice) -> Array:
        """Rows of a tensor; UsageError when it is missing, truncated or not of the expected shape."""
        values = np.array(self._tensor(name, shape)[rows])
        if not self.has(name + SCALE):
            return values
        height, width = self.block
        grid = (-(-shape[0] // height), -(-shape[1] // width))
        scale = self._tensor(name + SCALE, grid)
        start, stop, _ = rows.indices(shape[0])
        per_row = scale[np.arange(start, stop) // height]
        dequantised: Array = widen(values) * np.repeat(widen(per_row), width, axis=1)[:, : shape[1]]
        return dequantised

    def _tensor(self, name: str, shape: Sequence[int]) -> Array:
        if name not in self._where:
            raise UsageError(f"{self.directory} lacks tensor {name!r} of shape {list(shape)}")
        file = self._open(self._where[name])
        if name not in file.header:
            raise UsageError(f"{file.path} does not hold {name!r}, though the index of {self.directory} says so")
        tensor = file.tensor(name)
        if tensor.shape != tuple(shape):
            raise UsageError(
                f"{file.path}: {name!r} has shape {list(tensor.shape)}, expected {list(shape)} by config.json"
            )
        return tensor

    def _open(self, file: Path) -> TensorFile:
        if file not in self._files:
            if not file.is_file():
                raise UsageError(f"{file} does not exist, though the index of {self.directory} names it")
            self._files[file] = TensorFile(file)
        return self._files[file]


class Blank:
    """Every tensor, as zeros that take no memory: for tracing a model without its weights."""

    def has(self, name: str) -> bool:
        return True

    def read(self, name: str, shape: Sequence[int], rows: slice) -> Array:
        count = len(range(*rows.indices(shape[0]))) if shape else 0
        return np.broadcast_to(np.float32(0), (count, *shape[1:]))


class Loader:
    """Prepares a source's tensors for a binding, in the dtype of the activations."""

    def __init__(self, source: Source, binding: Binding, activations: str) -> None:
        self.source = source
        self.binding = binding
        self.dtype = activations

    def array(self, name: str, *shape: int, dtype: str = "") -> Any:
        """A small tensor as a backend array: norm weights, biases."""
        values = self.source.read(name, shape, slice(None))
        return self.binding.from_numpy(narrow(widen(values), dtype or self.dtype))

    def weight(self, use: str, name: str, *shape: int) -> Weight:
        """A tensor prepared for `use` = "op.operand"."""
        return self.build(use, shape, lambda rows: self.source.read(name, shape, rows))

    def build(self, use: str, shape: tuple[int, ...], read: Callable[[slice], Array]) -> Weight:
        """A weight whose rows along the first axis `read` computes, one slice at a time."""
        op, operand = use.split(".")

        def rows(index: Any) -> Array:
            if isinstance(index, slice):
                values = read(index)
                return values if dtype(values) == self.dtype else narrow(widen(values), self.dtype)
            single: Array = rows(slice(index, index + 1))[0]
            return single

        return self.binding.prepare(WeightSpec(op, operand, tuple(shape), self.dtype), rows)

    def stacked(self, use: str, shape: tuple[int, ...], names: Sequence[Sequence[str]]) -> Weight:
        """[E, rows, columns]: per entry, the concatenation of the named tensors along their rows."""

        def read(rows: slice) -> Array:
            return np.stack(
                [
                    np.concatenate([self.source.read(n, self._part(shape, group), slice(None)) for n in group])
                    for group in names[rows]
                ]
            )

        return self.build(use, shape, read)

    def joined(self, use: str, shape: tuple[int, int], names: Sequence[str]) -> Weight:
        """[rows, columns]: the named tensors one below the other, with equally many rows."""
        part = (shape[0] // len(names), shape[1])

        def read(rows: slice) -> Array:
            whole: Array = np.concatenate([self.source.read(n, part, slice(None)) for n in names])
            return whole[rows]

        return self.build(use, shape, read)

    @staticmethod
    def _part(shape: tuple[int, ...], group: Sequence[str]) -> tuple[int, int]:
        return shape[1] // len(group), shape[2]
