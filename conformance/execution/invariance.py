"""A row's result is a function of that row: the same call with its rows in another order and one poisoned row among them.

Where an op works row by row (or request by request, with a Batch), its results must follow the rows. The rows go in
reverse, decoding requests still first, and one more row between them is not judged: NaN where the op takes any
number, a copy of another row where it takes indices, a request without keys if there is a Batch; where a backend's
shapes are static no row is added. The results, restored to their order, must pass the same judgement as before; bit for
bit where a kernel sets `batch_invariant` on its function.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    operands = dict(inputs.operands)
    if batch:
        order, other = _requests(batch, poisoned)
    else:
        half = count // 2
        order, other = np.array([*range(half), *[POISON] * poisoned, *range(half, count)])[::-1], None
    for operand in contract.signature.operands:
        value = operands[operand.name]
        if operand.kind == "Batch":
            operands[operand.name] = other
        elif value is not None and operand.dims[:1] == (rows,):
            operands[operand.name] = _taken(value, order, may_be_nan=not contract.admits)
            if operands[operand.name] is None:
                return None
    moved = replace(inputs, operands=operands, spec=contract.spec(operands, inputs.attrs))
    return moved, np.argsort(order)[int(poisoned) :]  # the poisoned row sorts first


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


def _requests(batch: Batch, poisoned: bool) -> tuple[Array, Batch]:
    """Requests in reverse, those that decode first, then one of a single row without keys, then the others."""
    decoding = np.flatnonzero(batch.q_len <= DECODING)[::-1].tolist()
    others = np.flatnonzero(batch.q_len > DECODING)[::-1].tolist()
    order = [*decoding, *[POISON] * poisoned, *others]
    rows = [[POISON] if r == POISON else list(range(batch.cu_q[r], batch.cu_q[r + 1])) for r in order]
    kv_lens = [0 if r == POISON else int(batch.kv_len[r]) for r in order]
    tables = [[] if r == POISON else [p for p in batch.block_table[r].tolist() if p >= 0] for r in order]
    moved = Batch.build([len(part) for part in rows], kv_lens, tables, batch.block_size)
    return np.array([row for part in rows for row in part]), moved


def _taken(value: Any, order: Array, may_be_nan: bool) -> Any:
    """The rows of an operand in this order."""
    if isinstance(value, Operand):
        return value.with_rows(order)
    taken = value[np.maximum(order, 0)]
    if is_float(dtype(value)) and may_be_nan:
        taken[order == POISON] = np.nan
    return taken
