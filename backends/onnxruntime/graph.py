"""A model as a graph of ONNX: kernels enter a call of their function, and compute nothing.

Rows, requests, slots and columns of tables are free sizes; the first axis of an array is always one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper

from porthal.backends.onnxruntime.backend import Onnxruntime
from porthal.backends.onnxruntime.functions import CODES, DOMAIN, IR, KEYS, LATENTS, OPSET, SCHEMES, VERSION, needed
from porthal.hal import Batch, Pages, PagesSpec, QuantisedSpec, UsageError, Weight, WeightSpec, dtype, scheme_of
from porthal.hal.abstract import AbstractArray
from porthal.hal.backend import Read
from porthal.hal.dtypes import itemsize

Array = np.ndarray[Any, Any]
PAGE = 4096  # bytes, at which tensors begin in the data file, so that it can be mapped
PIECE = 64 << 20  # bytes of a weight that are read at a time


class Traced(AbstractArray):
    """An array of the graph: its name, and its shape in the step that was traced."""

    __slots__ = ("graph", "name")

    def __init__(self, graph: Graph, name: str, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(tuple(shape), dtype)
        self.graph, self.name = graph, name

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, *shape: int) -> Traced:
        super().reshape(*shape)  # which refuses what does not fit
        if shape[0] != self.shape[0]:
            raise UsageError(f"an array of {list(self.shape)} is reshaped to {list(shape)}: its first axis is free, keep it")
        return self.graph.entered("Reshape", [self, self.graph.constant([0, *shape[1:]])], shape, self.dtype)

    def __getitem__(self, key: Any) -> Traced:
        keys = key if isinstance(key, tuple) else (key,)
        shape = super().__getitem__(key).shape
        cut = [(axis, *k.indices(self.shape[axis])) for axis, k in enumerate(keys) if k != slice(None)]
        if any(axis == 0 for axis, *_ in cut) or len(shape) != len(self.shape):
            raise UsageError(f"an array of {list(self.shape)} is indexed by {key!r}: in a graph slices cut columns alone")
        axes, starts, ends, steps = ([c[i] for c in cut] for i in range(4))
        return self.graph.entered("Slice", [self, *map(self.graph.constant, (starts, ends, axes, steps))], shape, self.dtype)


class Graph(Onnxruntime):
    """Enters calls. `weights_in` says where weights go, which are written as they are read."""

    schemes, caches = tuple(SCHEMES), (*KEYS, *LATENTS)  # that models may be under

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.nodes: list[onnx.NodeProto] = []
        self.functions: dict[tuple[str, str], onnx.FunctionProto] = {}
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.tensors: dict[str, TensorProto] = {}
        self.of_batch: dict[str, Traced] = {}  # of the batch
        self.data: BinaryIO | None = None
        self.count = self.cached = 0

    def weights_in(self, data: BinaryIO, name: str) -> None:
        """Weights are written to this file, which graphs know by this name."""
        self.data, self.data_name = data, name

    # -- arrays ------------------------------------------------------------------------------------------------------

    def fresh(self, what: str) -> str:
        self.count += 1
        return f"{what}_{self.count}"

    def file(self) -> BinaryIO:
        if self.data is None:
            raise UsageError(f"{self.name}:graph only records a model, for porthal export: name another backend")
        return self.data

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        self.file()
        return Traced(self, self.fresh("v"), shape, dtype)

    def input(self, name: str, shape: tuple[int, ...], dtype: str, free: Mapping[int, str]) -> Traced:
        """An input of the graph, of which these axes are free."""
        dims = [free.get(axis, size) for axis, size in enumerate(shape)]
        self.inputs[name] = helper.make_tensor_value_info(name, CODES[dtype], dims)
        return Traced(self, name, shape, dtype)

    def constant(self, values: list[int]) -> Traced:
        name = "ints_" + "_".join(map(str, values)).replace("-", "m")
        self.tensors.setdefault(name, helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return Traced(self, name, (len(values),), "int64")

    def from_numpy(self, x: Array) -> Any:
        return self._stored(x.shape, dtype(x), lambda part: x[part])

    def _stored(self, shape: tuple[int, ...], of: str, read: Callable[[slice], Array]) -> Traced:
        """A tensor that is written to the file of weights, a piece at a time."""
        width = int(np.prod(shape[1:])) * itemsize(of)
        step = max(1, PIECE // max(width, 1))
        starts = range(0, shape[0], step)
        return self._written(shape, of, (read(slice(first, min(first + step, shape[0]))) for first in starts))

    def _written(self, shape: tuple[int, ...], of: str, pieces: Iterable[Array]) -> Traced:
        """A tensor whose bytes these are, one after the other."""
        file = self.file()
        file.write(bytes(-file.tell() % PAGE))
        start = file.tell()
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).tobytes())
        name = self.fresh("w")
        tensor = TensorProto(name=name, data_type=CODES[of], dims=shape, data_location=TensorProto.EXTERNAL)
        facts = {"location": self.data_name, "offset": start, "length": file.tell() - start}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in facts.items())
        self.tensors[name] = tensor
        return Traced(self, name, shape, of)

    # -- operands ----------------------------------------------------------------------------------------------------

    def packed(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        if not spec.quantised:
            return Weight(spec, self._stored(spec.shape, spec.dtype, read))
        return Weight(spec, self._experts(spec, read) if spec.shape[2:] else self._matrix(spec, read(slice(None))))

    def _matrix(self, spec: WeightSpec, parts: Mapping[str, Array]) -> dict[str, Traced]:
        """Codes in the dtype that they are of, of 4 bits two in a byte."""
        codes, of = parts["codes"], scheme_of(spec.scheme).codes
        if of == "int4":
            flat = np.pad(codes.reshape(-1).view(np.uint8), (0, codes.size % 2))
            codes = flat[::2] & 15 | flat[1::2] << 4
        return {"codes": self._written(spec.shape, of, [codes]), "scale": self.from_numpy(parts["scale"])}

    def _experts(self, spec: WeightSpec, read: Read) -> dict[str, Traced]:
        """Codes in bytes, as these are gathered: ONNX gathers neither float8 nor less than bytes. One matrix is in memory."""
        form, scales = Weight.form(spec), []

        def codes() -> Iterator[Array]:
            for e in range(spec.shape[0]):
                parts = read(e)
                scales.append(np.array(parts["scale"]))
                yield parts["codes"]

        written = self._written(*form["codes"], codes())
        return {"codes": written, "scale": self.from_numpy(np.stack(scales))}

    def typed(self, spec: WeightSpec | QuantisedSpec, codes: Any) -> Any:
        return codes

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        name, free = f"cache_{self.cached}", {0: "slots"}
        self.cached += 1
        return Pages(spec, {part: self.input(f"{name}_{part}", *form, free) for part, form in Pages.form(spec).items()})

    def overwritten(self, pages: Pages) -> Pages:
        return Pages(pages.spec, {name: self.empty(array.shape, array.dtype) for name, array in pages.native.items()})

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        for name, array in super().rows_of(batch).items():
            free = {0: "requests" if name in ("kv_len", "block_table") else "rows", 1: "columns"}
            self.of_batch[name] = self.input(name, array.shape, dtype(array), free)
        return batch

    def rows_of(self, batch: Batch) -> Mapping[str, Any]:
        return self.of_batch

    # -- calls -------------------------------------------------------------------------------------------------------

    def entered(self, op: str, inputs: list[Traced], shape: tuple[int, ...], dtype: str) -> Traced:
        """The result of a standard operator."""
        out: Traced = self.empty(shape, dtype)
        self.nodes.append(helper.make_node(op, [x.name for x in inputs], [out.name], name=self.fresh(op)))
        return out

    def _run(self, f: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        names = [[x.name for x in values.values()] for values in (inputs, outputs)]
        node = helper.make_node(f.name, *names, name=self.fresh(f.name), domain=DOMAIN, overload=f.overload, **attributes)
        self.nodes.append(node)
        self.functions[f.name, f.overload] = f

    def saved(self, path: Path, name: str, outputs: Mapping[str, Traced], inline: bool) -> None:
        """Write what was entered so far as a model, and begin anew; weights stay in their file."""
        renamed = {array.name: name for name, array in outputs.items()}
        for node in self.nodes:
            node.output[:] = [renamed.get(n, n) for n in node.output]
            node.input[:] = [renamed.get(n, n) for n in node.input]
        used = {n for node in self.nodes for n in node.input}
        results = [helper.make_tensor_value_info(n, CODES[x.dtype], [None] * x.ndim) for n, x in outputs.items()]
        graph = helper.make_graph(
            self.nodes,
            name,
            [info for n, info in self.inputs.items() if n in used],
            results,
            [tensor for n, tensor in self.tensors.items() if n in used],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        model = helper.make_model(graph, functions=needed(self.functions.values()), opset_imports=opsets, ir_version=IR)
        if inline:
            model = onnx.inliner.inline_local_functions(model)
        path.write_bytes(model.SerializeToString())
        self.nodes, self.functions = [], {}
