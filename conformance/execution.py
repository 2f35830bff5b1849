"""One call on a backend: operands placed, the kernel run again and in threads, all that must not change watched."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from math import prod
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np

from porthal.conformance.beyond import Beyond
from porthal.conformance.cases import BEYOND, FAR, THREADS, elements
from porthal.conformance.inputs import Array, Inputs
from porthal.conformance.judge import Outcome, bits, difference, same_bits
from porthal.conformance.verdicts import Failed
from porthal.hal import Backend, Batch, Binding, NotClaimed, Pages, Rows, Selection, UsageError, Weight
from porthal.hal.dtypes import dtype, is_float, numpy_dtype

PATIENCE = 0.5  # seconds, after which two runs have to do
SMALL = 2**17  # elements of a case after which another call follows, to see that results keep their bits
ABREAST = 4  # threads that call a kernel at once, and
ROUNDS = 3  # how often
MARGIN = 64  # poisoned elements on both sides of what a backend allocates


def execute(binding: Binding, inputs: Inputs, runs: int = 2) -> Outcome:
    """Run the kernel on fresh operands, twice, then up to `runs` times as far as PATIENCE goes and nothing differs.

    Whatever it raises becomes the outcome's error, but for want of memory, which is a Failed CRASH.
    """
    until = time.perf_counter() + PATIENCE
    try:
        first, trespasses, held, watches = once(binding, inputs)
        for run in range(1, runs):
            again, *_ = once(binding, inputs)
            if time.perf_counter() > until or (run < runs - 1 and difference(first, again)):
                break
        if inputs.case.view == THREADS and not difference(first, again):
            again = next((found for found in _abreast(binding, inputs) if difference(first, found)), again)
        if elements(inputs.case) <= SMALL:
            for watch in watches:
                watch.spoil(binding)
            if change := difference(first, {name: _read(binding, value) for name, value in held.items()}):
                trespasses.append(f"a result shares memory with an input: {change}, when the inputs are overwritten")
            once(binding, replace(inputs, operands=_reversed(inputs.operands)))
            if change := difference(first, {name: _read(binding, value) for name, value in held.items()}):
                trespasses.append(f"the next call changed a result of this one: {change}")
    except NotClaimed:
        raise
    except Exception as error:
        if _lacks_memory(error):
            raise Failed("CRASH", f"out of memory: {told(error)}") from error
        return Outcome(error=told(error))
    return Outcome(first, again, tuple(trespasses))


def _reversed(operands: Mapping[str, Any]) -> dict[str, Any]:
    """Other legal values of the same form: the rows of every array from the last to the first."""
    return {name: v[::-1].copy() if isinstance(v, np.ndarray) else v for name, v in operands.items()}


def _abreast(binding: Binding, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """Results of the call in several threads, every second of which has other values; switched as often as Python can."""
    other = _reversed(inputs.operands)
    for name, value in inputs.operands.items():
        if isinstance(value, Weight):
            other[name] = replace(value, native=value.native[::-1].copy())
    calls = (inputs, replace(inputs, operands=other))
    abreast, interval = Barrier(ABREAST), sys.getswitchinterval()

    def call(n: int) -> dict[str, Any]:
        return once(binding, calls[n % 2], abreast)[0]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(ABREAST) as pool:
            for _ in range(ROUNDS):
                yield from list(pool.map(call, range(ABREAST)))[::2]
    finally:
        sys.setswitchinterval(interval)


def _lacks_memory(error: Exception) -> bool:
    """NumPy's and Python's error, and what PyTorch's allocators say."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def once(
    binding: Binding, inputs: Inputs, abreast: Barrier | None = None
) -> tuple[dict[str, Any], list[str], dict[str, Any], list[Watch]]:
    """The results in logical form, what was written elsewhere; results and watched operands as they lie on the device.

    With a barrier it waits there for the other threads before it places operands, and again before it calls the kernel;
    what belongs to all threads, the backend's memory, is not watched then.
    """
    _meet(abreast)
    contract = inputs.contract
    mutated = {o.name for o in contract.signature.mutated}
    operands, watches = {}, []
    beyond = Beyond(binding, inputs) if inputs.case.view == BEYOND else None
    apart = next((n for n, v in inputs.operands.items() if _spreads(v)), "")  # one such operand is memory enough
    for name, value in inputs.operands.items():
        view = "" if inputs.case.view == FAR and name != apart else inputs.case.view
        operands[name], watch = place(binding, name, value, view, beyond)
        if watch and name not in mutated:
            watches.append(watch)
    _meet(abreast)
    with nullcontext([]) if abreast else poisoned(binding.backend) as blocks:
        out = getattr(binding, contract.name)(*operands.values(), **inputs.attrs)
    results = dict(zip((r.name for r in contract.signature.results), out if isinstance(out, tuple) else (out,)))
    if len(results) != len(contract.signature.results) or (isinstance(out, tuple) and len(out) != len(results)):
        raise UsageError(f"{contract.name} returned {len(results)} results, expected {len(contract.signature.results)}")
    if lacking := [name for name, value in results.items() if value is None]:
        raise UsageError(f"{contract.name} returned None for {lacking[0]}, expected an array or operand")
    if not abreast:
        _churn(binding, results)
    if beyond:
        results = {name: beyond.near(value) for name, value in results.items()}
    read = {name: _read(binding, value) for name, value in results.items()}
    trespasses = [t for w in watches if (t := w.trespass(binding))]
    trespasses += [t for b in blocks if (t := b.trespass(binding))]
    return read, trespasses, results, watches


def _meet(abreast: Barrier | None) -> None:
    with suppress(BrokenBarrierError):  # another thread has failed: its error is told, not that it is missed
        if abreast:
            abreast.wait(1)


def _churn(binding: Binding, results: Mapping[str, Any]) -> None:
    """Allocate memory of the results' size and overwrite it: a result whose memory was given back early does not survive."""
    for value in results.values():
        if hasattr(value, "shape") and prod(value.shape) <= SMALL:  # operands have none
            scrap = binding.backend.empty(tuple(value.shape), dtype(value))
            scrap[...] = binding.from_numpy(_filled(tuple(value.shape), dtype(value)))


def _read(binding: Binding, value: Any) -> Any:
    """A result in logical form: an array, Rows, or a page's fields."""
    if isinstance(value, Selection):
        return Rows(*(np.array(part) for part in binding.to_logical(value).values()))
    if isinstance(value, (Pages, Weight)):
        return binding.to_logical(value)
    return np.array(binding.to_numpy(value))


@dataclass(frozen=True)
class Watch:
    """Something on the device that must keep its bits: an input with what surrounds it, or the margins of a result."""

    what: str
    value: Any
    before: Mapping[str, Array]
    inner: slice | None = None

    def trespass(self, binding: Binding) -> str:
        if isinstance(self.value, Batch):
            after = _fields(self.value)
        elif isinstance(self.value, (Weight, Pages, Selection)):
            after = binding.to_logical(self.value)
        else:
            after = {"": binding.to_numpy(self.value)}
        for name, old in self.before.items():
            new = np.asarray(after[name])
            outside = (slice(None),) if not self.inner else (slice(self.inner.start), slice(self.inner.stop, None))
            if new.shape == old.shape and all(same_bits(new[part], old[part]) for part in outside):
                continue
            changed = bits(new) != bits(old)
            if self.inner:
                changed[self.inner] = False
            if changed.any():
                at = [int(i[0]) for i in np.nonzero(changed)]
                return f"{self.what}{'.' * bool(name)}{name} changed at {at}"
        return ""

    def spoil(self, binding: Binding) -> None:
        """Overwrite an array on the device; operands of other kinds stay."""
        if not isinstance(self.value, (Batch, Weight, Pages, Selection)):
            self.value[...] = binding.from_numpy(_filled(self.before[""].shape, dtype(self.before[""])))


def place(
    binding: Binding, name: str, value: Any, view: str = "", beyond: Beyond | None = None
) -> tuple[Any, Watch | None]:
    """An operand on the backend, and the watch over it."""
    if value is None:
        return None, None
    if beyond:
        value = beyond.moved(name, value)
        if isinstance(value, (Pages, Weight)):
            placed = beyond.placed(value)
            near = isinstance(value, Pages)  # weights are too large to be read back
            return placed, Watch(f"pages {name}", beyond.near(placed), value.native) if near else None
    if isinstance(value, Batch):
        before = {n: a.copy() for n, a in _fields(value).items()}
        return binding.plan(value), Watch(f"batch {name}", value, before)
    if isinstance(value, Weight):
        placed = binding.prepare(value.spec, lambda index: value.native[index].copy())
        return placed, Watch(f"weight {name}", placed, {"w": value.native})
    if isinstance(value, Pages):
        placed = binding.from_logical(value.spec, {n: a.copy() for n, a in value.native.items()})
        return placed, Watch(f"pages {name}", placed, value.native)
    if isinstance(value, Selection):
        placed = binding.from_logical(value.spec, {n: a.copy() for n, a in value.native._asdict().items()})
        return placed, Watch(f"selection {name}", placed, value.native._asdict())
    if view == FAR and _spreads(value):
        placed = _far(binding, value)
        return placed, Watch(f"input {name}", placed, {"": value})
    parent, cut = _parent(value, view)
    device = binding.from_numpy(parent.copy())
    return cut(device), Watch(f"input {name}", device, {"": parent})


def _fields(batch: Batch) -> dict[str, Array]:
    return {"cu_q": batch.cu_q, "kv_len": batch.kv_len, "block_table": batch.block_table}


def _parent(x: Array, view: str) -> tuple[Array, Callable[[Any], Any]]:
    """A poisoned array that contains x, and how to cut x from it as a view."""
    if view == "columns" and x.ndim:
        width = x.shape[-1]
        parent = _filled((*x.shape[:-1], width + 5), dtype(x))
        parent[..., 3 : 3 + width] = x
        return parent, lambda a: a[..., 3 : 3 + width]
    if view == "rows":
        parent = _filled((2 * len(x) + 1, *x.shape[1:]), dtype(x))
        parent[1::2] = x
        return parent, lambda a: a[1::2]
    if view == "transposed" and x.ndim > 1:
        return np.ascontiguousarray(x.swapaxes(-1, -2)), lambda a: a.swapaxes(-1, -2)
    if view == "broadcast" and len(x) and is_float(dtype(x)):
        return x[:1], lambda a: np.broadcast_to(a, x.shape) if isinstance(a, np.ndarray) else a.expand(x.shape)
    return x, lambda a: a


def _spreads(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 1 and len(value) > 1


def _far(binding: Binding, x: Array) -> Any:
    """x with its last row 2 GiB behind the first: addresses, of which only the rows are touched."""
    width = prod(x.shape[1:])
    step = max(width, -(-(2**31) // (x.dtype.itemsize * (len(x) - 1))))
    try:
        view = binding.backend.empty((len(x), step), dtype(x))[:, :width].reshape(x.shape)
    except (MemoryError, RuntimeError) as error:
        raise NotClaimed(f"rows 2 GiB apart find no room on {binding.backend}: {told(error)}") from None
    view[...] = binding.from_numpy(x.copy())
    return view


def poison(kind: str) -> Any:
    """NaN, or an integer that no index, count or id ever is."""
    if is_float(kind):
        return np.nan
    return True if kind == "bool" else np.iinfo(kind).max // 3


def _filled(shape: tuple[int, ...], kind: str) -> Array:
    return np.full(shape, poison(kind), numpy_dtype(kind))


@contextmanager
def poisoned(backend: Backend) -> Iterator[list[Watch]]:
    """While it lasts, `backend.empty` gives poisoned memory between poisoned margins."""
    blocks: list[Watch] = []

    def empty(shape: tuple[int, ...], kind: str) -> Any:
        n = prod(shape)
        before = _filled((n + 2 * MARGIN,), kind)
        whole = backend.from_numpy(before.copy())
        blocks.append(Watch("memory beside an output", whole, {"": before}, slice(MARGIN, MARGIN + n)))
        return whole[MARGIN : MARGIN + n].reshape(shape)

    vars(backend)["empty"] = empty
    try:
        yield blocks
    finally:
        del vars(backend)["empty"]


def told(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no message'}"
