"""Whether results are what the contract says, within the error it permits: plain arrays in, a judgement out.

The budget of a float result is B = u |g| + 6 sigma + tiny: u the result's unit roundoff, g the float64 reference, sigma its
standard deviation over runs perturbed at the points where the reference says that a chip may round (without reductions
the sum over these points, where that is less). A result passes when |y - g| <= c B everywhere, when its energy is near
that of an ideal machine (g rounded once, plus sigma), and when its rounding has no preferred direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from porthal.conformance.cases import rows_symbol
from porthal.conformance.choices import judge_admitted, judge_top
from porthal.conformance.golden import Golden, Spread
from porthal.conformance.inputs import Array, Inputs, specified_rows, written_slots
from porthal.conformance.verdicts import STRICTNESS, Failed, Judgement, Strictness
from porthal.hal import Pages, Rows, Selection, Weight
from porthal.hal.dtypes import UNIT_ROUNDOFF, dtype, is_float, narrow, numpy_dtype, widen

BIAS = 6.0  # |z| of the rounding direction and of a column's error, rows as samples
LEAN = 0.25  # mean rounding direction in 16 bits, below which it is none
STEADY = 0.1  # mean error of a column in unit roundoffs, below which it is none: a rounded parameter has 0.2
ZEROS = 0.1  # share of results that may be zero where the reference is not
SAMPLES = 16  # different rows from which a direction of rounding can be told


@dataclass(frozen=True)
class Outcome:
    """What execution brought back: results in logical form by name, and what changed that must not.

    again      another run's results: the first that differ, where any do
    moved      results of the call among other rows (see `invariance`), where there is such a call
    invariant  whether the kernel declares that these are the same bits
    """

    results: Mapping[str, Any] = field(default_factory=dict)
    again: Mapping[str, Any] = field(default_factory=dict)
    trespasses: tuple[str, ...] = ()
    error: str = ""
    moved: Mapping[str, Any] = field(default_factory=dict)
    invariant: bool = False


# -- judgement -------------------------------------------------------------------------------------------------------


def judge(inputs: Inputs, outcome: Outcome, level: str = "bring-up", tie: str = "lowest") -> Judgement:
    """Compare what a kernel did with what the contract says; `tie` is the kernel's declared order of ties."""
    if outcome.error:
        return Judgement("FAIL_ERROR", outcome.error)
    golden, limit = Golden(inputs), STRICTNESS[level]
    try:
        judgement = _judged(golden, outcome, limit, tie)
        _check_moved(golden, outcome, limit, tie)
        return judgement
    except Failed as failed:
        return failed.judgement


def _check_moved(golden: Golden, outcome: Outcome, limit: Strictness, tie: str) -> None:
    """Results of the same rows among others: other bits may do, if they are as good."""
    if not outcome.moved or not (change := difference(outcome.results, outcome.moved)):
        return
    if outcome.invariant:
        raise Failed("FAIL_VALUE", f"{change} among other rows, though the kernel declares that its results do not change")
    try:
        _judged(golden, Outcome(outcome.moved, outcome.moved), limit, tie)
    except Failed as failed:
        told = f"among other rows, one of them poisoned: {failed.judgement.message}"
        raise Failed(**vars(replace(failed.judgement, message=told))) from None


def _judged(golden: Golden, outcome: Outcome, limit: Strictness, tie: str) -> Judgement:
    inputs, contract = golden.inputs, golden.contract
    for name, (shape, wanted) in golden.shapes.items():
        _check_form(name, outcome.results.get(name), shape, wanted, inputs)
    if outcome.trespasses:
        raise Failed("FAIL_WROTE_OUTSIDE", outcome.trespasses[0])
    spreads, note = {}, ""
    if contract.admits:
        judge_admitted(golden, outcome.results[contract.choice or ""], limit)
    elif contract.choice:
        chosen = outcome.results[contract.choice]
        note = judge_top(golden, chosen, limit, tie)
        spreads = golden.spread(contract.finish, chosen) if contract.finish else {}
    else:
        spreads = golden.exactly() if contract.exact else golden.spread()
        for result in contract.signature.results:
            if result.kind != "Pages" and result.name not in spreads:
                _judge_exact(result.name, outcome.results[result.name], golden.results()[result.name])
    figures = []
    for key, spread in spreads.items():
        figures.append(_judge_spread(golden, key, spread, outcome, limit))
    _check_repeat(outcome)
    if not figures:
        return Judgement("PASS", note=note)
    worst = max(figures, key=lambda f: f.worst)
    return replace(worst, ratio=max(f.ratio for f in figures), z=max((f.z for f in figures), key=abs), note=note)


def _check_form(name: str, value: Any, shape: tuple[int, ...], wanted: str, inputs: Inputs) -> None:
    if isinstance(value, dict):  # pages
        before = inputs.operands[name]
        for f, width in before.spec.fields:
            _check_form(f"{name}.{f}", value.get(f), (before.spec.slots, width), before.spec.dtype, inputs)
    elif isinstance(value, Rows):
        _check_form(f"{name}.indices", value.indices, shape, "int32", inputs)
        _check_form(f"{name}.length", value.length, shape[:1], "int32", inputs)
    elif not isinstance(value, np.ndarray):
        raise Failed("FAIL_SHAPE", f"{name} is {type(value).__name__}, expected an array of {list(shape)}")
    elif value.shape != shape:
        raise Failed("FAIL_SHAPE", f"{name} has shape {list(value.shape)}, expected {list(shape)}")
    elif dtype(value) != wanted:
        raise Failed("FAIL_DTYPE", f"{name} is {dtype(value)}, expected {wanted}")


def _judge_exact(name: str, got: Any, expected: Any) -> None:
    if isinstance(expected, Selection):
        expected = expected.native
    if isinstance(expected, Rows):
        for part, a, b in zip(Rows._fields, got, expected):
            _judge_exact(f"{name}.{part}", a, b)
        return
    if np.array_equal(got, expected):
        return
    at = tuple(int(i[0]) for i in np.nonzero(got != expected))
    raise Failed("FAIL_VALUE", f"{name}{list(at)} is {got[at]}, expected {expected[at]}", at=f"{name}{list(at)}")


def _judge_spread(golden: Golden, key: str, spread: Spread, outcome: Outcome, limit: Strictness) -> Judgement:
    """One float result, or one field of mutated pages: untouched slots bit for bit first."""
    inputs = golden.inputs
    name, _, part = key.partition(".")
    got = outcome.results[name]
    if not part:
        rows = specified_rows(inputs, name)
        return judge_floats(inputs, key, got[:rows], spread[:rows], limit)
    before: Pages = inputs.operands[name]
    written = written_slots(inputs, before)
    touched = (bits(got[part]) != bits(before.native[part])).any(-1) & ~written
    if touched.any():
        raise Failed("FAIL_WROTE_OUTSIDE", f"{key} slot {int(np.argmax(touched))} changed and is none that is written")
    return judge_floats(inputs, key, got[part][written], spread[written], limit)


def judge_floats(inputs: Inputs, name: str, y: Array, spread: Spread, limit: Strictness) -> Judgement:
    """One array of floats against its reference; raises Failed."""
    kind, g = dtype(y), spread.value
    rounded = narrow(g, kind)
    if not y.size:
        return Judgement("PASS")
    if exactly_judged(inputs, g):
        differs = bits(y) != bits(rounded) if inputs.contract.exact else y != rounded
        if differs.any():
            at = _first(differs)
            what = f"{name}{at} is {y[tuple(at)]}, expected exactly {rounded[tuple(at)]}"
            raise Failed("FAIL_VALUE", what, at=f"{name}{at}")
        return Judgement("PASS", at=name)
    wide, ideal = widen(y), widen(rounded)
    with np.errstate(invalid="ignore"):
        allowed = budget(spread, kind)
        _check_special(name, wide, g, limit.pointwise * allowed, kind)
    finite = np.isfinite(wide) & np.isfinite(g)
    g, wide, allowed = (np.where(finite, x, fill) for x, fill in ((g, 0.0), (wide, 0.0), (allowed, 1.0)))
    ideal = np.where(finite & np.isfinite(ideal), ideal, g)
    over = np.abs(wide - g) / allowed
    at = np.unravel_index(int(np.argmax(over)), over.shape)
    where = f"{name}{[int(i) for i in at]}"
    figures: dict[str, Any] = {"worst": float(over[at]), "at": where}
    if over[at] > limit.pointwise:
        raise Failed(
            "FAIL_VALUE",
            f"{where} is {wide[at]:.9g}, expected {g[at]:.9g}: off by {over[at]:.3g} times its error budget, "
            f"permitted is {limit.pointwise:g}",
            **figures,
        )
    granted = np.maximum((ideal - g) ** 2, (UNIT_ROUNDOFF[kind] * g / 3) ** 2) + spread.sigma**2 + tiny(kind) ** 2
    figures["ratio"], why = _ratio((wide - g) ** 2, granted, g, limit)
    if why:
        raise Failed("FAIL_VALUE", f"{name}: {why}", **figures)
    if not _rows_alike(inputs):
        figures["z"] = _bias(wide, ideal, g, spread.sigma, kind)
        if abs(figures["z"]) > BIAS:
            side = "away from" if figures["z"] > 0 else "toward"
            raise Failed("FAIL_VALUE", f"{name} is rounded {side} zero: bias z = {figures['z']:.1f}", **figures)
        if (z := _column_bias(wide, ideal, g, kind)) > BIAS:
            raise Failed("FAIL_VALUE", f"{name} errs alike in all rows, column by column: z = {z:.1f}", **figures)
    if (missing := _zeros(wide, ideal, spread.sigma, kind)) and "denormal" not in dict(inputs.case.recipes).values():
        raise Failed("UNTRUSTED", f"{name} is zero in {missing:.0%} of the places where it should not be", **figures)
    return Judgement("PASS", **figures)


def budget(spread: Spread, kind: str) -> Array:
    """B, element by element, of a result in the dtype `kind`."""
    return UNIT_ROUNDOFF[kind] * np.abs(spread.value) + spread.most + tiny(kind)


def exactly_judged(inputs: Inputs, g: Array) -> bool:
    """Whether a float result has one right answer."""
    return inputs.contract.exact or _exact_data(inputs, g)


def _exact_data(inputs: Inputs, g: Array) -> bool:
    """Sums of products of small integers have one answer, which float32 holds."""
    chosen = {inputs.case.recipe(n) for n, v in inputs.operands.items() if _is_float_operand(v)}
    scaled = any(isinstance(v, float) for v in inputs.attrs.values())
    return chosen == {"integer"} and not scaled and bool(((g == np.rint(g)) & (np.abs(g) < 2**24)).all())


def _is_float_operand(value: Any) -> bool:
    if isinstance(value, (Weight, Pages)):
        return True
    return isinstance(value, np.ndarray) and is_float(dtype(value))


def _check_special(name: str, y: Array, g: Array, slack: Array, kind: str) -> None:
    """NaN where the reference has one and nowhere else; infinities likewise, and where rounding may overflow."""
    overflows = (np.abs(g) + slack >= largest(kind)) & (np.sign(y) == np.sign(g))
    infinite = np.where(np.isinf(g), y != g, np.isinf(y) & ~overflows)
    wrong = np.where(np.isnan(g) | np.isnan(y), np.isnan(y) != np.isnan(g), infinite)
    if wrong.any():
        at = _first(wrong)
        left = ", or was never written" if np.isnan(y[tuple(at)]) else ""
        raise Failed("FAIL_VALUE", f"{name}{at} is {y[tuple(at)]}, expected {g[tuple(at)]:.9g}{left}", at=f"{name}{at}")


def _ratio(square: Array, granted: Array, g: Array, limit: Strictness) -> tuple[float, str]:
    """Error over that of an ideal machine, root mean square: of the whole, and of rows long enough to have one.

    What is granted is the ideal machine's own error, at least that of uniform rounding, plus the permitted deviation.
    Equal numbers are rounded alike, so only different ones make a mean: 128 in the whole, 32 in a row.
    """
    whole = float(np.sqrt(np.mean(square) / np.mean(granted)))
    if whole > limit.whole and _different(g) >= 128:
        return whole, f"the error is {whole:.2f} times an ideal machine's, permitted is {limit.whole:g}"
    if square.ndim > 1 and square.shape[-1] >= 64:
        rows = np.sqrt(np.mean(square, axis=-1) / np.mean(granted, axis=-1))
        for row in np.argwhere(rows > limit.row).tolist():
            if _different(g[tuple(row)]) >= 32:
                worst = float(rows[tuple(row)])
                return worst, f"the error of row {row} is {worst:.2f} times an ideal machine's, permitted is {limit.row:g}"
    return whole, ""


def _different(g: Array) -> int:
    """How many numbers float32 tells apart."""
    with np.errstate(over="ignore"):
        return len(np.unique(g.astype(np.float32)))


def _zeros(y: Array, ideal: Array, sigma: Array, kind: str) -> float:
    """The share of zeros where none should be, if that is more than ZEROS of what stands out of the permitted deviation,
    or half of what does not vanish beside it, as sums that cancel do."""
    for least, share in ((2.0, ZEROS), (2.0**-10, 0.5)):
        there = np.abs(ideal) > np.maximum(tiny(kind), sigma * least)
        missing = np.count_nonzero(there & (y == 0)) / max(np.count_nonzero(there), SAMPLES)
        if missing > share:
            return missing
    return 0.0


def _bias(y: Array, ideal: Array, g: Array, sigma: Array, kind: str) -> float:
    """z of the mean rounding direction beyond the ideal machine's own, different rows as samples, at least SAMPLES.

    In float32 it is 0 where anything but output rounding dominates: errors of a sum or a function lean to one side. In
    16 bits these are too small to matter, and permitted roundings inside lean to neither but for the few values that
    such an input has: a mean below LEAN counts as none (truncation has 1).
    """
    wide, at = kind == "float32", _samples(y)
    if len(at[0]) < SAMPLES or (wide and np.mean((ideal - g) ** 2) < 9 * np.mean(sigma**2)):
        return 0.0
    direction = np.sign(np.abs(y) - np.abs(g)) - np.sign(np.abs(ideal) - np.abs(g))
    direction[np.abs(g) < tiny(kind)] = 0  # may be flushed to zero
    if not wide:
        direction[np.abs(g) < 16 * sigma] = 0  # so near to zero any error leads away from it
    rows = direction.reshape(len(g), -1)[at].mean(-1)
    if not wide and abs(rows.mean()) < LEAN:
        return 0.0
    deviation = max(float(rows.std()), at[1].size ** -0.5)
    return float(rows.mean() / deviation * np.sqrt(len(rows)))


def _column_bias(y: Array, ideal: Array, g: Array, kind: str) -> float:
    """Root mean square over columns of z of each column's mean error beyond the ideal machine's, in 16 bits.

    A parameter that was rounded is wrong in the same way in every row; roundings of a row's own values are not.
    """
    if kind == "float32" or len((at := _samples(y))[0]) < 4 * SAMPLES:
        return 0.0
    step = UNIT_ROUNDOFF[kind] * np.maximum(np.abs(g), tiny(kind))
    error = ((np.abs(y) - np.abs(ideal)) / step).reshape(len(g), -1)[at]
    mean, deviation = error.mean(0), np.maximum(error.std(0), len(error) ** -0.5)
    if np.mean(mean**2) < STEADY**2:
        return 0.0
    return float(np.sqrt(np.mean((mean / deviation) ** 2) * len(error)))


def _rows_alike(inputs: Inputs) -> bool:
    """Whether every row is given the same numbers in one of its operands: then rows share what is made of them."""
    rows = rows_symbol(inputs.contract)
    given = [inputs.operands[o.name] for o in inputs.contract.signature.operands if o.kind == "array" and o.dims[:1] == (rows,)]
    return any(x is not None and is_float(dtype(x)) and not (x != x[:1]).any() for x in given)


def _samples(y: Array) -> tuple[Array, Array]:
    """Rows and columns, as an index, whose errors have nothing in common: one of each set of rows that begin alike, and
    the columns that vary from row to row; none where fewer than 64 do."""
    flat = y.reshape(len(y), -1) if y.ndim > 1 else y[:0, None]
    rows = np.unique(flat[:, :1], return_index=True)[1]
    columns = np.flatnonzero(flat[rows].std(0) > 0.5 * np.sqrt(np.mean(flat[rows] ** 2, 0))) if len(rows) > 1 else rows
    return np.ix_(rows if len(columns) >= 64 else rows[:0], columns)


# -- small words -----------------------------------------------------------------------------------------------------


def bits(x: Array) -> Array:
    """An array's bits, all NaN alike."""
    x = np.ascontiguousarray(x)
    if not is_float(dtype(x)):
        return x
    found = x.view(f"u{x.dtype.itemsize}").copy()
    found[np.isnan(x)] = np.array(np.nan, x.dtype).view(found.dtype)
    return found


def _check_repeat(outcome: Outcome) -> None:
    if change := difference(outcome.results, outcome.again):
        raise Failed("FAIL_NONDETERMINISTIC", f"{change} in another run on the same inputs")


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The first element whose bits differ: "y[3, 5] is 1.5, then 1.25"; "" where none does."""
    for name, one in first.items():
        other = second[name]
        if isinstance(one, Rows):
            one, other = one._asdict(), other._asdict()
        pairs = [(f"{name}.{part}", one[part], other[part]) for part in one] if isinstance(one, dict) else [(name, one, other)]
        for what, a, b in pairs:
            if a.shape != b.shape:
                return f"{what} has shape {list(a.shape)}, then {list(b.shape)}"
            if (differs := bits(a) != bits(b)).any():
                at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differs)), differs.shape))
                return f"{what}{list(at)} is {a[at]}, then {b[at]}"
    return ""


def tiny(kind: str) -> float:
    """Half the smallest step of float16; elsewhere the smallest normal number, below which chips may flush to zero."""
    return 2.0**-25 if kind == "float16" else 2.0**-126


def largest(kind: str) -> float:
    x = np.array(np.inf, numpy_dtype(kind))
    return float(np.nextafter(x, np.array(0, x.dtype)))


def _first(mask: Array) -> list[int]:
    return [int(i[0]) for i in np.nonzero(mask)]
