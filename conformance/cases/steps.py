"""What the steps of a program are called with: other values in the same shape, other batches, caches written anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import DECODING
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.domain import absences, first_float, free_symbols
from porthal.conformance.cases.inputs import Inputs, drawn
from porthal.conformance.cases.legal import refusal
from porthal.conformance.cases.programs import role_of
from porthal.hal import Batch, Pages, contracts
from porthal.hal.contract import Contract
from porthal.hal.signature import evaluate


def first(case: Case) -> Inputs:
    """What the first step of a program is called with: the call without it."""
    return build(replace(case, seq=""))


def other(case: Case, n: int, batch: Batch | None = None) -> Inputs:
    """A call of the same shape with other values, the n-th of them; with this batch."""
    plain = replace(case, seq="", seed=case.seed + n)
    return drawn(plain, {o.name: batch for o in case.contract.signature.of_kind("Batch") if batch is not None})


def pages_of(contract: Contract) -> str:
    """The name of an op's cache."""
    return contract.signature.of_kind("Pages")[0].name


def otherwise(case: Case, batch: Batch | None) -> Iterator[tuple[str, Inputs]]:
    """The same call without what is optional, and with another value of each attribute in turn, where that is legal and leaves
    the dims as they are."""
    for group in absences(case.contract):
        if not refusal(without := replace(case, seq="", absent=group)):
            yield f"without {' and '.join(group)}", other(without, 0, batch)
    for name, attribute in case.contract.attributes.items():
        given = dict(case.attrs)
        now = given.get(name, attribute.default)
        for value in case.contract.cases.get(name, ()):
            changed = replace(case, seq="", attrs=tuple({**given, name: attribute.type(value)}.items()))
            if value != now and not refusal(changed):
                yield f"with {name}={value}", other(changed, 0, batch)
                break


def rearranged(batch: Batch) -> Batch:
    """Another batch of the same shape: the requests that decode in reverse, other pages in every table."""
    decoding = np.flatnonzero(batch.q_len <= DECODING)[::-1].tolist()
    order = [*decoding, *np.flatnonzero(batch.q_len > DECODING).tolist()]
    held = np.unique(batch.block_table[batch.block_table >= 0])
    pages = dict(zip(held.tolist(), held[::-1].tolist()))
    tables = [[pages[p] for p in batch.block_table[r].tolist() if p >= 0] for r in order]
    return Batch.build(batch.q_len[order].tolist(), batch.kv_len[order].tolist(), tables, batch.block_size)


def repaged(batch: Batch) -> Batch:
    """The same requests with other pages in every table."""
    table, held = batch.block_table, np.unique(batch.block_table[batch.block_table >= 0])
    at = np.searchsorted(held, np.maximum(table, 0)) if len(held) else 0
    moved = np.where(table >= 0, np.roll(held, 1)[at], table) if len(held) else table
    return Batch(batch.cu_q, batch.kv_len, moved.astype(np.int32), batch.block_size)


def reparted(batch: Batch) -> Batch:
    """The same keys and tables, and as many rows, of which one is another request's; the same batch where none has room."""
    room = np.flatnonzero((batch.kv_len > batch.q_len) & (batch.q_len < DECODING) & (batch.q_len > 0))
    if len(room) < 2 or batch.q_len[-1] < 2:
        return batch
    q_len = batch.q_len.copy()
    q_len[-1] -= 1
    q_len[room[0]] += 1
    return Batch(np.concatenate([[0], np.cumsum(q_len)]).astype(np.int32), batch.kv_len, batch.block_table, batch.block_size)


def shorter(batch: Batch) -> Batch:
    """The same requests and tables after rejected drafts: each as short as leaves a page behind its end, or its rows."""
    kept = np.maximum(batch.kv_len - batch.block_size - 1, np.minimum(batch.kv_len, batch.q_len))
    return Batch(batch.cu_q, kept.astype(np.int32), batch.block_table, batch.block_size)


def grown(batch: Batch) -> Batch:
    """The step after: one row for each request, which its table has a page for; a padded one stays as it is."""
    held = (batch.block_table >= 0).sum(1) * batch.block_size
    after = np.where(batch.kv_len > 0, np.minimum(batch.kv_len + 1, held), 0)
    return Batch(np.arange(batch.R + 1, dtype=np.int32), after.astype(np.int32), batch.block_table, batch.block_size)


def visible(batch: Batch, pages: Pages) -> np.ndarray[Any, Any]:
    """bool [slots]: what a step may read of a cache."""
    seen = np.zeros(pages.spec.slots, bool)
    for r in range(batch.R):
        seen[batch.slots_of(r)] = True
    return seen


def regrown(before: Pages, after: Pages, kept: Batch) -> Pages:
    """A cache in which the rest is written anew, except for what a batch sees of it."""
    seen = visible(kept, before)
    native = {name: np.where(seen[:, None], array, after.native[name]) for name, array in before.native.items()}
    return replace(after, native=native)


# -- write, select, attend -----------------------------------------------------------------------------------------------


def scenario(case: Case) -> dict[str, Case]:
    """The calls that `reuse` joins, by role: with the rows, the dtype, the pages and what is selected of its own op, and the
    smallest usual size of everything else."""
    known = {role: contract for contract in contracts().values() if (role := role_of(contract))}
    given = {**dict(case.dims), **dict(case.attrs)}
    facts = {role: {s: _usual(contract.cases[s]) for s in contract.cases} for role, contract in known.items()}
    for role, contract in known.items():
        facts[role] |= {n: v for n, v in given.items() if contract is case.contract or n in (contract.rows, "k")}
    cached, written = (known[role].signature.of_kind("Pages")[0].fields for role in ("attend", "write"))
    facts["write"] |= {w: evaluate(width, facts["attend"]) for (_, w, _), (_, width, _) in zip(written, cached)}
    found = {}
    for role, contract in known.items():
        batch = bool(contract.signature.of_kind("Batch"))
        first_one = first_float(contract)
        kind = next((kind for _, kind in case.dtypes), contract.dtypes[first_one][0] if first_one else "")
        found[role] = Case(
            contract.name,
            tuple((s, facts[role][s]) for s in dict.fromkeys((contract.rows, *free_symbols(contract)))),
            tuple((a, t.type(facts[role][a])) for a, t in contract.attributes.items()),
            ((first_one, kind),) if first_one else (),
            batch=(case.batch or "drafts") * batch,
            block_size=(case.block_size or 64) * batch,
            seed=case.seed,
        )
    return {role: replace(case, seq="") if known[role] is case.contract else made for role, made in found.items()}


def _usual(values: Sequence[Any]) -> Any:
    """Of the values that a contract lists the smallest size of at least 8, or the first of anything else."""
    return min(values, key=lambda v: (v < 8, v)) if all(type(v) is int for v in values) else values[0]
