"""Every kernel is derived from its contract: widen the operands, call the reference, round the results once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from porthal.hal import (
    ANY_SCHEME,
    Backend,
    Contract,
    Operand,
    Pages,
    PagesSpec,
    Quantised,
    QuantisedSpec,
    Weight,
    WeightSpec,
    limits,
    narrow,
    numpy_dtype,
    widen,
)


class Reference(Backend):
    """NumPy arrays in their own dtypes; weights and pages are kept widened, which is exact and saves the conversion.

    Not so in a class with arrays of its own: those keep their dtype, and the binding carries them to the kernels here.
    """

    @property
    def widens(self) -> bool:
        """Whether the kernels here run on the arrays of this class."""
        return issubclass(self.array_type, np.ndarray)

    def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
        wide = lambda index: widen(np.asarray(read(index)))  # noqa: E731
        return super().prepare(spec, wide if self.widens and not spec.quantised else read, into)

    def from_logical(self, spec: Any, arrays: Any, into: Any = None) -> Any:
        if self.widens and not _quantised(spec):
            arrays = {name: widen(np.asarray(value)) for name, value in arrays.items()}
        return super().from_logical(spec, arrays, into)

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        if not self.widens or spec.quantised:
            return super().alloc_pages(spec)
        return Pages(spec, {name: np.zeros((spec.slots, width)) for name, width in spec.fields})

    def to_logical(self, operand: Any) -> dict[str, np.ndarray[Any, Any]]:
        logical = super().to_logical(operand)
        return {n: narrow(a, operand.dtype) if a.dtype == np.float64 else a for n, a in logical.items()}

    def derive(self, contract: Contract) -> Callable[..., Any] | None:
        if contract.decomposition and self.name != "reference":
            return None  # a backend based on this one composes it from its own kernels
        if contract.collective:
            return self._simulating(contract)

        @limits(schemes=ANY_SCHEME)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            operands, attrs = contract.arrange(args, kwargs)
            found = contract.named(contract.reference(*(_wide(v) for v in operands.values()), **attrs))
            batch = operands.get("batch")
            rounded = tuple(
                _settled(value, batch, self.widens) if isinstance(value, Operand) else self._rounded(value, dtype)
                for value, (_, _, dtype) in zip(found.values(), contract.results(contract.spec(operands, attrs)))
            )
            return rounded if len(rounded) > 1 else rounded[0]

        vars(kernel)["capturable"] = False  # a graph of another backend's has no NumPy in it
        return kernel

    def _simulating(self, contract: Contract) -> Callable[..., Any]:
        """Every rank sends all that it has to all others, simulates all of them, and keeps its own results."""

        def kernel(*args: Any, **kwargs: Any) -> Any:
            operands, attrs = contract.arrange(args, kwargs)
            comm = operands.pop(contract.collective)
            everyone = comm.exchange(contract.name, operands)
            lists = {name: [_wide(of[name]) for of in everyone] for name in operands}
            lists[contract.collective] = [comm] * comm.size
            found = contract.named(contract.reference(**lists, **attrs)[comm.rank])
            spec = contract.spec(contract.arrange(args, kwargs)[0], attrs)
            rounded = tuple(self._rounded(v, dtype) for v, (_, _, dtype) in zip(found.values(), contract.results(spec)))
            return rounded[0] if len(rounded) == 1 else rounded

        return kernel

    def _rounded(self, value: Any, dtype: str) -> Any:
        out = self.empty(value.shape, dtype)
        out[...] = narrow(value, dtype) if value.dtype == np.float64 else value
        return out


def _wide(value: Any) -> Any:
    if isinstance(value, (Weight, Pages, Quantised)):
        return value.for_reference(widen)
    return widen(value) if isinstance(value, np.ndarray) else value


def _quantised(spec: Any) -> bool:
    return isinstance(spec, QuantisedSpec) or bool(getattr(spec, "quantised", False))


def _settled(value: Any, batch: Any, widens: bool) -> Any:
    """An operand rounded to its dtype; of pages only the rows that a step wrote, as the others are rounded already. Under a
    scheme, and where a class keeps its dtypes, it is its parts again."""
    if isinstance(value, (Pages, Quantised)) and (_quantised(value.spec) or not widens):
        kept = {n: narrow(a, value.dtype) if a.dtype == np.float64 else a for n, a in value.parts().items()}
        return replace(value, native=kept)
    if not isinstance(value, Pages):
        return value.mapped(lambda array: widen(narrow(array, value.dtype)))
    if batch is not None and numpy_dtype(value.dtype) != np.float64:
        slots = batch.slots[batch.slots >= 0]
        for name, _ in value.spec.fields:
            value[name][slots] = widen(narrow(value[name][slots], value.dtype))
    return replace(value)
