"""The backend protocol: kernels are methods named after the ops they own; services have defaults for NumPy arrays."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from porthal.hal import dtypes as dt
from porthal.hal.contract import CallSpec, Contract
from porthal.hal.limits import NO_LIMITS, Limits
from porthal.hal.operands import Batch, Pages, PagesSpec, Rows, Selection, Weight, WeightSpec, kind_of

Array = Any
Read = Callable[[Any], np.ndarray[Any, Any]]
Place = Literal["hardware", "vendor package on a stub runtime", "emulated device"]


@dataclass(frozen=True)
class Kernel:
    """A backend's function for one contract.

    owner    the registered backend whose class, or whose mixin, defines it
    prepare  how that class packs the contract's weights
    limits, provider, tie    what is stated about it by `@limits`
    """

    function: Callable[..., Any]
    owner: str
    prepare: Callable[..., Weight]
    limits: Limits = NO_LIMITS
    provider: str = ""
    tie: str = "lowest"


class Backend:
    """Base of every backend: `class Ascend(Torch)` inherits what it does not define, and defines a method per op it owns.

    A kernel takes the contract's operands in order and its attributes by keyword, and returns the results in order.
    It allocates only through `self.empty`, reads no environment, and may set on its function: `limits` (by `@limits`),
    `provider` (the library call behind it), `tie` ("lowest", or "any" where the chip's tie order is its own) and
    `batch_invariant` (True promises that a row's bits do not depend on the other rows).

    The kernels of one library may be a mixin, a plain class: `class Cuda(FlashMla, DeepGemm, Torch)`. Classes before
    the first registered backend in Python's order of bases are the chip's own; where several define an op, the first of
    them that takes a call gets it.

    Arrays may be strided in every axis: model code splits them by slicing. `moe_experts = None` in a class declines the
    kernel of its base, so that a composite is made of the class's own kernels.
    """

    name: ClassVar[str] = ""  # of its folder or entry point, set by discovery

    def __init_subclass__(cls) -> None:
        folder, _, module = cls.__module__.rpartition(".")
        if folder.startswith("porthal.backends.") and module == "backend":
            cls.name = folder.rpartition(".")[2]

    def __init__(self, device: str = "") -> None:
        self.device = device
        self.host_copies = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.device}" if self.device else self.name

    @property
    def place(self) -> Place:
        """Where kernels run: one of three values, shown in every report."""
        return "hardware"

    def describe(self) -> str:
        """The device and its driver in one line, for reports; here this machine's processor."""
        with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.machine()

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
        """What the kernels need that depends only on the batch: called once per step."""
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
        return kind_of(spec).from_logical(self, spec, arrays, into)

    def to_logical(self, operand: Any) -> dict[str, np.ndarray[Any, Any]]:
        """An operand's logical form as NumPy arrays, bit for bit."""
        logical: dict[str, np.ndarray[Any, Any]] = operand.to_logical(self)
        return logical

    def rows(self, selection: Selection) -> Rows:
        """A selection as inherited kernels read it; override it if your selections have their own native form."""
        native = selection.native
        return native if isinstance(native, Rows) else Rows(*native)

    # -- capability --------------------------------------------------------------------------------------------------

    def derive(self, contract: Contract) -> Callable[..., Any] | None:
        """A kernel made from the contract itself, where no method is named after it."""
        return None

    def candidates(self, contract: Contract) -> Iterator[Kernel]:
        """The kernels for a contract in Python's order of bases: own ones first, mixins' among them, then inherited ones."""
        chain = type(self).__mro__
        owner = self.name
        for i, cls in enumerate(chain):
            owner = vars(cls).get("name") or owner
            if contract.name in vars(cls):
                function = vars(cls)[contract.name]
                if function is None:
                    return
                stated = {f: getattr(function, f) for f in ("limits", "provider", "tie") if hasattr(function, f)}
                yield Kernel(function.__get__(self), owner, self._packing(chain[i:]), **stated)
            elif "derive" in vars(cls) and cls is not Backend:
                derived = vars(cls)["derive"](self, contract)
                if derived is not None:
                    yield Kernel(derived, owner, self._packing(chain[i:]))

    def _packing(self, chain: Sequence[type]) -> Callable[..., Weight]:
        """`prepare` of the first of these classes that defines it."""
        packing: Callable[..., Weight] = next(vars(c)["prepare"] for c in chain if "prepare" in vars(c)).__get__(self)
        return packing

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        """Why a kernel does not take a call with these static facts, or None: a pure function; here, of its limits."""
        return kernel.limits.refuses(spec)
