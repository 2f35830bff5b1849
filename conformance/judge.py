"""Whether results are what the contract says, within the error it permits: plain arrays in, a judgement out.

The budget of a float result is B = u |g| + 6 sigma + tiny: u the result's unit roundoff, g the float64 reference, sigma its
standard deviation over runs perturbed at the points where the reference says that a chip may round (without reductions
the sum over these points, where that is less). A result passes when |y - g| <= c B everywhere, when its energy is near
that of an ideal machine (g rounded once, plus sigma), and when its rounding has no preferred direction: no more, in both,
than the perturbed runs themselves where these stand out as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from porthal.conformance.choices import judge_admitted, judge_top
from porthal.conformance.golden import Golden, Spread
from porthal.conformance.inputs import Array, Inputs, specified_rows, written_slots
from porthal.conformance.measures import Measure, tiny
from porthal.conformance.verdicts import STRICTNESS, Failed, Judgement, Strictness, Verdict
from porthal.hal import Pages, Rows, Selection, Weight
from porthal.hal.dtypes import BLOCK, UNIT_ROUNDOFF, dtype, is_float, narrow, numpy_dtype, widen

Machines = Callable[[], Iterable[Array]]
TO = {True: "away from", False: "toward"}
ZERO = " is zero in {0:.0%} of the places where it should not be"
TOLD = {  # figure, what is permitted, direction
    "whole": ": the error is {0:.2f} times an ideal machine's, permitted is {1:.3g}",
    "row": ": the error of one row is {0:.2f} times an ideal machine's, permitted is {1:.3g}",
    "direction": " is rounded {2} zero: bias z = {0:.1f}, permitted is {1:.3g}",
    "column": " errs alike in all rows, column by column: z = {0:.1f}, permitted is {1:.3g}",
    "zeros": ZERO,
    "blanks": ZERO,
}


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
    spreads, note, machines = {}, "", golden.machines
    if contract.admits:
        judge_admitted(golden, outcome.results[contract.choice or ""], limit)
    elif contract.choice:
        chosen = outcome.results[contract.choice]
        note = judge_top(golden, chosen, limit, tie)
        if contract.finish:
            spreads = golden.spread(contract.finish, chosen)
            machines = partial(golden.machines, contract.finish, chosen)
    else:
        spreads = golden.exactly() if contract.exact else golden.spread()
        for result in contract.signature.results:
            if result.kind != "Pages" and result.name not in spreads:
                _judge_exact(result.name, outcome.results[result.name], golden.results()[result.name])
    figures = []
    for key, spread in spreads.items():
        figures.append(_judge_spread(golden, key, spread, outcome, limit, machines))
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


def _judge_spread(
    golden: Golden, key: str, spread: Spread, outcome: Outcome, limit: Strictness, machines: Callable[[], Iterable[Any]]
) -> Judgement:
    """One float result, or one field of mutated pages: untouched slots bit for bit first."""
    inputs = golden.inputs
    name, _, part = key.partition(".")
    got = outcome.results[name]
    if not part:
        rows = specified_rows(inputs, name)
        return judge_floats(inputs, key, got[:rows], spread[:rows], limit, lambda: (m[key][:rows] for m in machines()))
    before: Pages = inputs.operands[name]
    written = written_slots(inputs, before)
    touched = _differing(got[part], before.native[part]).any(-1) & ~written
    if touched.any():
        raise Failed("FAIL_WROTE_OUTSIDE", f"{key} slot {int(np.argmax(touched))} changed and is none that is written")
    return judge_floats(inputs, key, got[part][written], spread, limit, lambda: (m[key] for m in machines()))


def judge_floats(
    inputs: Inputs, name: str, y: Array, spread: Spread, limit: Strictness, machines: Machines = lambda: ()
) -> Judgement:
    """One array of floats against its reference; raises Failed. `machines` gives results of machines that round where the
    contract permits: it is asked where a statistic stands out."""
    kind, g = dtype(y), spread.value
    if not y.size:
        return Judgement("PASS")
    if exactly_judged(inputs, g):
        rounded = narrow(g, kind)
        differs = _differing(y, rounded) if inputs.contract.exact else y != rounded
        if differs.any():
            at = _first(differs)
            what = f"{name}{at} is {y[tuple(at)]}, expected exactly {rounded[tuple(at)]}"
            raise Failed("FAIL_VALUE", what, at=f"{name}{at}")
        return Judgement("PASS", at=name)
    g, wide, ideal, over = _beside(name, y, spread, limit)
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
    measure = Measure(g, ideal, spread.sigma, kind)
    found, permitted = measure(wide), measure.limits(limit)
    if "denormal" in dict(inputs.case.recipes).values():  # a chip may read these as zeros
        found |= {"zeros": 0.0, "blanks": 0.0}
    if any(abs(found[test]) > permitted[test] for test in found):
        finite = np.isfinite(widen(y)) & np.isfinite(spread.value)
        others = [measure(np.where(finite & np.isfinite(m), m, g)) for m in (widen(narrow(m, kind)) for m in machines())]
        permitted = measure.limits(limit, others)
    figures |= {"ratio": max(found["whole"], found["row"]), "z": found["direction"]}
    for test, figure in found.items():
        if abs(figure) > permitted[test]:
            verdict: Verdict = "UNTRUSTED" if TOLD[test] is ZERO else "FAIL_VALUE"
            raise Failed(verdict, f"{name}{TOLD[test].format(abs(figure), permitted[test], TO[figure > 0])}", **figures)
    return Judgement("PASS", **figures)


def _beside(name: str, y: Array, spread: Spread, limit: Strictness) -> tuple[Array, Array, Array, Array]:
    """The reference, the result and the reference rounded once, all in float64 and finite, and how far off the result is
    in units of its budget. Raises Failed where infinities or NaN are wrong."""
    kind = dtype(y)
    value, most, got = (np.ascontiguousarray(x).reshape(-1) for x in (spread.value, spread.most, y))
    g, wide, ideal, over = value, *(np.empty(y.size) for _ in range(3))
    for at in range(0, y.size, BLOCK):
        part = slice(at, at + BLOCK)
        true, found = value[part], widen(got[part])
        once = widen(narrow(true, kind))
        with np.errstate(invalid="ignore"):
            allowed = budget(Spread(true, most[part], most[part]), kind)
            finite = np.isfinite(found) & np.isfinite(true)
            if not finite.all():
                _check_special(name, found, true, limit.pointwise * allowed, kind, y.shape, at)
                g = value.copy() if g is value else g
                true, found, allowed = (np.where(finite, x, fill) for x, fill in ((true, 0.0), (found, 0.0), (allowed, 1.0)))
                g[part] = true
            if not np.isfinite(once).all():
                once = np.where(finite & np.isfinite(once), once, true)
        wide[part], ideal[part] = found, once
        found = np.abs(found - true)
        np.divide(found, allowed, out=over[part])
    return tuple(x.reshape(y.shape) for x in (g, wide, ideal, over))  # type: ignore[return-value]


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


def _check_special(
    name: str, y: Array, g: Array, slack: Array, kind: str, shape: tuple[int, ...], first: int
) -> None:
    """NaN where the reference has one and nowhere else; infinities likewise, and where rounding may overflow. Of an array
    of this shape these are the elements from the `first` on."""
    overflows = (np.abs(g) + slack >= largest(kind)) & (np.sign(y) == np.sign(g))
    infinite = np.where(np.isinf(g), y != g, np.isinf(y) & ~overflows)
    wrong = np.where(np.isnan(g) | np.isnan(y), np.isnan(y) != np.isnan(g), infinite)
    if wrong.any():
        n = int(np.argmax(wrong))
        at = [int(i) for i in np.unravel_index(first + n, shape)]
        left = ", or was never written" if np.isnan(y[n]) else ""
        raise Failed("FAIL_VALUE", f"{name}{at} is {y[n]}, expected {g[n]:.9g}{left}", at=f"{name}{at}")


# -- small words -----------------------------------------------------------------------------------------------------


def bits(x: Array) -> Array:
    """An array's bits, all NaN alike."""
    x = np.ascontiguousarray(x)
    if not is_float(dtype(x)):
        return x
    found = x.view(f"u{x.dtype.itemsize}").copy()
    found[np.isnan(x)] = np.array(np.nan, x.dtype).view(found.dtype)
    return found


def _differing(a: Array, b: Array) -> Array:
    """Where the bits differ, all NaN alike."""
    return np.zeros(a.shape, bool) if same_bits(a, b) else bits(a) != bits(b)


def same_bits(a: Array, b: Array) -> bool:
    """Whether arrays of one shape and dtype have the same bits throughout, of NaN as well."""
    return bool((a.view(f"u{a.dtype.itemsize}") == b.view(f"u{b.dtype.itemsize}")).all()) if a.dtype == b.dtype else False


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
            if not same_bits(a, b) and (differs := bits(a) != bits(b)).any():
                at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differs)), differs.shape))
                return f"{what}{list(at)} is {a[at]}, then {b[at]}"
    return ""


def largest(kind: str) -> float:
    x = np.array(np.inf, numpy_dtype(kind))
    return float(np.nextafter(x, np.array(0, x.dtype)))


def _first(mask: Array) -> list[int]:
    return [int(i[0]) for i in np.nonzero(mask)]
