"""The operands of a case in logical form: NumPy arrays in their own dtypes, NaN where nothing may be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from porthal.conformance.cases import provocations, quantised  # noqa: F401  enter their generators
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import CROWD, lengths, requests, spare
from porthal.conformance.cases.legal import PAGES, held_pages
from porthal.conformance.cases.values import RECIPES, Draw
from porthal.hal import (
    Batch,
    CallSpec,
    Pages,
    PagesSpec,
    Quantised,
    QuantisedSpec,
    Rows,
    Selection,
    SelectionSpec,
    Weight,
    WeightSpec,
    scheme_of,
)
from porthal.hal.contract import Contract
from porthal.hal.dtypes import is_float, narrow, numpy_dtype, widen
from porthal.hal.operands.pages import SCALE
from porthal.hal.scheme import NONE, TOP, Scheme
from porthal.hal.signature import ARRAY, OperandSpec, evaluate

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Inputs:
    """A call in logical form: operands hold NumPy arrays in their own dtype.

    origin  where the call was observed, if it was not planned: its case gives sizes, but no values
    copies  the small call that this one repeats, if it does
    """

    case: Case
    operands: Mapping[str, Any]
    attrs: Mapping[str, Any]
    spec: CallSpec
    origin: str = ""
    copies: Copies | None = None

    @property
    def contract(self) -> Contract:
        return self.case.contract

    @property
    def batch(self) -> Batch | None:
        return next((v for v in self.operands.values() if isinstance(v, Batch)), None)


@dataclass(frozen=True)
class Copies:
    """Of a call that repeats a small one: for each place along a symbol the place in the small call, or -1 where there is
    none, because it was left out of the small call or nothing is specified there."""

    small: Inputs
    at: Mapping[str, Array]


def sizes_of(case: Case) -> dict[str, Any]:
    """Dims and attributes of a case, and the pages of a cache that no batch describes."""
    return {"P": held_pages(case), **case.attributes, **dict(case.dims)}


def drawn(case: Case, given: Mapping[str, Any] = MappingProxyType({})) -> Inputs:
    """The inputs of a case, some of whose operands are given."""
    contract, attrs, sizes = case.contract, case.attributes, sizes_of(case)
    batches = contract.signature.of_kind("Batch")
    batch = (given.get(batches[0].name) or _batch(case, sizes)) if batches else None
    for operand in batches:
        assert batch
        sizes |= dict(zip(operand.dims, (batch.T, batch.R, batch.max_kv)))
    operands: dict[str, Any] = {
        o.name: None if o.name in case.absent else MAKERS[o.kind](case, o, sizes, batch)
        for o in contract.signature.operands
        if o.name not in given
    }
    operands = {o.name: {**operands, **given}[o.name] for o in contract.signature.operands}
    if contract.hidden:
        for name, mask in contract.hidden(**operands).items():
            operands[name][mask] = np.nan
    if contract.adjust:
        contract.adjust(**operands)
    if case.view == "broadcast":
        operands = {n: _repeated(v) for n, v in operands.items()}
    return Inputs(case, operands, attrs, contract.spec(operands, attrs))


def observed(contract: Contract, operands: Mapping[str, Any], attrs: Mapping[str, Any]) -> Inputs:
    """A call that was observed rather than planned."""
    spec = contract.spec(operands, attrs)
    sizes = {name: size for name, size in spec.dims.items() if isinstance(size, int)}  # no ranges in a call
    page = sizes.pop("block_size", 0)
    absent = [name for name, value in operands.items() if value is None]
    for operand in contract.signature.of_kind("Pages"):
        absent += [name for name, _, _ in operand.fields if name not in dict(operands[operand.name].spec.fields)]
    case = Case(contract.name, tuple(sizes.items()), tuple(attrs.items()), absent=tuple(absent), block_size=page)
    return Inputs(case, operands, attrs, spec, origin=contract.name)


def _draw(case: Case, part: str, shape: tuple[int, ...], dtype: str, sizes: Mapping[str, Any]) -> Draw:
    return Draw(f"{case.stream}/{part}", shape, dtype, sizes)


def array_of(case: Case, operand: OperandSpec, sizes: Mapping[str, Any], batch: Batch | None = None) -> Array:
    """An array by the operand's value generator."""
    shape = tuple(evaluate(d, sizes) for d in operand.dims)
    dtype, bounds = case.dtype(operand.name), {}
    if operand.name in case.contract.ranges:
        low, high = (b if isinstance(b, int) else evaluate(b, sizes) for b in case.contract.ranges[operand.name])
        bounds = {"low": low, "high": high}
    chosen = case.recipe(operand.name)
    if case.schemes:
        sizes = {"scheme": scheme_of(case.schemes[0][1]).other or case.schemes[0][1], **sizes}
    if not is_float(dtype) and chosen in ("normal", "special", "huge", "denormal", "extreme"):  # an op that copies integers too
        chosen = "wide"
    values = RECIPES[chosen](_draw(case, operand.name, shape, dtype, {**sizes, **bounds}))
    if not is_float(dtype):
        return values.astype(numpy_dtype(dtype))
    x = narrow(np.asarray(values, np.float64), dtype)
    return _all_nan(x) if case.contract.exact and not case.contract.choice and dtype == "float32" else x


NANS = np.array([0x7FC00000, 0xFFC00000, 0x7F800001], np.uint32)  # as NumPy makes it, negative, with the lowest bit alone


def _all_nan(x: Array) -> Array:
    """What is copied or cast: a rounding that takes the last NaN for a number makes an infinity of it."""
    if (nan := np.isnan(x)).any():
        x.view(np.uint32)[nan] = NANS[np.arange(np.count_nonzero(nan)) % len(NANS)]
    return x


def _weight(case: Case, operand: OperandSpec, sizes: Mapping[str, Any], batch: Batch | None) -> Weight:
    shape, dtype, name = tuple(evaluate(d, sizes) for d in operand.dims), case.dtype(operand.name), case.scheme(operand.name)
    if name == NONE:
        return Weight(WeightSpec(case.op, operand.name, shape, dtype), array_of(case, operand, sizes))
    return Weight(WeightSpec(case.op, operand.name, shape, dtype, name), _parts(case, operand.name, shape, name, sizes))


def _quantised(case: Case, operand: OperandSpec, sizes: Mapping[str, Any], batch: Batch | None) -> Quantised:
    shape, name = tuple(evaluate(d, sizes) for d in operand.dims), case.scheme(operand.name)
    return Quantised(QuantisedSpec(shape, name), _parts(case, operand.name, shape, name, sizes))


def _parts(case: Case, operand: str, shape: tuple[int, ...], name: str, sizes: Mapping[str, Any]) -> dict[str, Array]:
    """The codes and scales of numbers of the operand's value generator. Where a matrix has a scale for all of it, this one is
    two that were joined, as gate and up are: each half of the rows has its own."""
    draw = _draw(case, operand, shape, "float32", {**sizes, "scheme": name})
    scheme, x = scheme_of(name), np.asarray(RECIPES[case.recipe(operand)](draw), np.float64)
    if "whole" not in scheme.form(shape):
        return _coded(scheme, x, case.recipe(operand) == "pegged")
    halves = [scheme.quantised(half) for half in np.split(x, [shape[-2] // 2], -2) if half.size or not x.size]
    return {part: np.concatenate([half[part] for half in halves], -1 if part == "whole" else -2) for part in halves[0]}


def _coded(scheme: Scheme, x: Array, pegged: bool) -> dict[str, Array]:
    """Codes and scales; where these are about the ends of codes also the least code, which other packers give."""
    parts = scheme.quantised(x)
    if pegged and scheme.codes.startswith("int"):
        parts["codes"][parts["codes"] == -TOP[scheme.codes]] -= 1
    return parts


def _repeated(value: Any) -> Any:
    """A float array with every row equal to the first, as a view of stride 0 shows it."""
    if isinstance(value, np.ndarray) and is_float(str(value.dtype)) and len(value):
        return np.array(np.broadcast_to(value[:1], value.shape))
    return value


# -- batches ---------------------------------------------------------------------------------------------------------


def _batch(case: Case, sizes: Mapping[str, Any]) -> Batch:
    """Pages are shuffled and belong to one request each, except in crowds and long batches, which read shared pages,
    and where the case says what is shared."""
    T = int(sizes["T"])
    q_lens, kv_lens = lengths(case.batch, T, int(sizes.get("k", 0)), case.block_size, case.stream)
    need = [-(-n // case.block_size) for n in kv_lens]
    if case.batch in (CROWD, "long"):
        tables = [[(r * 7 + p) % PAGES for p in range(n)] for r, n in enumerate(need)]
    else:
        need = [n + more for n, more in zip(need, spare(case.batch, len(need)))]
        order = Draw(f"{case.stream}/pages", (1,)).order(sum(need) + 3).tolist()
        tables = [order[end - n : end] for n, end in zip(need, np.cumsum(need))]
        for r, request in enumerate(requests(case.batch) or ()):
            tables[r][: request.shared] = tables[r - 1][: request.shared] if r else []
    return Batch.build(q_lens, kv_lens, tables, case.block_size)


def _pages(case: Case, operand: OperandSpec, sizes: Mapping[str, Any], batch: Batch | None) -> Pages:
    dtype = case.dtype(operand.name)
    n_blocks = int(sizes["P"])
    if batch is not None:
        n_blocks = max(int(batch.block_table.max(initial=-1)) + 2, 4)
    fields = tuple((name, int(evaluate(width, sizes))) for name, width, _ in operand.fields if name not in case.absent)
    spec = PagesSpec(fields, dtype, n_blocks, case.block_size, case.scheme(operand.name))
    unread = np.zeros(spec.slots, bool)
    if batch is not None and not operand.mutated:
        unread[:] = True
        for r in range(batch.R):
            unread[batch.slots_of(r)] = False
    native = {}
    for name, width in fields:
        draw = _draw(case, f"{operand.name}.{name}", (spec.slots, width), dtype, sizes)
        values = np.asarray(RECIPES[case.recipe(operand.name)](draw), np.float64)
        values[unread] = np.nan
        native[name] = narrow(values, dtype)
        if spec.quantised and spec.quantised[0] == name:
            native |= _held(name, _coded(spec.quantised[1], widen(native[name]), pegged=True), unread)
    return Pages(spec, native)


def _held(name: str, parts: Mapping[str, Array], unread: Array) -> dict[str, Array]:
    """The parts of a quantised field, with a scale of NaN where nothing may be read."""
    parts["scale"][unread] = np.nan
    return {name: parts["codes"], name + SCALE: parts["scale"]}


def _selection(case: Case, operand: OperandSpec, sizes: Mapping[str, Any], batch: Batch | None) -> Selection:
    """Distinct visible positions in no order: as many as there are, fewer, or none in every second row."""
    T, k = (int(evaluate(d, sizes)) for d in operand.dims)
    visible = np.full(T, k + 37) if batch is None else batch.visible
    draw, chosen = Draw(f"{case.stream}/{operand.name}", (T,)), case.recipe(operand.name)
    length = np.minimum(visible, k)
    if chosen == "short":
        length = np.minimum(length, draw.integers(0, k + 1, "length"))
    if chosen == "empty":
        length = np.where(np.arange(T) % 2 == 0, 0, length)
    indices = np.full((T, k), -1, np.int32)
    for t in range(T):
        indices[t, : length[t]] = Draw(f"{draw.key}/{t}", (1,)).order(int(visible[t]), int(length[t]))
    return Selection(SelectionSpec(T, k), Rows(indices, length.astype(np.int32)))


# What makes an operand of each kind.
MAKERS: dict[str, Callable[[Case, OperandSpec, Mapping[str, Any], Batch | None], Any]] = {
    ARRAY: array_of,
    "Weight": _weight,
    "Pages": _pages,
    "Selection": _selection,
    "Quantised": _quantised,
    "Batch": lambda case, operand, sizes, batch: batch,
}


# -- which parts of a result count ---------------------------------------------------------------------------------


def written_slots(inputs: Inputs, pages: Pages) -> Array:
    """bool [slots]: which slots of a mutated cache the call may change."""
    written = np.zeros(pages.spec.slots, bool)
    if inputs.batch is not None:
        slots = inputs.batch.slots
        written[slots[slots >= 0]] = True
    else:
        blocks = written.reshape(pages.spec.n_blocks, pages.spec.block_size)
        blocks[inputs.operands[inputs.contract.writes]] = True
    return written


def specified_rows(inputs: Inputs) -> int | None:
    """How many leading rows of the results the contract specifies, or None for all."""
    count = inputs.contract.specified
    return count and count(**inputs.operands)
