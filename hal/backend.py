"""The backend protocol: kernels are methods named after the ops they own; services have defaults for NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from porthal.hal import dtypes as dt
from porthal.hal.contract import CallSpec, Contract
from porthal.hal.limits import NO_LIMITS, Limits
from porthal.hal.operands import (
    Batch,
    Pages,
    PagesSpec,
    Rows,
    Selection,
    SelectionSpec,
    Weight,
    WeightSpec,
)

Array = Any
Read = Callable[[Any], np.ndarray[Any, Any]]
Place = Literal["hardware", "vendor package on a stub runtime", "emulated device"]


@dataclass(frozen=True)
class Kernel:
    """A backend's function for one contract, the backend in the chain that wrote it, how that one packs the contract's
    weights, and the function's stated limits."""

    function: Callable[..., Any]
    owner: str
    prepare: Callable[..., Weight]
    limits: Limits
    provider: str
    tie: str

    def refuses(self, spec: CallSpec) -> str | None:
        return self.limits.refuses(spec)


class Backend:
    """Base of every backend. A subclass names its `base` and defines a method per op it owns.

    A kernel takes the contract's operands in order and its attributes by keyword, and returns the results in order.
    It allocates only through `self.empty`, reads no environment, and may set on its function: `limits` (by `@limits`),
    `provider` (the library call behind it), `tie` ("lowest", or "any" where the chip's tie order is its own) and
    `batch_invariant` (True promises that a row's bits do not depend on the other rows).

    Arrays may be strided in every axis: model code splits them by slicing. `moe_experts = None` in a class declines what
    its base would give, so that a composite is made of the class's own kernels.
    """

    name: ClassVar[str] = ""
    base: ClassVar[str | None] = "reference"

    def __init__(self, device: str = "") -> None:
        self.device = device
        self.host_copies = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.device}" if self.device else self.name

    @property
    def place(self) -> Place:
        """Where kernels run: one of three words that every report repeats."""
        return "hardware"

    # -- arrays ------------------------------------------------------------------------------------------------------

    def from_numpy(self, x: np.ndarray[Any, Any]) -> Array:
        return np.asarray(x)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Copy to the host: the only way a value leaves the device, and counted."""
        self.host_copies += 1
        return np.asarray(x)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, dt.numpy_dtype(dtype))

    def refuses_array(self, x: Array) -> str | None:
        """Why `x` is not an array of this backend and device, or None."""
        return None if isinstance(x, np.ndarray) else f"{type(x).__name__}, expected a NumPy array"

    # -- operands ----------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch) -> Batch:
        """Everything the kernels need of a step that depends on the batch alone: called once per step."""
        return batch

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        """A zeroed cache in the backend's own layout."""
        zeros = {name: np.zeros((spec.slots, width), dt.numpy_dtype(spec.dtype)) for name, width in spec.fields}
        return self.from_logical(spec, zeros)

    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        """Pull a weight's slices (`read(i)` or `read(slice)` along the first axis) and pack it; `into` updates in place."""
        array = self.from_numpy(np.ascontiguousarray(read(slice(None))))
        if into is not None:
            into.native[...] = array
            return into
        return Weight(spec, array)

    def from_logical(self, spec: Any, arrays: dict[str, np.ndarray[Any, Any]], into: Any = None) -> Any:
        """An operand from its logical NumPy arrays; `into` overwrites an existing one in place."""
        if isinstance(spec, WeightSpec):
            return self.prepare(spec, lambda index: arrays["w"][index], into)
        if isinstance(spec, SelectionSpec):
            return Selection(spec, Rows(self.from_numpy(arrays["indices"]), self.from_numpy(arrays["length"])))
        if into is not None:
            for name, value in arrays.items():
                into[name][...] = self.from_numpy(value)
            return into
        return Pages(spec, {name: self.from_numpy(value) for name, value in arrays.items()})

    def to_logical(self, operand: Any) -> dict[str, np.ndarray[Any, Any]]:
        """An operand's logical form as NumPy arrays, bit for bit."""
        if isinstance(operand, Weight):
            return {"w": self.to_numpy(operand.native)}
        if isinstance(operand, Selection):
            rows = self.rows(operand)
            return {"indices": self.to_numpy(rows.indices), "length": self.to_numpy(rows.length)}
        return {name: self.to_numpy(operand[name]) for name, _ in operand.spec.fields}

    def rows(self, selection: Selection) -> Rows:
        """A selection as the inherited kernels read it; override it together with a native form of your own."""
        native = selection.native
        return native if isinstance(native, Rows) else Rows(*native)

    # -- capability --------------------------------------------------------------------------------------------------

    def derive(self, contract: Contract) -> Callable[..., Any] | None:
        """A kernel made from the contract itself, where no method is named after it."""
        return None

    def candidates(self, contract: Contract) -> Iterator[Kernel]:
        """The kernels for a contract, own first, then along the bases."""
        chain = [c for c in type(self).__mro__ if issubclass(c, Backend)]
        for i, cls in enumerate(chain):
            owner = vars(cls).get("name", "")
            prepare = next(vars(c)["prepare"] for c in chain[i:] if "prepare" in vars(c)).__get__(self)
            if contract.name in vars(cls):
                function = vars(cls)[contract.name]
                if function is None:
                    return
                yield Kernel(
                    function.__get__(self),
                    owner,
                    prepare,
                    getattr(function, "limits", NO_LIMITS),
                    getattr(function, "provider", ""),
                    getattr(function, "tie", "lowest"),
                )
            elif "derive" in vars(cls) and cls is not Backend:
                derived = vars(cls)["derive"](self, contract)
                if derived is not None:
                    yield Kernel(derived, owner, prepare, NO_LIMITS, "", "lowest")

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        """Why a kernel does not take a call of these static facts, or None: a pure function, by default of its limits."""
        return kernel.refuses(spec)
