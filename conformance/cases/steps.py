"""What the steps of a program are called with: other values in the same shape, other batches, caches written anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import DECODING
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.inputs import Inputs, drawn
from porthal.conformance.cases.legal import refusal
from porthal.hal import Batch, Pages
from porthal.hal.contract import Contract


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


def otherwise(case: Case, batch: Batch) -> Iterator[tuple[str, Inputs]]:
    """The same call with another value of each attribute in turn, where that is legal and leaves the dims as they are."""
    for name, attribute in case.contract.attributes.items():
        given = dict(case.attrs)
        now = given.get(name, attribute.default)
        for value in case.contract.cases.get(name, ()):
            changed = replace(case, seq="", attrs=tuple({**given, name: attribute.type(value)}.items()))
            if value != now and not refusal(changed):
                yield f"{name}={value}", other(changed, 0, batch)
                break


def rearranged(batch: Batch) -> Batch:
    """Another batch of the same shape: the requests that decode in reverse, other pages in every table."""
    decoding = np.flatnonzero(batch.q_len <= DECODING)[::-1].tolist()
    order = [*decoding, *np.flatnonzero(batch.q_len > DECODING).tolist()]
    held = np.unique(batch.block_table[batch.block_table >= 0])
    pages = dict(zip(held.tolist(), held[::-1].tolist()))
    tables = [[pages[p] for p in batch.block_table[r].tolist() if p >= 0] for r in order]
    return Batch.build(batch.q_len[order].tolist(), batch.kv_len[order].tolist(), tables, batch.block_size)


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
    """The calls of the ops that `reuse` joins, in the sizes of its own op and the smallest of GLM-5's other dims."""
    sizes = {"N": 8, "C": 512, "R": 64, "G": 8, "D": 128, **dict(case.dims), **dict(case.attrs)}
    kind = next((d for _, d in case.dtypes), "float32")
    T, k, size, batch = sizes["T"], sizes["k"], case.block_size or 64, case.batch or "drafts"
    C, R = sizes["C"], sizes["R"]

    def made(op: str, dims: Mapping[str, int], attrs: Mapping[str, Any], kinds: Mapping[str, str]) -> Case:
        plain = tuple(dims.items()), tuple(attrs.items()), tuple(kinds.items())
        return Case(op, *plain, batch=batch, block_size=size, seed=case.seed)

    own = replace(case, seq="")
    found = {
        "kv_write": made("kv_write", {"T": T, "A": C, "B": R}, {}, {"pages": kind}),
        "indexer_topk": made(
            "indexer_topk", {"T": T, "G": sizes["G"], "D": sizes["D"]}, {"k": k, "scale": 2.0**-6}, {"iq": kind}
        ),
        "sparse_mla": made(
            "sparse_mla", {"T": T, "N": sizes["N"], "C": C, "R": R, "k": k}, {"scale": 0.0625}, {"q_latent": kind}
        ),
        "select_rows": Case("select_rows", (("T", T), ("k", k), ("M", 1)), seed=case.seed),
    }
    return {**found, **({case.op: own} if case.op != "select_rows" else {})}
