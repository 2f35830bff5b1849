"""A backend without values: arrays are shapes and dtypes, kernels infer. Running a model on it lists its calls.

The array has exactly what model code may use: shape, dtype, reshape and basic slicing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from porthal.hal.backend import Backend, Read
from porthal.hal.contract import Contract
from porthal.hal.dtypes import dtype
from porthal.hal.errors import UsageError
from porthal.hal.operands import KINDS, Pages, PagesSpec, Weight, WeightSpec
from porthal.hal.operands.operand import Form
from porthal.hal.signature import ARRAY


class AbstractArray:
    """A shape and a dtype."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape = shape
        self.dtype = dtype

    def reshape(self, *shape: int) -> AbstractArray:
        if math.prod(shape) != math.prod(self.shape) or min(shape, default=0) < 0:
            raise UsageError(f"cannot reshape {list(self.shape)} to {list(shape)}")
        return AbstractArray(shape, self.dtype)

    def __getitem__(self, key: Any) -> AbstractArray:
        keys = key if isinstance(key, tuple) else (key,)
        if not all(type(k) in (int, slice) for k in keys):  # a bool is an int to Python, and a mask to arrays
            raise UsageError(f"array index {key!r} is not an integer or a slice: model code may use only these")
        if len(keys) > len(self.shape):
            raise UsageError(f"{len(keys)} indices are too many for an array of shape {list(self.shape)}")
        kept = []
        for size, k in zip(self.shape, keys):
            if isinstance(k, slice):
                kept.append(len(range(*k.indices(size))))
            elif not -size <= k < size:
                raise UsageError(f"index {k} is outside an axis of {size}")
        return AbstractArray((*kept, *self.shape[len(keys) :]), self.dtype)


class Abstract(Backend):
    """Infers instead of computing; to_numpy gives zeros."""

    name = "abstract"

    def from_numpy(self, x: np.ndarray[Any, Any]) -> AbstractArray:
        return AbstractArray(x.shape, dtype(x))

    def to_numpy(self, x: AbstractArray) -> np.ndarray[Any, Any]:
        return np.zeros(x.shape)

    def refuses_array(self, x: Any) -> str | None:
        return None if isinstance(x, AbstractArray) else f"{type(x).__name__}, expected an abstract array"

    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        return Weight.of(spec, _shapes(Weight.form(spec)))

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        return Pages(spec, _shapes(Pages.form(spec)))

    def derive(self, contract: Contract) -> Callable[..., Any]:
        def infer(*args: Any, **kwargs: Any) -> Any:
            operands, attrs = contract.arrange(args, kwargs)
            spec = contract.spec(operands, attrs)
            out = []
            for result, shape, name in contract.results(spec):
                if result.mutated:
                    out.append(operands[result.name])
                elif result.kind == ARRAY:
                    out.append(AbstractArray(shape, name))
                else:
                    kind = KINDS[result.kind]
                    made = kind.result_spec(shape, attrs)
                    out.append(kind.of(made, _shapes(kind.form(made))))
            return tuple(out) if len(out) > 1 else out[0]

        return infer


def _shapes(form: Form) -> Any:
    return {part: AbstractArray(*of) for part, of in form.items()}
