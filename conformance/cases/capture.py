"""Calls that are captured as a graph once and replayed with other values: what the replays of a captured case are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request, spelled
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.domain import options
from porthal.conformance.cases.inputs import Inputs
from porthal.hal import Batch, Pages
from porthal.hal.contract import Contract
from porthal.hal.dtypes import is_float
from porthal.hal.signature import ARRAY

REPLAYS, IDLE = 2, 3  # of any call, and of one with a batch the replay in which all is padding


def calls(case: Case) -> list[Inputs]:
    """The call that is captured, then those that are replayed, each with values of its own in the same memory.

    The captured one has the longest requests. In the first replay they are shorter and some are padding, of three the first; in
    the second these are real, all have grown, and a row of the last is another's; in the third, of a batch, all are padding.
    Weights, experts and what else there is are others in each.
    """
    captured = build(case)
    last = IDLE if captured.batch and not _as_wide_as_the_longest(case.contract) else REPLAYS
    found = [captured, *(build(_replayed(case, n, captured.batch)) for n in range(1, last + 1))]
    blocks = [value.spec.n_blocks for inputs in found for value in inputs.operands.values() if isinstance(value, Pages)]
    return [_with_pages(inputs, max(blocks)) for inputs in found] if blocks else found


def _replayed(case: Case, n: int, captured: Batch | None) -> Case:
    """An ordinary case: the same sizes, another seed, other requests, and of integers another kind."""
    requests = [*_requests(captured, n, _as_wide_as_the_longest(case.contract))] if captured else []
    recipes = dict(case.recipes)
    for operand in case.contract.signature.of_kind(ARRAY):
        if not is_float(case.dtype(operand.name)) and operand.name not in case.absent:
            known = options(case.contract, operand.name)
            recipes.setdefault(operand.name, known[n % len(known)])
    return replace(case, capture=False, seed=case.seed + n, batch=spelled(requests), recipes=tuple(recipes.items()))


def _requests(captured: Batch, n: int, kept: bool) -> Iterator[Request]:
    """Query rows and keys of each request of a replay; the longest is `kept` where an array is as wide as it."""
    longest = int(np.argmax(captured.kv_len)) if captured.R else 0
    q_lens, kv_lens = captured.q_len.tolist(), captured.kv_len.tolist()
    if n == REPLAYS and q_lens[-1] > 1 and kv_lens[0] > q_lens[0]:
        q_lens[0], q_lens[-1] = q_lens[0] + 1, q_lens[-1] - 1
    for r, (q, kv) in enumerate(zip(q_lens, kv_lens)):
        if n == IDLE:
            yield Request(q, 0)
        elif kept and r == longest:
            yield Request(q, kv)
        elif n == 1:
            yield Request(q, max(q, kv * (1 + r % 3) // 4) if kv and r % 3 != captured.R % 3 else 0)
        else:
            yield Request(q, kv or (q if q <= captured.max_kv else 0))


def _as_wide_as_the_longest(contract: Contract) -> bool:
    """Whether an operand or a result has a dim that counts the keys of the longest request."""
    [batch] = contract.signature.of_kind("Batch")
    others = (*contract.signature.operands, *contract.signature.results)
    return any(dim in batch.dims[2:] for o in others if o is not batch for dim in o.dims)


def _with_pages(inputs: Inputs, n_blocks: int) -> Inputs:
    """The call with pages behind those of each cache, which nothing reads."""
    operands = dict(inputs.operands)
    for name, value in operands.items():
        if isinstance(value, Pages):
            spec = replace(value.spec, n_blocks=n_blocks)
            behind = spec.slots - value.spec.slots
            padded = {f: np.concatenate([a, np.zeros((behind, a.shape[1]), a.dtype)]) for f, a in value.native.items()}
            operands[name] = Pages(spec, padded)
    return replace(inputs, operands=operands, spec=inputs.contract.spec(operands, inputs.attrs))
