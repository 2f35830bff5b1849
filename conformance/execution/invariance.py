"""A row's result is a function of that row: the same call with its rows in another order and one poisoned row among them.

Where an op works row by row (or request by request, with a Batch), its results must follow the rows. The rows go in
reverse, decoding requests still first, and one more row between them is not judged: NaN where the op takes any
number, a copy of another row where it takes indices, a request without keys if there is a Batch; where a backend's
shapes are static no row is added. The results, restored to their order, must pass the same judgement as before; bit for
bit where a kernel sets `batch_invariant` on its function, which then gets its first row, or request, in a call of its own
too. So does a choice whose order of ties is the kernel's own: whatever that is, it may not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from porthal.conformance.cases.compositions import DECODING
from porthal.conformance.cases.domain import per_expert
from porthal.conformance.cases.inputs import Array, Inputs
from porthal.hal import Batch, Operand
from porthal.hal.contract import Contract
from porthal.hal.dtypes import dtype, is_float

LARGEST = 2048  # rows
POISON = -1  # in an order of rows: the one that nobody judges


def disturbed(inputs: Inputs, poisoned: bool = True) -> tuple[Inputs, Array] | None:
    """The disturbed call, with a poisoned row or without, and where each row went; None where rows are not independent or
    a view shares them."""
    contract, batch = inputs.contract, inputs.batch
    rows = independent(contract)
    count = batch.T if batch else inputs.spec.dims.get(rows, 0)
    assert isinstance(count, int)  # no ranges in a call
    if not rows or inputs.case.view or not 1 <= count <= LARGEST:
        return None
    if batch:
        decoding = np.flatnonzero(batch.q_len <= DECODING)[::-1].tolist()
        others = np.flatnonzero(batch.q_len > DECODING)[::-1].tolist()
        order, other = _requests(batch, [*decoding, *[POISON] * poisoned, *others])
    else:
        half = count // 2
        order, other = np.array([*range(half), *[POISON] * poisoned, *range(half, count)])[::-1], None
    moved = _call(inputs, order, other)
    return (moved, np.argsort(order)[int(poisoned) :]) if moved else None  # the poisoned row sorts first


def split(inputs: Inputs) -> list[Inputs]:
    """The same rows in two calls, the first row, or request, alone; [] where rows are not independent, a view shares them,
    or there is one alone."""
    rows, batch = independent(inputs.contract), inputs.batch
    count = batch.R if batch else inputs.spec.dims.get(rows, 0)
    assert isinstance(count, int)  # no ranges in a call
    if not rows or inputs.case.view or not 2 <= count <= LARGEST:
        return []
    both = [[0], list(range(1, count))]
    calls = [_call(inputs, *(_requests(batch, part) if batch else (np.array(part), None))) for part in both]
    return [call for call in calls if call]


def _call(inputs: Inputs, order: Array, batch: Batch | None) -> Inputs | None:
    """The call of these rows in this order, and of their batch; None where an operand cannot be taken apart."""
    contract, operands = inputs.contract, dict(inputs.operands)
    rows = independent(contract)
    keys = next((o.dims[2] for o in contract.signature.of_kind("Batch") if len(o.dims) > 2), "")
    for operand in contract.signature.operands:
        value = operands[operand.name]
        if operand.kind == "Batch":
            operands[operand.name] = batch
        elif value is not None and operand.dims[:1] == (rows,):
            value = _taken(value, order, may_be_nan=not contract.admits)
            if value is None:
                return None
            operands[operand.name] = value[:, : batch.max_kv] if batch and operand.dims[1:] == (keys,) else value
    return replace(inputs, operands=operands, spec=contract.spec(operands, inputs.attrs))


def joined(parts: Sequence[Inputs], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of a call that was split, those that have its rows."""
    contract = parts[0].contract
    rows = independent(contract)
    found: dict[str, Any] = {}
    for result in contract.signature.results:
        values = [given[result.name] for given in results]
        if result.dims[:1] == (rows,) and isinstance(values[0], dict):
            found[result.name] = {part: np.concatenate([v[part] for v in values]) for part in values[0]}
        elif result.dims[:1] == (rows,):
            found[result.name] = np.concatenate(_of_one_width(values))
    return found


def _of_one_width(values: Sequence[Array]) -> Sequence[Array]:
    """Scores of calls whose longest requests differ, with -inf behind what a request has."""
    if values[0].ndim != 2 or len({v.shape[1] for v in values}) == 1:
        return values
    width = max(v.shape[1] for v in values)
    return [np.pad(v, ((0, 0), (0, width - v.shape[1])), constant_values=-np.inf) for v in values]


def restored(moved: Inputs, results: Mapping[str, Any], to: Array) -> dict[str, Any]:
    """Results of a moved call in the order of the call that was disturbed; those without its rows as they are."""
    contract, rows = moved.contract, independent(moved.contract)
    there = moved.batch.T if moved.batch else moved.spec.dims[rows]

    def back(value: Any) -> Any:
        if isinstance(value, dict):
            return {part: back(array) for part, array in value.items()}
        return value[to] if value.shape[:1] == (there,) else value

    by_row = {r.name for r in contract.signature.results if r.dims[:1] == (rows,)}
    return {name: back(value) if name in by_row else value for name, value in results.items()}


def independent(contract: Contract) -> str:
    """The symbol of rows that do not depend on each other, or ""; rows that another operand counts are not taken apart."""
    first = next(iter(contract.independent), "")
    leads = any(operand.dims[:1] == (first,) for operand in contract.signature.operands)
    return first if leads and not per_expert(contract) else ""


def _requests(batch: Batch, order: Sequence[int]) -> tuple[Array, Batch]:
    """Requests in this order, of which POISON is one of a single row without keys: their rows, and their batch."""
    rows = [[POISON] if r == POISON else list(range(batch.cu_q[r], batch.cu_q[r + 1])) for r in order]
    kv_lens = [0 if r == POISON else int(batch.kv_len[r]) for r in order]
    tables = [[] if r == POISON else [p for p in batch.block_table[r].tolist() if p >= 0] for r in order]
    moved = Batch.build([len(part) for part in rows], kv_lens, tables, batch.block_size)
    return np.array([row for part in rows for row in part], int), moved


def _taken(value: Any, order: Array, may_be_nan: bool) -> Any:
    """The rows of an operand in this order."""
    if isinstance(value, Operand):
        return value.with_rows(order)
    taken = value[np.maximum(order, 0)]
    if is_float(dtype(value)) and may_be_nan:
        taken[order == POISON] = np.nan
    return taken
