"""Whether results are what the contract says, within the error it permits: plain arrays in, a judgement out.

The budget of a float result is B = u |g| + 6 sigma + tiny: u the result's unit roundoff, g the float64 reference, sigma its
standard deviation over runs perturbed at the points where the reference says that a chip may round (without reductions
the sum over these points, where that is less). A result passes when |y - g| <= c B everywhere, when its energy is near
that of an ideal chip (g rounded once, plus sigma), and when its rounding has no preferred direction; where
the perturbed runs are far from this too, the limits rise with them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from porthal.conformance.cases.inputs import Array, Inputs, specified_rows, written_slots
from porthal.conformance.execution.outcome import Mutation, Outcome, difference, differing
from porthal.conformance.judgement.choices import judge_admitted, judge_top
from porthal.conformance.judgement.codes import coded, judge_codes
from porthal.conformance.judgement.golden import Golden, Spread
from porthal.conformance.judgement.measures import FEW, Measure, tiny
from porthal.conformance.level import Level
from porthal.conformance.verdicts import Failed, Judgement, Verdict
from porthal.hal import Operand, Pages, UsageError
from porthal.hal.dtypes import BLOCK, UNIT_ROUNDOFF, dtype, is_float, narrow, numpy_dtype, widen
from porthal.hal.errors import message_of
from porthal.hal.operands import KINDS
from porthal.hal.scheme import SCHEMES
from porthal.hal.signature import ARRAY

T = TypeVar("T")
RoundingRuns = Callable[[], Iterable[Array]]
ZERO = " is zero in {figure:.0%} of the places where it should not be"
# Per statistic, the verdict where it exceeds what is permitted, and the message.
MESSAGES: Mapping[str, tuple[Verdict, str]] = {
    "whole": ("FAIL_VALUE", ": the error is {figure:.2f} times that of an ideal chip, permitted is {most:.3g}"),
    "row": ("FAIL_VALUE", ": one row's error is {figure:.2f} times that of an ideal chip, permitted is {most:.3g}"),
    "direction": ("FAIL_VALUE", " is rounded {direction} zero: bias z = {figure:.1f}, permitted is {most:.3g}"),
    "column": ("FAIL_VALUE", " has the same error in all rows of a column: z = {figure:.1f}, permitted is {most:.3g}"),
    "zeros": ("UNTRUSTED", ZERO),
    "blanks": ("UNTRUSTED", ZERO),
}


# -- judgement -------------------------------------------------------------------------------------------------------


def check_kept(outcome: Outcome) -> None:
    """Raise Failed where something changed that the call may not change."""
    for trespass in outcome.trespasses:
        raise Failed("FAIL_MUTATED" if isinstance(trespass, Mutation) else "FAIL_WROTE_OUTSIDE", str(trespass))


def judged(golden: Golden, outcome: Outcome, limit: Level, tie: str) -> tuple[Judgement, Mapping[str, Spread]]:
    """The judgement, and what the float results were held to; raises Failed."""
    contract = golden.contract
    parts = check_form(golden.inputs, outcome.results)
    check_kept(outcome)
    spreads: Mapping[str, Spread] = {}
    note, runs = "", golden.rounding_runs
    if contract.admits:
        chosen = outcome.results[contract.choice]
        _as_read(golden, outcome.flushes, lambda read: judge_admitted(read, chosen, limit))
    elif contract.choice:
        chosen = outcome.results[contract.choice]
        note = _as_read(golden, outcome.flushes, lambda read: judge_top(read, chosen, limit, tie))
        if contract.finish:
            spreads = golden.spread(contract.finish, chosen)
            runs = partial(golden.rounding_runs, contract.finish, chosen)
    else:
        spreads = golden.exactly() if contract.exact else golden.spread()
    codes = {part.key: part for part in coded(golden.inputs, spreads)}
    elsewhere = {*spreads, *(key for part in codes.values() for key in part.keys)}
    if not contract.choice:
        for name in dict.fromkeys(part.partition(".")[0] for part in parts if part not in elsewhere):
            _judge_exact(name, outcome.results[name], golden.results()[name], elsewhere)
    figures = []
    for key, spread in spreads.items():
        if part := codes.get(key):
            for held in part.keys if isinstance(golden.inputs.operands.get(part.result), Pages) else ():
                check_untouched(golden.inputs, held, outcome.results[part.result][held.partition(".")[2]])
            figures.append(judge_codes(golden.inputs, part, outcome.results[part.result], spread, limit))
        else:
            figures.append(_judge_spread(golden, key, spread, outcome, limit, runs))
    _check_repeat(outcome)
    if not figures:
        return Judgement("PASS", note=note), spreads
    worst = max(figures, key=lambda f: f.worst)
    few = tuple(test for test in FEW if any(test in f.few for f in figures))
    z = max((f.z for f in figures), key=abs)
    return replace(worst, ratio=max(f.ratio for f in figures), z=z, few=few, note=note), spreads


def _as_read(golden: Golden, flushes: bool, judged: Callable[[Golden], T]) -> T:
    """What is judged of a choice, by the inputs or by what a chip that flushes denormals reads of them."""
    try:
        return judged(golden)
    except Failed:
        if not flushes:
            raise
        return judged(golden.flushed())


def check_form(inputs: Inputs, results: Mapping[str, Any]) -> list[str]:
    """The arrays of all results by name, each of which has the shape and dtype that the contract says; raises Failed."""
    found = []
    for result, shape, wanted in inputs.contract.results(inputs.spec):
        name, value = result.name, results.get(result.name)
        if result.kind == ARRAY:
            _check_array(name, value, shape, wanted)
            found.append(name)
            continue
        kind = KINDS[result.kind]
        if not isinstance(value, dict):
            raise Failed("FAIL_SHAPE", f"{name} is {type(value).__name__}, expected a {result.kind}")
        spec = inputs.operands[name].spec if result.mutated else kind.result_spec(shape, inputs.attrs)
        for part, form in kind.form(spec).items():
            _check_array(f"{name}.{part}", value.get(part), *form)
            found.append(f"{name}.{part}")
    return found


def _check_array(name: str, value: Any, shape: tuple[int, ...], wanted: str) -> None:
    if not isinstance(value, np.ndarray):
        raise Failed("FAIL_SHAPE", f"{name} is {type(value).__name__}, expected an array of {list(shape)}")
    if value.shape != shape:
        raise Failed("FAIL_SHAPE", f"{name} has shape {list(value.shape)}, expected {list(shape)}")
    if dtype(value) != wanted:
        raise Failed("FAIL_DTYPE", f"{name} is {dtype(value)}, expected {wanted}")


def _judge_exact(name: str, got: Any, expected: Any, elsewhere: Collection[str]) -> None:
    """Copies, integers and choices, which have one right answer; floats and codes are judged elsewhere."""
    if isinstance(expected, Operand):
        for part, array in expected.parts().items():
            _judge_exact(f"{name}.{part}", got[part], array, elsewhere)
    elif name not in elsewhere and not np.array_equal(got, expected):
        at = tuple(int(i[0]) for i in np.nonzero(got != expected))
        raise Failed("FAIL_VALUE", f"{name}{list(at)} is {got[at]}, expected {expected[at]}", at=f"{name}{list(at)}")


def _judge_spread(
    golden: Golden, key: str, spread: Spread, outcome: Outcome, limit: Level, runs: Callable[[], Iterable[Any]]
) -> Judgement:
    """One float result, or one part of an operand; in pages, slots that it must not write are compared bit for bit."""
    inputs = golden.inputs
    name, _, part = key.partition(".")
    got = outcome.results[name]
    if not part:
        rows = specified_rows(inputs)
        return judge_floats(inputs, key, got[:rows], spread[:rows], limit, lambda: (r[key][:rows] for r in runs()))
    before = inputs.operands.get(name)
    if not isinstance(before, Pages):
        return judge_floats(inputs, key, got[part], spread, limit, lambda: (r[key] for r in runs()))
    written = check_untouched(inputs, key, got[part])
    return judge_floats(inputs, key, got[part][written], spread, limit, lambda: (r[key] for r in runs()))


def check_untouched(inputs: Inputs, key: str, got: Array) -> Array:
    """The slots of a mutated cache that the call may write; raises Failed where it changed another."""
    name, _, part = key.partition(".")
    before = inputs.operands[name]
    written = written_slots(inputs, before)
    old, word = before.native[part], f"u{got.itemsize}"
    other = np.flatnonzero((got.view(word) != old.view(word)).any(-1) & ~written)
    touched = other[differing(got[other], old[other]).any(-1)]
    if touched.size:
        slot = int(touched[0])
        raise Failed("FAIL_WROTE_OUTSIDE", f"{key} slot {slot} changed, though the call does not write it")
    return written


def judge_floats(
    inputs: Inputs, name: str, y: Array, spread: Spread, limit: Level, runs: RoundingRuns = lambda: ()
) -> Judgement:
    """One array of floats against its reference; raises Failed. `runs` gives results of the reference that round where the
    contract permits: it is called only where a statistic is too high."""
    kind, g = dtype(y), spread.value
    if not y.size:
        return Judgement("PASS")
    if exactly_judged(inputs, g):
        rounded = narrow(g, kind)
        differs = differing(y, rounded) if inputs.contract.exact else y != rounded
        if differs.any():
            first = _first(differs)
            what = f"{name}{first} is {y[tuple(first)]}, expected exactly {rounded[tuple(first)]}"
            raise Failed("FAIL_VALUE", what, at=f"{name}{first}")
        return Judgement("PASS", at=name)
    g, wide, ideal, over = beside(name, y, spread, limit)
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
        found |= {"zeros": 0.0, "blanks": 0.0, "column": 0.0}
    if any(abs(found[test]) > permitted[test] for test in found):
        finite = np.isfinite(widen(y)) & np.isfinite(spread.value)
        others = [measure(np.where(finite & np.isfinite(m), m, g)) for m in (widen(narrow(m, kind)) for m in runs())]
        permitted = measure.limits(limit, others)
    figures |= {"ratio": max(found.get("whole", 0.0), found.get("row", 0.0)), "z": found.get("direction", 0.0)}
    figures["few"] = tuple(test for test in FEW if test not in found)
    for test, figure in found.items():
        if abs(figure) > permitted[test]:
            verdict, message = MESSAGES[test]
            direction = "away from" if figure > 0 else "toward"
            message = message.format(figure=abs(figure), most=permitted[test], direction=direction)
            raise Failed(verdict, name + message, **figures)
    return Judgement("PASS", **figures)


def beside(name: str, y: Array, spread: Spread, limit: Level) -> tuple[Array, Array, Array, Array]:
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
    return tuple(x.reshape(y.shape) for x in (g, wide, ideal, over))


def budget(spread: Spread, kind: str) -> Array:
    """B, element by element, of a result in the dtype `kind`."""
    return UNIT_ROUNDOFF[kind] * np.abs(spread.value) + spread.most + tiny(kind)


def exactly_judged(inputs: Inputs, g: Array) -> bool:
    """Whether a float result has one right answer."""
    exact = inputs.contract.exact
    if isinstance(exact, str):
        exact = inputs.attrs[exact] == inputs.contract.attributes[exact].default
    return exact or _exact_data(inputs, g)


def _exact_data(inputs: Inputs, g: Array) -> bool:
    """Sums of products of small integers have one answer, which float32 holds."""
    chosen = {inputs.case.recipe(n) for n, v in inputs.operands.items() if _is_float_operand(v)}
    scaled = any(isinstance(v, float) or v in SCHEMES for v in inputs.attrs.values())
    return chosen == {"integer"} and not scaled and bool(((g == np.rint(g)) & (np.abs(g) < 2**24)).all())


def _is_float_operand(value: Any) -> bool:
    if isinstance(value, Operand):
        return value.typed
    return isinstance(value, np.ndarray) and is_float(dtype(value))


def _check_special(
    name: str, y: Array, g: Array, slack: Array, kind: str, shape: tuple[int, ...], first: int
) -> None:
    """NaN where the reference has one and nowhere else; infinities likewise, and where rounding may overflow. The
    elements are those from `first` on of an array of this shape."""
    overflows = np.sign(y) * g + slack >= largest(kind)  # on the other side, too, where so much cancels
    infinite = np.where(np.isinf(g), y != g, np.isinf(y) & ~overflows)
    wrong = np.where(np.isnan(g) | np.isnan(y), np.isnan(y) != np.isnan(g), infinite)
    if wrong.any():
        n = int(np.argmax(wrong))
        at = [int(i) for i in np.unravel_index(first + n, shape)]
        left = "; perhaps it was never written" if np.isnan(y[n]) else ""
        raise Failed("FAIL_VALUE", f"{name}{at} is {y[n]}, expected {g[n]:.9g}{left}", at=f"{name}{at}")


def _check_repeat(outcome: Outcome) -> None:
    if change := difference(outcome.results, outcome.again):
        raise Failed("FAIL_NONDETERMINISTIC", f"{change} in another run on the same inputs")


def largest(kind: str) -> float:
    """The largest finite number of a dtype."""
    x = np.array(np.inf, numpy_dtype(kind))
    return float(np.nextafter(x, np.array(0, x.dtype)))


def _first(mask: Array) -> list[int]:
    return [int(i[0]) for i in np.nonzero(mask)]


# -- deliberate mistakes ---------------------------------------------------------------------------------------------


def judge_refusal(inputs: Inputs, error: BaseException | None) -> Judgement:
    """Whether a checked call answered the case's mistake with one sentence that names the op."""
    op, fault = inputs.contract.name, inputs.case.fault
    if error is None:
        return Judgement("FAIL_ERROR", f"a wrong {fault} was accepted, expected a UsageError")
    if not isinstance(error, UsageError):
        return Judgement("FAIL_ERROR", f"a wrong {fault} raised {message_of(error)}, expected a UsageError")
    text = str(error)
    if "\n" in text or op not in text:
        return Judgement("FAIL_ERROR", f"the message {text!r} is not one sentence that names {op}")
    return Judgement("PASS", note=text)
