"""Calls of any size with a small golden: along what is independent, their rows and columns are copies of a few.

Where a contract says that results do not depend on each other along a symbol, `distinct=8` in a token makes the call of 8
places along it, and repeats them in an order in which neighbours always differ. The reference computes the small call, and
every number of the large one has its golden there. A kernel sees nothing of it: its inputs have all their places.

Rows of a batch are copied by requests: of those that are alike `distinct` rows are different. A request that has more rows
than that is computed at some of them: the first, the last, both sides of where tiles end, and others drawn. Each place in
a block table has two pages to choose from, so that hundreds of requests of full length fit; what a step writes is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request, requests, spelled
from porthal.conformance.cases.domain import per_expert
from porthal.conformance.cases.inputs import Array, Copies, Inputs, array_of, drawn, sizes_of
from porthal.conformance.cases.values import Draw
from porthal.hal import Batch, Operand, Pages, Weight
from porthal.hal.signature import OperandSpec

ALTERNATIVES = 2  # pages that a place in a block table may hold
SHARED = 64  # pages that stand where a step neither reads nor writes
TILES = (63, 64, 127, 128, 15, 16, 255, 256, 31, 32, 511, 512, 1023, 1024, 2047, 2048)


def build(case: Case) -> Inputs:
    """The inputs of a case: a pure function of its token."""
    return _copied(case) if case.distinct else drawn(case)


def _copied(case: Case) -> Inputs:
    contract, few = case.contract, case.distinct
    sizes, at = dict(case.dims), dict[str, Array]()
    given: dict[str, Any] = {}
    counted = per_expert(contract)
    for symbol in contract.independent:
        if sizes.get(symbol, 0) > few and not (symbol == contract.rows and (case.batch or counted)):
            at[symbol] = repeats(sizes[symbol], few, f"{case.stream}/{symbol}")
            sizes[symbol] = few
    batch, small_batch, counts = None, "", None
    if case.batch:
        wanted = requests(case.batch)
        assert wanted is not None
        kept, whose = _kept_requests(wanted, few, case.stream)
        written = bool(contract.signature.mutated)
        small = _batch(kept, case, written)
        batch = _batch(wanted, case, written) if written else _like(small, wanted, whose)
        at[contract.rows] = np.concatenate([np.arange(small.cu_q[r], small.cu_q[r + 1]) for r in whose])
        sizes[contract.rows], small_batch = small.T, spelled(kept)
        given = {o.name: small for o in contract.signature.of_kind("Batch")}
    elif counted and contract.rows in contract.independent:
        counts = array_of(case, contract.signature[counted], sizes_of(case))
        given[counted], at[contract.rows] = _kept_rows(counts, sizes[contract.rows], case.stream)
        sizes[contract.rows] = int(given[counted].sum())
    dims = tuple((name, sizes[name]) for name, _ in case.dims)
    core = drawn(replace(case, dims=dims, batch=small_batch, distinct=0), given)
    operands: dict[str, Any] = {}
    for operand in contract.signature.operands:
        value = core.operands[operand.name]
        if isinstance(value, Batch):
            value = batch
        elif isinstance(value, Pages) and operand.mutated:
            assert batch
            value = _larger(value, batch)
        elif operand.name == counted and counts is not None:
            value = counts
        elif value is not None and not isinstance(value, Pages):
            value = _taken(value, operand, at)
        operands[operand.name] = value
    rows = contract.rows
    if case.batch and sizes[rows] > max(few, 2):
        chosen = sampled(core, few, case.stream)
        core, place = restricted(core, chosen), np.full(sizes[rows], -1)
        place[chosen] = np.arange(len(chosen))
        at[rows] = place[at[rows]]
    core = replace(core, origin=f"{case.token}, a part of it")
    return Inputs(case, operands, core.attrs, contract.spec(operands, core.attrs), copies=Copies(core, at))


def repeats(places: int, few: int, key: str) -> Array:
    """int64 [places]: 0 to few - 1 in order, then in any; neighbours differ."""
    step = Draw(key, (places,)).integers(1, max(few, 2))
    step[:few], step[:1] = 1, 0
    return np.cumsum(step) % few


# -- batches ---------------------------------------------------------------------------------------------------------


def _kept_requests(wanted: Sequence[Request], few: int, stream: str) -> tuple[list[Request], list[int]]:
    """Of requests that are alike so many that `few` rows are different, at least two; and for each request its own."""
    kept: list[Request] = []
    whose: list[int] = []
    for one, group in groupby(wanted):
        count = len(list(group))
        most = min(count, max(2, few // max(one.q, 1)))
        order = repeats(count, most, f"{stream}/requests/{len(kept)}") if most > 1 else np.zeros(count, np.int64)
        whose += (len(kept) + order).tolist()
        kept += [one] * most
    return kept, whose


def _batch(found: Sequence[Request], case: Case, written: bool) -> Batch:
    size = case.block_size
    need = [-(-one.kv // size) for one in found]
    first = [max(one.kv - one.q, 0) // size if written else n for one, n in zip(found, need)]  # of the pages that are its own
    own = sum(n - f for n, f in zip(need, first))
    shared = SHARED if written else ALTERNATIVES * max(need, default=0)
    order = Draw(f"{case.stream}/pages", (1,)).order(shared + own + 1)
    tables, at = [], shared
    for r, (n, f) in enumerate(zip(need, first)):
        place, pick = np.arange(f), Draw(f"{case.stream}/pages/{r}", (f,))
        table = pick.integers(0, SHARED) if written else place * ALTERNATIVES + pick.integers(0, ALTERNATIVES)
        tables.append(order[[*table, *range(at, at + n - f)]].tolist())
        at += n - f
    return Batch.build([one.q for one in found], [one.kv for one in found], tables, size)


def _like(small: Batch, wanted: Sequence[Request], whose: Sequence[int]) -> Batch:
    cu_q = np.concatenate([[0], np.cumsum([one.q for one in wanted])]).astype(np.int32)
    return Batch(cu_q, small.kv_len[whose], small.block_table[whose], small.block_size)


def _larger(pages: Pages, batch: Batch) -> Pages:
    """A cache for this batch, filled with what the small one holds."""
    spec = replace(pages.spec, n_blocks=int(batch.block_table.max(initial=-1)) + 2)
    order = np.arange(spec.slots) * 7 % pages.spec.slots
    return Pages(spec, {name: array[order] for name, array in pages.native.items()})


def sampled(inputs: Inputs, few: int, stream: str) -> Array:
    """Rows that stand for all: the first and the last, one of the longest request, half of them where tiles end."""
    batch = inputs.batch
    assert batch
    ends = [0, batch.T - 1, int(np.argmax(batch.visible)), *(t for t in TILES[: few // 2] if t < batch.T)]
    order = Draw(f"{stream}/rows", (1,)).order(batch.T).tolist()
    return np.sort(list(dict.fromkeys([*ends, *order]))[: max(few, 3)])


def restricted(inputs: Inputs, rows: Array) -> Inputs:
    """The call of some of its rows; those of a batch become requests of one row each."""
    contract, batch = inputs.contract, inputs.batch
    operands: dict[str, Any] = dict(inputs.operands)
    for operand in contract.signature.operands:
        value = operands[operand.name]
        if isinstance(value, Batch):
            cu_q, whose = np.arange(len(rows) + 1, dtype=np.int32), value.row_request[rows]
            operands[operand.name] = Batch(cu_q, value.visible[rows], value.block_table[whose], value.block_size)
        elif value is not None and operand.dims[:1] == (contract.rows,):
            operands[operand.name] = _taken(value, operand, {contract.rows: rows})
    assert batch is None or contract.rows
    return replace(inputs, operands=operands, spec=contract.spec(operands, inputs.attrs))


# -- what is copied --------------------------------------------------------------------------------------------------


def _kept_rows(counts: Array, rows: int, stream: str) -> tuple[Array, Array]:
    """Of each expert's rows two, or one where experts are many; and for each row its own, -1 behind all experts."""
    most = 2 if np.count_nonzero(counts) <= 64 else 1
    kept, at = np.minimum(counts, most), np.full(rows, -1)
    first = np.cumsum(kept) - kept
    place = 0
    for e, n in enumerate(counts.tolist()):
        at[place : place + n] = first[e] + (repeats(n, most, f"{stream}/expert {e}") if most > 1 else 0)
        place += n
    return kept, at


def _taken(value: Any, operand: OperandSpec, at: Mapping[str, Array]) -> Any:
    """An operand with the places of each axis repeated; NaN where there is none."""
    axes = [(axis, at[dim]) for axis, dim in enumerate(operand.dims) if dim in at]
    if not axes:
        return value
    if isinstance(value, Operand) and not isinstance(value, Weight):
        return value.with_rows(axes[0][1])
    array = value.native if isinstance(value, Weight) else value
    for axis, places in axes:
        array = array.take(np.maximum(places, 0), axis)
        if (places < 0).any():
            array[(slice(None),) * axis + (places < 0,)] = np.nan
    if not isinstance(value, Weight):
        return array
    return Weight(replace(value.spec, shape=array.shape), array)
