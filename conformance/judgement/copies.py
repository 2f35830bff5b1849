"""Judges a call whose rows and columns are copies of a few: one of each as any other call, and then every copy.

What depends on a few numbers of each kind (the ratio to an ideal chip, the direction of rounding) is asked of one copy of
each, which is a call of its own. That every number is within its budget, and every choice among the best, is asked of all.
Of rows that the reference does not compute, because a request has too many, it is asked that they are finite, that a choice
has the entries it must have, and that they do not depend on the other rows by more than any computed row's budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from porthal.conformance.cases.inputs import Array, Copies, Inputs, specified_rows, written_slots
from porthal.conformance.execution.outcome import Outcome, difference, differing, same_bits
from porthal.conformance.judgement.choices import Ids, ids_of, valid_ids
from porthal.conformance.judgement.golden import Golden, Spread
from porthal.conformance.judgement.judge import beside, check_form, check_kept, check_untouched, exactly_judged, judged
from porthal.conformance.level import BRING_UP, Level
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import Pages
from porthal.hal.dtypes import UNIT_ROUNDOFF, dtype, narrow, widen

PIECE = 2**18  # numbers that are compared at a time
Axes = Sequence[tuple[int, Array]]


@dataclass
class CopiesJudge:
    """Judges results of one call; raises Failed."""

    inputs: Inputs
    copies: Copies
    limit: Level
    tie: str

    @cached_property
    def golden(self) -> Golden:
        return Golden(self.copies.small)

    def __call__(self, outcome: Outcome) -> Judgement:
        check_form(self.inputs, outcome.results)
        check_kept(outcome)
        first = self.chosen({})
        small = self.small(outcome.results, first)
        judgement, spreads = self._one_of_each(outcome, first)
        same = self._choices(outcome, first)
        for key, spread in spreads.items():
            self._everywhere(outcome, key, spread, same, self._in_small_rows(small, key))
        self._exact(outcome, first, spreads)
        if change := difference(outcome.results, outcome.again):
            raise Failed("FAIL_NONDETERMINISTIC", f"{change} in another run on the same inputs")
        return judgement

    # -- one of each -------------------------------------------------------------------------------------------------

    def chosen(self, wanted: Mapping[str, Array]) -> dict[str, Array]:
        """Per symbol a copy of every place of the small call: one of those wanted, else the first or the last in turn."""
        found = {}
        for symbol, at in self.copies.at.items():
            places = np.flatnonzero(at >= 0)
            one = np.zeros(int(at.max(initial=-1)) + 1, np.int64)
            one[at[places]] = places  # the last of each that is assigned stays
            first = one.copy()
            first[at[places][::-1]] = places[::-1]
            one[::2] = first[::2]
            own = wanted.get(symbol, np.zeros(0, np.int64))
            one[at[own]] = own
            found[symbol] = one
        return found

    def _one_of_each(self, outcome: Outcome, chosen: Mapping[str, Array]) -> tuple[Judgement, Mapping[str, Spread]]:
        results = self.small(outcome.results, chosen)
        small = replace(outcome, results=results, again=results, moved={}, trespasses=())
        try:
            return judged(self.golden, small, self.limit, self.tie)
        except Failed as failed:
            raise Failed(**self._placed(failed.judgement, chosen)) from None

    def _placed(self, judgement: Judgement, chosen: Mapping[str, Array]) -> dict[str, Any]:
        """The judgement of the small call with its place in the large one."""
        name, _, at = judgement.at.rstrip("]").partition("[")
        dims = next((r.dims for r in self.inputs.contract.signature.results if r.name == name), ())
        places = [int(chosen[d][int(i)] if d in chosen else i) for d, i in zip(dims, at.split(", ")) if i]
        there = f"{name}{places}" if places else judgement.at
        message = judgement.message
        if judgement.at:
            message = message.replace(judgement.at, there, 1)
        return {**vars(judgement), "message": message, "at": there}

    def small(self, results: Mapping[str, Any], chosen: Mapping[str, Array]) -> dict[str, Any]:
        """The results of the small call, taken from these copies."""
        found: dict[str, Any] = {}
        small = self.copies.small
        for result in self.inputs.contract.signature.results:
            value, before = results[result.name], small.operands.get(result.name)
            axes = [(axis, chosen[dim]) for axis, dim in enumerate(result.dims) if dim in chosen]
            if isinstance(before, Pages):
                found[result.name] = {part: self._small_pages(before, part, array, chosen) for part, array in value.items()}
            elif isinstance(value, dict):
                found[result.name] = {part: _taken(array, axes[:1]) for part, array in value.items()}
            else:
                found[result.name] = _taken(value, axes)
        return found

    def _small_pages(self, before: Pages, part: str, array: Array, chosen: Mapping[str, Array]) -> Array:
        assert self.inputs.batch and self.copies.small.batch
        there, here = self.copies.small.batch.slots, self.inputs.batch.slots[chosen[self.inputs.contract.rows]]
        made = before.native[part].copy()
        made[there[there >= 0]] = array[here[there >= 0]]
        return made

    # -- every copy --------------------------------------------------------------------------------------------------

    def _choices(self, outcome: Outcome, first: Mapping[str, Array]) -> Array | None:
        """Judges choices that differ from those judged before; gives the rows that chose as the first copy did."""
        contract, rows = self.inputs.contract, self.inputs.contract.independent[0]
        if not contract.choice or rows not in self.copies.at:
            return None
        at = self.copies.at[rows]
        ids = ids_of(outcome.results[contract.choice], self.inputs, 0)
        ordered = np.sort(ids.ids, 1) if contract.signature[contract.choice].kind == "Selection" else ids.ids
        like = first[rows][np.maximum(at, 0)]
        same = (at < 0) | ((ordered == ordered[like]).all(1) & (ids.length == ids.length[like]))
        left = np.flatnonzero(~same)
        while left.size:
            _, newest = np.unique(at[left], return_index=True)
            self._one_of_each(outcome, self.chosen({rows: left[newest]}))
            left = np.delete(left, newest)
        if (unknown := np.flatnonzero(at < 0)).size:
            self._has_entries(ids, unknown)
        return same

    def _has_entries(self, ids: Ids, rows: Array) -> None:
        """Rows of a selection that are not computed have distinct positions, as many as they must have."""
        batch, contract = self.inputs.batch, self.inputs.contract
        if batch is None or contract.signature[contract.choice].kind != "Selection":
            return
        expected = np.minimum(batch.visible, ids.ids.shape[1])
        for t in rows:
            what = f"{contract.choice} row {t}"
            valid_ids(what, ids.ids[t], int(ids.length[t]), int(expected[t]), int(batch.visible[t]))

    def _everywhere(
        self, outcome: Outcome, key: str, spread: Spread, same: Array | None, judged: Array
    ) -> None:
        """Every number of a float result is within its budget; where it depends on a choice, in rows of the same choice. What
        has the bits of what was `judged` of each need not be judged again."""
        y, axes, spread = self._by_rows(outcome.results, key, spread)
        moved = self._by_rows(outcome.moved, key, spread)[0] if outcome.moved else y
        if not axes or not y.size:
            return
        exact = exactly_judged(self.copies.small, spread.value)
        whole = Spread(*(np.broadcast_to(part, spread.value.shape) for part in (spread.value, spread.sigma, spread.most)))
        others = [(axis, places) for axis, places in axes if axis]
        for rows, here in _pieces(y, axes):
            if same is not None:
                rows, here = rows[same[rows]], here[same[rows]]
            got = y[rows]
            if same_bits(got, _taken(judged[here], others)):
                continue
            g = Spread(*(_taken(part[here], others) for part in (whole.value, whole.sigma, whole.most)))
            if exact:
                wanted = narrow(g.value, dtype(y))
                if (wrong := differing(got, wanted) if self.inputs.contract.exact else got != wanted).any():
                    where = _first(wrong)
                    place = [int(rows[where[0]]), *where[1:]]
                    what = f"{key}{place} is {got[tuple(where)]}, expected exactly {wanted[tuple(where)]}"
                    raise Failed("FAIL_VALUE", what, at=f"{key}{place}")
                continue
            true, wide, _, over = beside(f"{key} from row {rows[0] if rows.size else 0} on: ", got, g, self.limit)
            if (over > self.limit.pointwise).any():
                where = _first(over == over.max())
                place, worst = [int(rows[where[0]]), *where[1:]], float(over.max())
                raise Failed(
                    "FAIL_VALUE",
                    f"{key}{place} is {wide[tuple(where)]:.9g}, expected {true[tuple(where)]:.9g}: off by {worst:.3g} times "
                    f"its error budget, permitted is {self.limit.pointwise:g}",
                    worst=worst,
                    at=f"{key}{place}",
                )
        self._elsewhere(key, y, moved, axes, spread)

    def _elsewhere(self, key: str, y: Array, moved: Array, axes: Axes, spread: Spread) -> None:
        """Rows that are not computed are finite, and hardly depend on the others."""
        unknown = np.flatnonzero(next((places for axis, places in axes if axis == 0), np.zeros(0)) < 0)
        if not unknown.size or specified_rows(self.inputs) is not None or not np.isfinite(spread.value).all():
            return
        slack = 4 * self.limit.pointwise * float(spread.most.max(initial=0))
        u = UNIT_ROUNDOFF[dtype(y)]
        for at in range(0, len(unknown), step := max(1, PIECE // max(y[0].size, 1))):
            part = unknown[at : at + step]
            got, other = widen(y[part]), widen(moved[part])
            if not np.isfinite(got).all():
                where = _first(~np.isfinite(got))
                place = [int(part[where[0]]), *where[1:]]
                raise Failed("FAIL_VALUE", f"{key}{place} is {got[tuple(where)]}, expected a number", at=f"{key}{place}")
            off = np.abs(got - other) - 4 * u * np.maximum(np.abs(got), np.abs(other)) - slack
            if (off > 0).any():
                where = _first(off > 0)
                what = f"{key}{[int(part[where[0]]), *where[1:]]} is {got[tuple(where)]:.9g}, and {other[tuple(where)]:.9g}"
                raise Failed("FAIL_VALUE", f"{what} among other rows")

    def _by_rows(self, results: Mapping[str, Any], key: str, spread: Spread) -> tuple[Array, Axes, Spread]:
        """A float result whose first axis are rows: of a cache those that are written, in their order."""
        name, _, part = key.partition(".")
        result = next(r for r in self.inputs.contract.signature.results if r.name == name)
        at = self.copies.at
        if not part:
            y = results[name][: specified_rows(self.inputs)]
            axes = [(axis, at[dim]) for axis, dim in enumerate(result.dims) if dim in at]
            return y, [(axis, places[: y.shape[axis]]) for axis, places in axes], spread
        assert self.inputs.batch and self.copies.small.batch
        check_untouched(self.inputs, key, results[name][part])
        slots, small = self.inputs.batch.slots, self.copies.small.batch.slots
        written = slots >= 0
        places = np.full(len(small), -1)
        places[np.flatnonzero(small >= 0)] = np.argsort(np.argsort(small[small >= 0]))
        rows = at[self.inputs.contract.rows][written]
        return results[name][part][slots[written]], [(0, np.where(rows >= 0, places[rows], -1))], spread

    def _in_small_rows(self, small: Mapping[str, Any], key: str) -> Array:
        """A float result of the small call: of a cache the slots that are written, as in its spread."""
        name, _, part = key.partition(".")
        if not part:
            return np.asarray(small[name])
        return np.asarray(small[name][part][written_slots(self.copies.small, self.copies.small.operands[name])])

    def _exact(self, outcome: Outcome, first: Mapping[str, Array], spreads: Mapping[str, Spread]) -> None:
        """Integers that are no choice: every copy is the same."""
        for result in self.inputs.contract.signature.results:
            value = outcome.results[result.name]
            rows = next(iter(result.dims), "")
            if rows not in first or result.mutated or result.name in (self.inputs.contract.choice, *spreads):
                continue
            at = self.copies.at[rows]
            like = first[rows][np.maximum(at, 0)]
            for part, array in value.items() if isinstance(value, dict) else [("", value)]:
                wrong = (array != array[like]).reshape(len(array), -1).any(1) & (at >= 0)
                if wrong.any():
                    t, what = int(np.argmax(wrong)), f"{result.name}{'.' * bool(part)}{part}"
                    raise Failed("FAIL_VALUE", f"{what}[{t}] is not what {what}[{like[t]}] is, though the rows are the same")


def one_of_each(inputs: Inputs, results: Mapping[str, Any]) -> dict[str, Any]:
    """The results of the small call, taken from those of a call made of its copies."""
    assert inputs.copies
    judge = CopiesJudge(inputs, inputs.copies, BRING_UP, "lowest")
    return judge.small(results, judge.chosen({}))


def _taken(array: Array, axes: Axes) -> Array:
    for axis, places in axes:
        array = array.take(places, axis)
    return array


def _first(mask: Array) -> list[int]:
    return [int(i[0]) for i in np.nonzero(mask)]


def _pieces(y: Array, axes: Axes) -> Iterator[tuple[Array, Array]]:
    """Some rows of a result at a time, with those of the small call that they copy; rows without are left out."""
    rows = np.arange(len(y))
    for axis, places in axes:
        if axis == 0:
            rows = np.flatnonzero(places >= 0)
    lead = next((places for axis, places in axes if axis == 0), None)
    for at in range(0, len(rows), step := max(1, PIECE // max(y[0].size if len(y) else 1, 1))):
        part = rows[at : at + step]
        yield part, part if lead is None else lead[part]
