"""The backend protocol: kernels are methods named after the ops they own; services have defaults for NumPy arrays."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from math import inf
from time import perf_counter
from types import CodeType
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar
from weakref import WeakSet

import numpy as np

from porthal.hal import dtypes as dt
from porthal.hal.contract import CallSpec, Contract, operators
from porthal.hal.errors import DataNotTaken, NotClaimed, UsageError
from porthal.hal.limits import NO_LIMITS, Limits, Need
from porthal.hal.operands import (
    Batch,
    Communicator,
    Operand,
    Pages,
    PagesSpec,
    Rows,
    Selection,
    Weight,
    WeightSpec,
    kind_of,
)
from porthal.hal.tuned import Table
from porthal.hal.wire import joined

Array = Any
B = TypeVar("B", bound="Backend")
Read = Callable[[Any], Any]  # an index along the first axis -> a NumPy array, under a scheme {part: array}
NOT_TAKEN = "does not take this data"
STATED = "limits", "provider", "tie", "batch_invariant"  # on a kernel's function
Place = Literal["hardware", "vendor package on a stub runtime", "emulated device"]


@dataclass(frozen=True)
class Traits:
    """What a backend's arrays are like, stated once per class; the defaults are those of NumPy and PyTorch.

    mutable            an array can be overwritten; where it cannot, kernels return new ones
    views_alias        a slice shares memory with the array it was cut from
    strides            a slice with gaps, and `swapaxes`, are views that kernels get as they are
    flushes_denormals  what is smaller than the smallest normal float32 may be read as zero, in choices too
    static_shapes      kernels are compiled per shape, so that a call of another shape is another kernel
    """

    mutable: bool = True
    views_alias: bool = True
    strides: bool = True
    flushes_denormals: bool = False
    static_shapes: bool = False

    def __post_init__(self) -> None:
        if self.views_alias and not self.mutable:
            raise UsageError("traits have views_alias=True with mutable=False: state views_alias=False, as nobody can tell")


class Peak(NamedTuple):
    """What a device can do at most, of one kind.

    work   keeps it busy for a few milliseconds at most; gives the operations done, or the bytes moved
    holds  bytes that a memory of this speed has room for
    """

    work: Callable[[], float]
    holds: float = inf


@dataclass(frozen=True)
class Kernel:
    """A backend's function for one contract. With needs of data it raises DataNotTaken where they are broken.

    backend  whose kernel it is, and
    owner    the registered backend whose class, or whose mixin, defines it
    prepare  how that class packs the contract's weights
    limits, provider, tie, batch_invariant    what is stated about it by `@limits`
    inner    the kernel that it calls through super(), whose limits hold for it too
    """

    op: str
    function: Callable[..., Any]
    backend: Backend
    owner: str
    prepare: Callable[..., Weight]
    limits: Limits = NO_LIMITS
    provider: str = ""
    tie: str = "lowest"
    batch_invariant: bool = False
    inner: Kernel | None = None

    def refuses(self, spec: CallSpec) -> str | None:
        """Why it does not take a call with these static facts, or None."""
        return self.backend.refuses(self.op, self, spec) or (self.inner.refuses(spec) if self.inner else None)

    @property
    def needs(self) -> list[tuple[str, Need]]:
        """Its conditions on data, each with its operand."""
        return [*self.limits.needs.items(), *(self.inner.needs if self.inner else ())]

    @property
    def capturable(self) -> bool:
        """Whether it may stand in a captured graph: it reads no data on the host, and does not say that it may not."""
        return not self.needs and getattr(self.function, "capturable", True)

    def packs_like(self, other: Kernel) -> bool:
        """Whether both read a weight in the same packed form."""
        mine, theirs = (getattr(k.prepare, "__func__", k.prepare) for k in (self, other))
        return bool(mine == theirs)


class Backend:
    """Base of every backend: `class Ascend(Torch)` inherits what it does not define, and defines a method per op it owns.

    A kernel takes the contract's operands in order and its attributes by keyword, and returns the results in order.
    It allocates only through `self.empty`, reads no environment, and may set on its function: `limits` (by `@limits`),
    `provider` (the library call behind it), `tie` ("lowest", or "any" where the chip's tie order is its own),
    `batch_invariant` (True promises that a row's bits do not depend on the other rows, nor on how many there are) and
    `capturable` (False where it cannot stand in a captured graph, as it waits for values on the host).

    The kernels of one library may be a mixin, a plain class: `class Cuda(FlashMla, DeepGemm, Torch)`. Classes before
    the first registered backend in Python's order of bases are the chip's own; where several define an op, the first of
    them that takes a call gets it.

    Arrays may be strided in every axis: model code splits them by slicing. `moe_experts = None` in a class declines the
    kernel of its base, so that a composite is made of the class's own kernels.
    """

    name: ClassVar[str] = ""  # of its folder or entry point, set by discovery
    traits: ClassVar[Traits] = Traits()
    device: str = ""
    host_copies: int = 0

    def __init_subclass__(cls) -> None:
        folder, _, module = cls.__module__.rpartition(".")
        if folder.startswith("porthal.backends.") and module == "backend":
            cls.name = folder.rpartition(".")[2]

    def __new__(cls: type[B], *args: Any, **kwargs: Any) -> B:
        verify(cls)
        return super().__new__(cls)

    def __init__(self, device: str = "") -> None:
        """Takes no device: a chip that has several defines its own, which refuses those that are not there."""
        if device and type(self).__init__ is Backend.__init__:
            raise UsageError(f"{self.name} has no device {device!r}: expected {self.name!r} alone")
        self.device = device

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

    def device_facts(self) -> Mapping[str, Callable[[], Any]]:
        """What a report about this machine says of the device beside `describe`, by name: each is asked, and may fail."""
        return {}

    # -- arrays ------------------------------------------------------------------------------------------------------

    def from_numpy(self, x: np.ndarray[Any, Any]) -> Array:
        return np.asarray(x)

    @cached_property
    def array_type(self) -> type:
        """The class of the backend's arrays."""
        return type(self.from_numpy(np.zeros(1, np.int32)))

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """Copy to the host: the only way a value leaves the device, and counted."""
        self.host_copies += 1
        return np.asarray(x)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, dt.numpy_dtype(dtype))

    def write(self, into: Array, value: Array) -> Array:
        """Overwrite an array with another of its shape and dtype; gives the one that holds the value now."""
        if not self.traits.mutable:
            return value
        into[...] = value
        return into

    def expand(self, x: Array, shape: tuple[int, ...]) -> Array:
        """A view of `x` with its first row repeated: only asked of arrays with strides."""
        return np.broadcast_to(x, shape)

    def refuses_array(self, x: Array) -> str | None:
        """Why `x` is not an array of this backend and device, or None."""
        return None if isinstance(x, np.ndarray) else f"{type(x).__name__}, expected a NumPy array"

    # -- operands ----------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        """What the kernels need that depends only on the batch: called once per step.

        `into` is a planned batch of the same rows, requests and table width, whose memory takes the new values: asked only
        of backends that capture graphs.
        """
        return batch

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run`, which makes calls of kernels and nothing else, as a graph: what is returned makes the same calls again, with
        the same numbers, on the same memory, and returns the same arrays. `run` may be called several times, or recorded
        without being computed. Callers use `Binding.capture`. A chip without graphs leaves this as it is.
        """
        raise NotClaimed(f"{self} captures no graphs: call what was to be captured each time")

    @property
    def captures(self) -> bool:
        """Whether it offers graph capture."""
        return type(self).capture is not Backend.capture

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        """A zeroed cache in the backend's own layout."""
        zeros = {name: np.zeros(shape, dt.numpy_dtype(kind)) for name, (shape, kind) in Pages.form(spec).items()}
        return self.from_logical(spec, zeros)

    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        """Pull a weight's slices (`read(i)` or `read(slice)` along the first axis) and pack it. A slice may be a view of the
        checkpoint's file: copy what is kept. Under a scheme it is {part: array}, and of a matrix all of it: blocks span rows;
        arrays that own their memory are the backend's to keep.

        `into` is a weight of this spec whose memory takes the new values; use what is returned from then on.
        """
        if spec.quantised:
            kept = {name: np.require(part, requirements=["C", "O", "W"]) for name, part in read(slice(None)).items()}
            parts = {name: self.from_numpy(part) for name, part in kept.items()}
            if into is not None:
                parts = {name: self.write(into.native[name], part) for name, part in parts.items()}
            return Weight(spec, parts)
        array = self.from_numpy(np.array(read(slice(None)), order="C"))
        if into is None:
            return Weight(spec, array)
        native = self.write(into.native, array)
        return into if native is into.native else Weight(spec, native)

    def from_logical(self, spec: Any, arrays: dict[str, np.ndarray[Any, Any]], into: Any = None) -> Any:
        """An operand from its logical NumPy arrays, in the memory of `into` if given; use what is returned from then on."""
        return kind_of(spec).from_logical(self, spec, arrays, into)

    def to_logical(self, operand: Any) -> dict[str, np.ndarray[Any, Any]]:
        """An operand's logical form as NumPy arrays, bit for bit."""
        logical: dict[str, np.ndarray[Any, Any]] = operand.to_logical(self)
        return logical

    def rows(self, selection: Selection) -> Rows:
        """A selection as inherited kernels read it; override it if your selections have their own native form."""
        native = selection.native
        return native if isinstance(native, Rows) else Rows(*native)

    # -- several ranks -----------------------------------------------------------------------------------------------

    def communicator(self, timeout: float = 60.0) -> Communicator:
        """All ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. No call on it waits longer than `timeout`
        seconds for another rank. Here they are processes of one machine.
        """
        return Communicator.over(joined(timeout, self.name))

    # -- time --------------------------------------------------------------------------------------------------------

    def timed(self, run: Callable[[], Any], clock: Callable[[], float] = perf_counter) -> float:
        """Seconds that `run` takes: of `clock` where the host does the work, else of the device's own events."""
        start = clock()
        run()
        return clock() - start

    def peaks(self) -> Mapping[str, Peak]:
        """The limits that a kernel is held against: of arithmetic "fp32", "bf16", "fp16" and "int8", of reading "dram", "l3"
        and "l2", and of copying "copy". None where nobody has written how to measure them.
        """
        return {}

    @cached_property
    def tuned(self) -> Table:
        """How long kernels took on this device, where `porthal tune` has measured that."""
        return Table.of(self)

    # -- capability --------------------------------------------------------------------------------------------------

    def derive(self, contract: Contract) -> Callable[..., Any] | None:
        """A kernel made from the contract itself, where no method is named after it."""
        return None

    def candidates(self, contract: Contract) -> list[Kernel]:
        """The kernels for a contract in Python's order of bases: own ones first, mixins' among them, then inherited ones."""
        op, chain, owner = contract.name, type(self).__mro__, self.name
        found: list[tuple[Any, Kernel]] = []
        for i, cls in enumerate(chain):
            owner = vars(cls).get("name") or owner
            if op in vars(cls):
                function = vars(cls)[op]
                if function is None:
                    break
                bound = function.__get__(self)
                found.append((function, Kernel(op, bound, self, owner, self._packing(chain[i:]), **_stated(function))))
            elif "derive" in vars(cls) and cls is not Backend:
                derived = vars(cls)["derive"](self, contract)
                if derived is not None:
                    found.append((None, Kernel(op, derived, self, owner, self._packing(chain[i:]), **_stated(derived))))
        kernels: list[Kernel] = []
        for function, kernel in reversed(found):
            if kernels and _calls_super(function, op):
                tie = getattr(function, "tie", kernels[0].tie)
                kernel = replace(kernel, inner=kernels[0], tie=tie)
            kernels.insert(0, _needing(contract, kernel))
        return kernels

    def own(self) -> dict[str, tuple[Kernel, ...]]:
        """The own kernels of each op, as the classes stand, where there are any."""
        found = {op: tuple(k for k in self.candidates(c) if k.owner == self.name) for op, c in operators().items()}
        return {op: kernels for op, kernels in found.items() if kernels}

    def alternatives(self) -> dict[str, tuple[str, ...]]:
        """The ops for which there are several own kernels: their providers."""
        return {op: tuple(k.provider for k in kernels) for op, kernels in self.own().items() if len(kernels) > 1}

    def _packing(self, chain: Sequence[type]) -> Callable[..., Weight]:
        """`prepare` of the first of these classes that defines it."""
        packing: Callable[..., Weight] = next(vars(c)["prepare"] for c in chain if "prepare" in vars(c)).__get__(self)
        return packing

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        """Why a kernel does not take a call with these static facts, or None: a pure function; here, of its limits."""
        return kernel.limits.refuses(spec)


def _stated(function: Any) -> dict[str, Any]:
    """What `@limits` says of a kernel."""
    return {f: getattr(function, f) for f in STATED if hasattr(function, f)}


def _calls_super(function: Any, op: str) -> bool:
    """Whether a kernel's code calls `super().op`."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and {"super", op} <= set(names_in(code))


def names_in(code: CodeType) -> Iterator[str]:
    """The names that a function's code uses, and those of the functions inside it."""
    yield from code.co_names
    for inside in code.co_consts:
        if isinstance(inside, CodeType):
            yield from names_in(inside)


def _needing(contract: Contract, kernel: Kernel) -> Kernel:
    """The kernel, which looks at the values of a call first if it has needs. Reading an array back is a host copy."""
    if not kernel.needs:
        return kernel
    backend = kernel.backend

    def read(value: Any) -> Any:
        if isinstance(value, Batch):  # lies on the host
            return value
        return backend.to_logical(value) if isinstance(value, Operand) else backend.to_numpy(value)

    @wraps(kernel.function)
    def call(*args: Any, **attrs: Any) -> Any:
        operands, _ = contract.arrange(args, attrs)
        for name, need in kernel.needs:
            if operands[name] is not None and (breach := need.breach(name, read(operands[name]))):
                raise DataNotTaken(f"{kernel.op} on {backend} {NOT_TAKEN}: {breach}")
        return kernel.function(*args, **attrs)

    return replace(kernel, function=call)


# -- what a class says -----------------------------------------------------------------------------------------------


_verified: WeakSet[type[Backend]] = WeakSet()


def verify(cls: type[Backend]) -> None:
    """UsageError where a class says something that binding would pass over: names that are almost those of ops or services,
    limits on what an op does not have, and providers that cannot be told apart."""
    if cls in _verified:
        return
    known = operators()
    chain = cls.__mro__[: cls.__mro__.index(Backend)]
    services = [n for n, value in vars(Backend).items() if not n.startswith("_") and not isinstance(value, (str, int))]
    for defining in chain:
        for name, value in vars(defining).items():
            if name in known:
                stated = getattr(value, "limits", NO_LIMITS)
                if wrong := stated.unknown(known[name]):
                    raise UsageError(f"{defining.__name__}.{name} {wrong}")
            elif not name.startswith("_") and not hasattr(Backend, name):
                near = next((n for n in (*known, *services) if _one_letter_off(name, n)), None)
                if near:
                    raise UsageError(
                        f"{defining.__name__}.{name} is almost {near!r}: give it that name, or one that begins with _"
                    )
                if hasattr(value, "limits"):
                    raise UsageError(f"{defining.__name__}.{name} has limits but is no op: known are {', '.join(known)}")
    for op in known:
        _verify_providers(op, cls, chain)
    _verified.add(cls)


def _verify_providers(op: str, cls: type[Backend], chain: Sequence[type]) -> None:
    """Own kernels of one op need names by which a user and a token can tell them apart."""
    providers, owner = [], cls.name
    for defining in chain:
        owner = vars(defining).get("name") or owner
        if owner != cls.name or (op in vars(defining) and vars(defining)[op] is None):
            break
        if op in vars(defining):
            providers.append(getattr(vars(defining)[op], "provider", ""))
    if wrong := next((p for p in providers if "," in p or not p.isprintable() or p != p.strip()), None):
        raise UsageError(f"{cls.name} names a provider {wrong!r} for {op}: write it without commas, line ends and outer spaces")
    if len(providers) > 1 and (len(set(providers)) < len(providers) or "" in providers):
        raise UsageError(f"{cls.name} has {len(providers)} kernels for {op}: give each a provider of its own")


def _one_letter_off(a: str, b: str) -> bool:
    """Whether two names differ in nothing but case and one letter: changed, missing, or swapped with the next."""
    a, b = a.lower(), b.lower()
    for _ in range(2):  # cut off what both begin with, then what both end with; both are in order again
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        a, b = a[same:][::-1], b[same:][::-1]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])
