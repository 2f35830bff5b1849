"""Discrete results: a choice is judged by the scores of what it chose, never by equality with the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from porthal.conformance.cases.inputs import Array, Inputs
from porthal.conformance.cases.values import TIED
from porthal.conformance.judgement.golden import Golden
from porthal.conformance.level import Level
from porthal.conformance.verdicts import Failed
from porthal.hal import Operand
from porthal.hal.dtypes import UNIT_ROUNDOFF, is_float

LISTED = 8  # ids of a choice that a message shows
U_SINGLE = UNIT_ROUNDOFF["float32"]


@dataclass(frozen=True)
class Ids:
    """A choice as rows: ids [rows, k], how many of each row are valid, and how many candidates each row has."""

    ids: Array
    length: Array
    candidates: Array


def judge_top(golden: Golden, chosen: Any, limit: Level, tie: str) -> str:
    """A top-k is valid, complete, and made of the highest scores within twice their budget; gives a note."""
    contract, inputs = golden.contract, golden.inputs
    name = contract.choice
    spread = None if contract.exact else golden.scores()
    scores = golden.call(contract.scores) if spread is None else spread.value
    value = np.where(np.isnan(scores), -np.inf, scores)
    budget = np.zeros(value.shape)
    if spread is not None:
        budget = limit.pointwise * (U_SINGLE * np.where(np.isfinite(value), np.abs(value), 0) + spread.most)
    best = ids_of(golden.results()[name], inputs, value.shape[1])
    got = ids_of(chosen, inputs, value.shape[1])
    by_construction = _exactly_scored(inputs)
    deviates = False
    same = (got.ids == best.ids).all(1) & (got.length == best.length)
    same |= _same_sets(got, best, ~same)
    for t in np.flatnonzero(~same):
        what = f"{name} row {t}{_attributes(inputs)}"
        row = valid_ids(what, got.ids[t], int(got.length[t]), int(best.length[t]), int(got.candidates[t]))
        if not len(row):
            continue
        wanted = best.ids[t, : len(row)].astype(np.int64)
        last = wanted[np.argmin(value[t, wanted])]
        _high(what, row, scores[t], budget[t], int(last), wanted)
        if by_construction and (odd := _misplaced(row, wanted, value[t], value[t, last])) is not None:
            if tie == "lowest":
                left = f"a lower position with an equal score was left out, expected {_listed(wanted)}"
                raise Failed("FAIL_VALUE", f"{what} chose {odd}; {left}")
            deviates = True
    return "the kernel declares its own order of ties" if deviates else ""


def _attributes(inputs: Inputs) -> str:
    """What decides how many are chosen and among which: the whole numbers among a call's attributes."""
    found = ", ".join(f"{name} = {v}" for name, v in inputs.attrs.items() if type(v) is int)
    return f" ({found})" if found else ""


def _listed(ids: Array) -> str:
    """The first ids of a choice."""
    return f"[{', '.join(map(str, ids[:LISTED]))}{', ...' if len(ids) > LISTED else ''}]"


def ids_of(chosen: Any, inputs: Inputs, columns: int) -> Ids:
    if isinstance(chosen, Operand):
        chosen = chosen.parts()
    if isinstance(chosen, dict):  # a selection
        assert inputs.batch is not None
        return Ids(chosen["indices"], chosen["length"], inputs.batch.visible)
    ids = chosen[:, None] if chosen.ndim == 1 else chosen
    return Ids(ids, np.full(len(ids), ids.shape[1]), np.full(len(ids), columns))


def _same_sets(got: Ids, best: Ids, asked: Array) -> Array:
    """Which of the rows asked about chose what the reference chose, in another order."""
    alike = asked & (got.length == best.length)
    at = np.flatnonzero(alike)
    beyond = np.arange(got.ids.shape[1]) >= got.length[at, None]
    ids, wanted = (np.sort(np.where(beyond, -1, x.ids[at]), axis=1) for x in (got, best))
    alike[at] = (ids == wanted).all(1) & (~beyond | (got.ids[at] == -1)).all(1)
    return alike


def other_ties(inputs: Inputs, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Where scores are exact, the first row that chose others in another call: "sel row 3 is [1, 2], then [1, 4]", or ""."""
    name = inputs.contract.choice
    if inputs.contract.admits or not _exactly_scored(inputs):
        return ""
    one, other = (ids_of(results[name], inputs, 0) for results in (first, second))
    same = (one.ids == other.ids).all(1)
    same |= _same_sets(other, one, ~same)
    for t in np.flatnonzero(~same):
        ids, others = (np.setdiff1d(a.ids[t], b.ids[t]) for a, b in ((one, other), (other, one)))
        return f"{name} row {t} has {_listed(ids)}, then {_listed(others)} in their place"
    return ""


def _exactly_scored(inputs: Inputs) -> bool:
    """Whether equal scores are equal in any order of summation: all their terms are zero, or all numbers are few and short."""
    found = [inputs.case.recipe(name) for name, kind in inputs.spec.dtypes.items() if is_float(kind)]
    return inputs.contract.exact or "zeros" in found or (not inputs.case.schemes and all(r in TIED for r in found))


def valid_ids(what: str, ids: Array, length: int, expected: int, candidates: int) -> Array:
    """The valid ids of a row: as many as expected, in range, distinct, followed by -1."""
    if length != expected:
        raise Failed("FAIL_VALUE", f"{what} has {length} entries, expected {expected}")
    row, tail = ids[:length].astype(np.int64), ids[length:]
    if (tail != -1).any():
        at = length + int(np.argmax(tail != -1))
        raise Failed("FAIL_VALUE", f"{what} holds {int(ids[at])} at index {at}, expected -1 from index {length} on")
    if ((row < 0) | (row >= candidates)).any():
        bad = int(row[(row < 0) | (row >= candidates)][0])
        raise Failed("FAIL_VALUE", f"{what} has {bad}, expected 0 to {candidates - 1}")
    if len(np.unique(row)) != length:
        raise Failed("FAIL_VALUE", f"{what} has an entry twice")
    return row


def _high(what: str, row: Array, scores: Array, budget: Array, last: int, wanted: Array) -> None:
    """Nothing chosen is clearly below the k-th score, nothing clearly above it is left out."""
    value = np.where(np.isnan(scores), -np.inf, scores)
    kth = value[last]
    slack = budget + budget[last]
    if not np.isneginf(kth) and (low := row[value[row] < kth - slack[row]]).size:
        bad = int(low[0])
        lowest = f"score {_shown(scores[bad])}, below the k-th score {kth:.9g}"
        raise Failed("FAIL_VALUE", f"{what} has {bad} with {lowest}, expected {_listed(wanted)}")
    lost = np.setdiff1d(np.nonzero(value > kth + slack)[0], row)
    if lost.size:
        bad = int(lost[0])
        highest = f"score {value[bad]:.9g}, above the k-th score {_shown(scores[last])}"
        raise Failed("FAIL_VALUE", f"{what} lacks {bad} with {highest}, expected {_listed(wanted)}")


def _shown(score: float) -> str:
    return f"{score:.9g}" + ", which counts as -inf" * bool(np.isnan(score))


def _misplaced(row: Array, wanted: Array, value: Array, kth: float) -> int | None:
    """One id taken from the ties at the k-th score where a lower one was left out, or None."""
    tied, lowest = row[value[row] == kth], wanted[value[wanted] == kth]
    odd = np.setdiff1d(tied, lowest)
    return int(odd[0]) if odd.size and len(tied) == len(lowest) else None


def judge_admitted(golden: Golden, chosen: Array, limit: Level) -> None:
    """Draws: the contract says which results are possible with probabilities off by a slack."""
    contract, operands, inputs = golden.contract, golden.operands, golden.inputs
    assert contract.admits is not None and contract.slack is not None
    name = contract.choice
    low, high = contract.bounds(name, inputs.spec)
    wrong = (chosen >= high) | (chosen < low)
    if wrong.any():
        raise Failed("FAIL_VALUE", f"{name} has {int(chosen[wrong][0])}, expected {low} to {high - 1}")
    slack = limit.pointwise * contract.slack(**operands)
    with np.errstate(all="ignore"):
        bad = contract.admits(*operands.values(), results=chosen, slack=slack, **inputs.attrs)
    if bad is not None:
        wanted = golden.results()[name][bad]
        raise Failed("FAIL_VALUE", f"{name} row {bad}{_attributes(inputs)} is {chosen[bad]}, the reference gives {wanted}")
