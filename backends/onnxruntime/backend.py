"""Kernels made of the functions of ONNX, one graph per operator, its attributes and the dtypes and ranks of its arrays."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnxruntime

from porthal.backends.onnxruntime import functions
from porthal.backends.reference.backend import Reference
from porthal.hal import (
    Backend,
    Batch,
    CallSpec,
    Contract,
    Kernel,
    Pages,
    Quantised,
    QuantisedSpec,
    Rows,
    Selection,
    SelectionSpec,
    Unavailable,
    Weight,
    WeightSpec,
    dtype,
    limits,
    numpy_dtype,
    one_of,
)
from porthal.hal.backend import Read
from porthal.hal.scheme import NONE, SCHEMES, scheme_of

Array = np.ndarray[Any, Any]
SESSIONS = 256  # that are kept, each of some 100 KB without its weights, which calls hand over
SUFFIX = "ExecutionProvider"
AFTER = "_after"  # of a function's output that stands for an input that it overwrites


class Onnxruntime(Reference):
    """Arrays are NumPy's and stay in their dtype; weights are handed over with each call, so that sessions hold none."""

    widens = False

    def __new__(cls, device: str = "") -> Onnxruntime:
        if device == "graph" and cls is Onnxruntime:
            from porthal.backends.onnxruntime.graph import Graph

            return Backend.__new__(Graph)
        return super().__new__(cls, device)

    def __init__(self, device: str = "") -> None:
        super().__init__()
        onnxruntime.set_default_logger_severity(4)  # what fails is raised
        asked = device or os.environ.get("PORTHAL_ORT_PROVIDERS", "") or "cpu"
        self.device = device
        self.providers = [_provider(name.strip()) for name in asked.split(",")]
        self.sessions: OrderedDict[Any, onnxruntime.InferenceSession] = OrderedDict()

    def describe(self) -> str:
        names = ", ".join(p.removesuffix(SUFFIX) for p in self.providers)
        return f"{super().describe()} (onnxruntime {onnxruntime.__version__}: {names}, one thread)"

    def derive(self, contract: Contract) -> Callable[..., Any] | None:
        if not functions.variants(contract.name):
            return None

        schemes = [v for v in functions.variants(contract.name) if v in SCHEMES]
        asked = {"scheme": one_of(*schemes)} if "scheme" in contract.attributes else {}

        @limits(provider=f"onnxruntime, {functions.DOMAIN}.{contract.name}", schemes=one_of(NONE, *schemes), **asked)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            return self._call(contract, *contract.arrange(args, kwargs))

        return kernel

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        mixed = kernel.owner == self.name and len(set(spec.schemes.values())) > 1
        return f"weights are under {spec.schemes}, a function takes them alike" if mixed else super().refuses(op, kernel, spec)

    def _call(self, contract: Contract, operands: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
        spec = contract.spec(operands, attrs)
        f = functions.function(contract.name, _variant(contract, operands, attrs))
        held = dict(self._leaves(contract, operands))
        results = contract.results(spec)
        code = functions.CODES.get(results[0][2])  # for an attribute that is the name of a dtype
        facts = {name: code if isinstance(value, str) else value for name, value in {**spec.dims, **attrs}.items()}
        attributes = {name: facts[name] for name in f.attribute}
        outputs: dict[str, Any] = {}
        found = []
        for result, shape, of in results:
            if result.mutated:
                written = self.overwritten(operands[result.name])
                outputs |= {name + AFTER: array for name, array in self._leaves(contract, {result.name: written})}
                found.append(written)
            elif result.kind == "Selection":
                rows = Rows(self.empty(shape, "int32"), self.empty(shape[:1], "int32"))
                outputs |= {f"{result.name}_{field}": array for field, array in rows._asdict().items()}
                found.append(Selection(SelectionSpec(*shape), rows))
            elif result.kind == "Quantised":
                made = Quantised.result_spec(shape, attrs)
                found.append(Quantised(made, {part: self.empty(*form) for part, form in Quantised.form(made).items()}))
                outputs |= self._parts(result.name, found[-1])
            else:
                outputs[result.name] = self.empty(shape, of)
                found.append(outputs[result.name])
        self._run(f, {name: held[name] for name in f.input}, {name: outputs[name] for name in f.output}, attributes)
        return found[0] if len(found) == 1 else tuple(found)

    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        return self.packed(spec, read, into)

    def packed(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        """What `prepare` gives: apart, as a kernel has the `prepare` of the class that defines it, also in a derived one."""
        return super().prepare(spec, read, into)

    def overwritten(self, pages: Pages) -> Pages:
        """The pages that a kernel gives back: these, as it writes into them."""
        return pages

    def typed(self, spec: WeightSpec | QuantisedSpec, codes: Array) -> Array:
        """Codes in their dtype; of experts in bytes, as these are gathered, which ONNX cannot do with float8."""
        of = scheme_of(spec.scheme).codes
        return codes.view(numpy_dtype(of)) if of == "float8_e4m3fn" and not spec.shape[2:] else codes

    def rows_of(self, batch: Batch) -> Mapping[str, Any]:
        """What functions take of a batch: of its rows, and of its requests."""
        table = batch.block_table if batch.block_table.shape[1] else np.full((batch.R, 1), -1, np.int32)
        rows = {"positions": batch.positions, "row_request": batch.row_request, "slots": batch.slots, "visible": batch.visible}
        return {**rows, "block_table": table, "kv_len": batch.kv_len}

    def _leaves(self, contract: Contract, operands: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
        """The arrays of operands by the names that functions have for them."""
        for declared in contract.signature.operands:
            value = operands.get(declared.name)
            if isinstance(value, Quantised) or (isinstance(value, Weight) and value.spec.quantised):
                yield from self._parts(declared.name, value).items()
            elif isinstance(value, Weight):
                yield declared.name, value.native
            elif isinstance(value, Pages):
                for (field, *_), (name, _) in zip(declared.fields, value.spec.fields):
                    for part in (part for part in value.form(value.spec) if part.removesuffix("_scale") == name):
                        yield f"{declared.name}_{field}{part.removeprefix(name)}", value.native[part]
            elif isinstance(value, Selection):
                for field, array in self.rows(value)._asdict().items():
                    yield f"{declared.name}_{field}", array
            elif isinstance(value, Batch):
                yield from self.rows_of(value).items()
            elif value is not None:
                yield declared.name, value

    def _parts(self, name: str, value: Weight | Quantised) -> dict[str, Array]:
        """Codes and scales by the names that functions have for them."""
        return {f"{name}_{n}": self.typed(value.spec, part) if n == "codes" else part for n, part in value.native.items()}

    def _run(self, f: Any, inputs: Mapping[str, Array], outputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> None:
        """One call in place: outputs are overwritten, of which some may be inputs."""
        if not any(array.size for array in outputs.values()):  # of no rows the runtime's reductions keep the axis they reduce
            return
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        made = {name: array if array.flags.c_contiguous else np.empty_like(array, order="C") for name, array in outputs.items()}
        session = self._session(f, given, made, attributes)
        binding = session.io_binding()
        for bind, arrays in ((binding.bind_input, given), (binding.bind_output, made)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, functions.CODES[dtype(array)], array.shape, array.ctypes.data)
        session.run_with_iobinding(binding)
        for name, array in outputs.items():
            if made[name] is not array:
                array[...] = made[name]

    def _session(self, f: Any, inputs: Mapping[str, Array], outputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> Any:
        values = [tuple((n, dtype(a), a.ndim) for n, a in arrays.items()) for arrays in (inputs, outputs)]
        key = (f.name, f.overload, tuple(attributes.items()), *values)
        if key in self.sessions:
            self.sessions.move_to_end(key)
            return self.sessions[key]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # else each session keeps the most that a call took
        model = functions.model(f, *values, attributes).SerializeToString()
        try:
            self.sessions[key] = onnxruntime.InferenceSession(model, options, providers=self.providers)
        except Exception as error:  # onnxruntime's have no class in common but this
            what = f"{self} does not take {functions.DOMAIN}.{f.name}, of opset {functions.OPSET}"
            raise Unavailable(f"{what}: {str(error).strip()}; expected an onnxruntime of today, or another provider") from None
        if len(self.sessions) > SESSIONS:
            self.sessions.popitem(last=False)
        return self.sessions[key]


def _variant(contract: Contract, operands: Mapping[str, Any], attrs: Mapping[str, Any]) -> str:
    """The variant of the function for these optional operands, words, and attributes that are not as usual."""
    signature = contract.signature
    words = {str(value) for value in attrs.values()} | {o.name for o in signature.operands if operands[o.name] is not None}
    words |= {operands[o.name].spec.scheme for kind in ("Weight", "Quantised", "Pages") for o in signature.of_kind(kind)}
    words |= {name for name, value in attrs.items() if value != contract.attributes[name].default}
    for declared in signature.of_kind("Pages"):
        words |= {field for (field, *_), _ in zip(declared.fields, operands[declared.name].spec.fields)}
    fits = [v for v in functions.variants(contract.name) if words.issuperset(v.split("."))]
    return max(fits, key=lambda v: v.count("."), default="")


def _provider(name: str) -> str:
    here = {p.removesuffix(SUFFIX).lower(): p for p in onnxruntime.get_available_providers()}
    if name.lower().removesuffix(SUFFIX.lower()) not in here:
        known = ", ".join(here)
        raise Unavailable(f"onnxruntime {onnxruntime.__version__} has no provider {name!r} here: expected one of {known}")
    return here[name.lower().removesuffix(SUFFIX.lower())]
