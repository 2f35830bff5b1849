"""Operands on a device, what surrounds them, and the watch over all that a call may not write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.domain import joined
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.cases.legal import FAR, PITCHES
from porthal.conformance.execution.distant import Distant
from porthal.conformance.execution.fingerprint import Fingerprint, beyond_logical, shown_whole
from porthal.conformance.execution.outcome import Array, Mutation, bits, difference, same_bits
from porthal.hal import Backend, Batch, Binding, NotClaimed, Operand, Pages, Selection, Weight
from porthal.hal.dtypes import dtype, is_float, numpy_dtype
from porthal.hal.errors import message_of

MARGIN = 256  # poisoned elements on both sides of what a backend allocates, which keeps it aligned to as many bytes


@dataclass(frozen=True)
class Watch:
    """Something on the device that must keep its bits: an operand with what surrounds it, or the margins of a result.

    before  the bits that it had, by the parts of its logical form
    inner   of what lies around something, the part that may be written
    own     which elements of an array are the operand's own; the others lie beside it
    native  an operand in the backend's own form, as far as `before` does not show it
    """

    what: str
    value: Any
    before: Mapping[str, Array]
    inner: slice | None = None
    own: Array | None = None
    native: Fingerprint | None = None

    @classmethod
    def over(cls, backend: Backend, what: str, placed: Operand, before: Mapping[str, Array]) -> Watch:
        """Over an operand whose logical form is `before`."""
        inside = beyond_logical(backend, placed)
        native = None if inside is None else Fingerprint(backend, inside, what)
        return cls(what, placed, {} if shown_whole(placed, native) else before, native=native)

    def trespass(self, binding: Binding) -> str:
        """What changed, in words, or ""; a Mutation where it is what an operand holds."""
        if self.native and (change := self.native.change(self._native_now())):
            return Mutation(change)
        after = read(binding, self.value) if self.before else {}
        for name, old in self.before.items():
            new = after[name] if isinstance(after, dict) else after
            outside = (slice(self.inner.start), slice(self.inner.stop, None)) if self.inner else (slice(None),)
            if old.ndim and all(same_bits(new[part], old[part]) for part in outside):
                continue
            changed = bits(new) != bits(old)
            if self.inner:
                changed[self.inner] = False
            if changed.any():
                inside = changed if self.own is None else changed & self.own
                at = [int(i[0]) for i in np.nonzero(inside if inside.any() else changed)]
                beside = self.inner or not inside.any()
                told = f"{self.what}{'.' * bool(name)}{name} changed at {at}"
                return f"memory beside {told}" if beside and not self.inner else told if beside else Mutation(told)
        return ""

    def _native_now(self) -> Fingerprint:
        assert self.native
        return Fingerprint(self.native.backend, beyond_logical(self.native.backend, self.value), self.what)

    @property
    def unread(self) -> list[str]:
        """What of an operand cannot be read, in words."""
        kinds = Counter(self.native.unread) if self.native else {}
        return [f"{kind} in {self.what}" for kind in kinds]

    def spoil(self, backend: Backend) -> None:
        """Overwrite an array or a selection on the device; operands of other kinds stay."""
        if isinstance(self.value, Selection):
            form = Selection.form(self.value.spec)
            backend.from_logical(self.value.spec, {part: filled(*of) for part, of in form.items()}, self.value)
        elif not isinstance(self.value, Operand):
            backend.write(self.value, backend.from_numpy(filled(self.before[""].shape, dtype(self.before[""]))))


def read(binding: Binding, value: Any) -> Any:
    """A value of a backend in logical form: an array, or an operand's parts."""
    if isinstance(value, Batch):  # lies on the host
        return value.parts()
    if isinstance(value, Operand):
        return {name: np.asarray(array) for name, array in binding.to_logical(value).items()}
    return np.asarray(binding.to_numpy(value))


def unwritten(binding: Binding, name: str, value: Any, placed: Any) -> str:
    """What of these values is not in memory that was written with them, in words."""
    wanted = value.parts() if isinstance(value, Operand) else value
    if not (change := difference({name: wanted}, {name: read(binding, placed)})):
        return ""
    how = "prepare" if isinstance(value, Weight) else "from_logical" if isinstance(value, Operand) else "from_numpy"
    what = change.replace(" is ", " should be ", 1).replace(", then ", ", it is ")
    return f"{how}(into=) has not written the new values: {what}"


def place(
    binding: Binding, name: str, value: Any, view: str = "", distant: Distant | None = None
) -> tuple[Any, Watch | None]:
    """An operand on the backend, and the watch over it."""
    if value is None:
        return None, None
    if distant:
        value = distant.moved(name, value)
        if isinstance(value, (Pages, Weight)):
            placed = distant.placed(value)
            near = isinstance(value, Pages)  # weights are too large to be read back
            return placed, Watch(f"pages {name}", distant.near(placed), value.native) if near else None
    if isinstance(value, Operand):
        what, before = f"{type(value).__name__.lower()} {name}", value.parts()
        if isinstance(value, Batch):  # lies on the host: the kernel gets no array of the suite's
            value = Batch.of(None, {part: array.copy() for part, array in before.items()})
        placed = value.place(binding)
        watch = Watch.over(binding.backend, what, placed, before)
        return placed, replace(watch, before=before) if isinstance(value, Batch) else watch  # planning, too, changes nothing
    if view == FAR and spreads(value):
        placed = _far(binding, value)
        return placed, Watch(f"input {name}", placed, {"": value})
    parent, cut = _parent(binding.backend, value, view)
    device = binding.from_numpy(parent.copy())
    own = None
    if parent.size > value.size:
        own = np.zeros(parent.shape, bool)
        cut(own)[...] = True
    return cut(device), Watch(f"input {name}", device, {"": parent}, own=own)


def view_of(name: str, case: Case, apart: str) -> str:
    """How an operand is laid out: some views are those of one operand, or of all but one."""
    if case.view == FAR:
        return FAR if name == apart else ""
    if case.view in PITCHES:
        return "columns" if (name in joined(case.contract)[:1]) == (case.view == "alone") else ""
    return case.view


def jointly(binding: Binding, inputs: Inputs) -> dict[str, tuple[Any, Watch | None]]:
    """The arrays of one dtype whose rows can lie side by side, cut from one buffer, with one watch over it."""
    arrays = {name: inputs.operands[name] for name in joined(inputs.contract) if inputs.operands[name] is not None}
    first = next(iter(arrays.values()))
    arrays = {name: x for name, x in arrays.items() if x.dtype == first.dtype}
    whole = np.concatenate(list(arrays.values()), axis=-1)
    device, ends = binding.from_numpy(whole.copy()), np.cumsum([x.shape[-1] for x in arrays.values()]).tolist()
    watch = Watch(f"input {' beside '.join(arrays)}", device, {"": whole})
    watches = [watch, *[None] * (len(arrays) - 1)]
    cuts = [(*[slice(None)] * (whole.ndim - 1), slice(end - x.shape[-1], end)) for x, end in zip(arrays.values(), ends)]
    return {name: (device[cut], watch) for name, cut, watch in zip(arrays, cuts, watches)}


def _parent(backend: Backend, x: Array, view: str) -> tuple[Array, Callable[[Any], Any]]:
    """A poisoned array that contains x, and how to cut x from it as a view."""
    if view == "columns" and x.ndim:
        width = x.shape[-1]
        parent = filled((*x.shape[:-1], width + 5), dtype(x))
        columns = (*[slice(None)] * (x.ndim - 1), slice(3, 3 + width))
        parent[columns] = x
        return parent, lambda a: a[columns]
    if view == "rows":
        parent = filled((2 * len(x) + 1, *x.shape[1:]), dtype(x))
        parent[1::2] = x
        return parent, lambda a: a[1::2]
    if view == "transposed" and x.ndim > 1 and backend.traits.strides:
        return np.ascontiguousarray(x.swapaxes(-1, -2)), lambda a: a.swapaxes(-1, -2)
    if view == "heads" and x.ndim == 3 and backend.traits.strides:
        return np.ascontiguousarray(x.swapaxes(0, 1)), lambda a: a.swapaxes(0, 1)
    if view == "slices" and x.ndim > 1:
        more = (3, 3, *[0] * (x.ndim - 2)) if x.ndim == 3 else (3, *[0] * (x.ndim - 1))
        parent = filled(tuple(n + m for n, m in zip(x.shape, more)), dtype(x))
        inside = tuple(slice(m // 2, m // 2 + n) for n, m in zip(x.shape, more))
        parent[inside] = x
        return parent, lambda a: a[inside]
    if view == "broadcast" and backend.traits.strides and len(x) and is_float(dtype(x)):
        return x[:1], lambda a: backend.expand(a, x.shape)
    return x, lambda a: a


def spreads(value: Any) -> bool:
    """Whether an operand's rows can stand far apart."""
    return isinstance(value, np.ndarray) and value.ndim > 1 and len(value) > 1


def _far(binding: Binding, x: Array) -> Any:
    """x with its last row 2 GiB behind the first: only the rows themselves are touched."""
    rows = -(-(2**31) // (max(x[0].nbytes, 1) * (len(x) - 1)))  # from one to the next
    try:
        view = binding.backend.empty((len(x), rows, *x.shape[1:]), dtype(x))[:, 0]
    except (MemoryError, RuntimeError) as error:
        raise NotClaimed(f"rows 2 GiB apart do not fit on {binding.backend}: {message_of(error)}") from None
    return binding.backend.write(view, binding.from_numpy(x.copy()))


def poison(kind: str) -> Any:
    """NaN, or an integer that is never an index, count or id."""
    if is_float(kind):
        return np.nan
    return True if kind == "bool" else np.iinfo(kind).max // 3


def filled(shape: tuple[int, ...], kind: str) -> Array:
    """An array of poison."""
    return np.full(shape, poison(kind), numpy_dtype(kind))


@contextmanager
def poisoned(backend: Backend) -> Iterator[list[Watch]]:
    """While it lasts, `backend.empty` gives poisoned memory, between poisoned margins where slices share memory."""
    blocks: list[Watch] = []

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        n = prod(shape)
        if not backend.traits.views_alias:
            return placed(filled(shape, dtype))
        before = filled((n + 2 * MARGIN,), dtype)
        whole = placed(before.copy())
        blocks.append(Watch("memory beside an output", whole, {"": before}, slice(MARGIN, MARGIN + n)))
        return whole[MARGIN : MARGIN + n].reshape(*shape)

    def placed(x: Array) -> Any:
        """On the backend, whose `from_numpy` may call its `empty`."""
        use(before_us)
        try:
            return backend.from_numpy(x)
        finally:
            use(empty)

    def use(allocate: Callable[..., Any] | None) -> None:
        vars(backend).pop("empty", None)
        if allocate:
            backend.empty = allocate  # type: ignore[method-assign]

    before_us = vars(backend).get("empty")
    use(empty)
    try:
        yield blocks
    finally:
        use(before_us)
