"""Whether results are what the contract says, within the error it permits: plain arrays in, a judgement out.

The budget of a float result is B = u |g| + 6 sigma + tiny: u the result's unit roundoff, g the float64 reference, sigma its
standard deviation over runs perturbed at the points where the reference says that a chip may round (without reductions
the sum over these points, where that is less). A result passes
when |y - g| <= c B everywhere, when its energy is near that of an ideal machine (g rounded once, plus sigma), and when
its rounding has no preferred direction.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from porthal.conformance.inputs import Array, Inputs, specified_rows, written_slots
from porthal.conformance.values import TIED
from porthal.hal import Batch, Pages, Rows, Selection, Weight
from porthal.hal.dtypes import UNIT_ROUNDOFF, dtype, is_float, narrow, numpy_dtype, widen
from porthal.hal.numerics import Noise, noise

Verdict = Literal[
    "PASS",
    "FAIL_VALUE",
    "FAIL_SHAPE",
    "FAIL_DTYPE",
    "FAIL_ERROR",
    "FAIL_NONDETERMINISTIC",
    "FAIL_WROTE_OUTSIDE",
    "CRASH",
    "TIMEOUT",
    "UNTRUSTED",
    "NOT_JUDGED",
    "WAIVED",
    "UNCLAIMED",
]
RUNS = 8  # noisy runs of the reference behind one sigma
U_SINGLE = UNIT_ROUNDOFF["float32"]


@dataclass(frozen=True)
class Strictness:
    """pointwise: the factor c; whole, row: limits of the ratio to the ideal machine."""

    pointwise: float
    whole: float
    row: float


STRICTNESS = {
    "bring-up": Strictness(4, 4, 8),
    "standard": Strictness(2, 2, 4),
    "strict": Strictness(1, 1.25, 2),
}
BIAS = 6.0  # |z| of the rounding direction, rows as samples
ZEROS = 0.1  # share of results that may be zero where the reference is not


@dataclass(frozen=True)
class Outcome:
    """What execution brought back: results in logical form by name, a second run's, and what changed that must not."""

    results: Mapping[str, Any] = field(default_factory=dict)
    again: Mapping[str, Any] = field(default_factory=dict)
    trespasses: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Judgement:
    """`worst` is the largest |e| / B met (at `at`), `ratio` and `z` the largest ratio to the ideal machine and bias."""

    verdict: Verdict
    message: str = ""
    worst: float = 0.0
    at: str = ""
    ratio: float = 0.0
    z: float = 0.0
    note: str = ""


# -- golden ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A float64 value, the standard deviation that the contract permits a chip, and the largest deviation."""

    value: Array
    sigma: Array
    most: Array

    def __getitem__(self, rows: Any) -> Spread:
        return Spread(self.value[rows], self.sigma[rows], self.most[rows])


def widened(operand: Any) -> Any:
    """An operand as references take it."""
    if isinstance(operand, Weight):
        return widen(operand.native)
    if isinstance(operand, Pages):
        return replace(operand, native={n: widen(a) for n, a in operand.native.items()})
    return widen(operand) if isinstance(operand, np.ndarray) else operand


class Golden:
    """What the contract's reference says about a call."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.contract = inputs, inputs.contract
        self.operands = {n: widened(v) for n, v in inputs.operands.items()}
        # References that others are made of call their operand x and their result y.
        first = next(iter(inputs.spec.dtypes.values()))
        self.dtypes = {"x": first, "y": first, **inputs.spec.dtypes}
        self.shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for result, shape, name in self.contract.results(inputs.spec, inputs.operands):
            self.shapes[result.name] = shape, name
            if name:
                self.dtypes[result.name] = name

    def results(self) -> dict[str, Any]:
        """The results by name; where the call makes a choice, at the reference's own one."""
        return self._named(self._call(self.contract.reference))

    def spread(self, function: Any = None, *extra: Any) -> dict[str, Spread]:
        """Value and deviation of every float result of the reference (or of another function of the contract)."""
        function = function or self.contract.reference
        named = self._named if function is self.contract.reference else _as_dict
        exact = _floats(named(self._call(function, *extra)))
        square = {k: np.zeros(v.shape) for k, v in exact.items()}
        total = {k: np.zeros(v.shape) for k, v in exact.items()}

        def perturb(run: int, only: int | None) -> Noise:
            rng = np.random.default_rng([run, zlib.crc32(self.inputs.case.token.encode())])
            with noise(rng, self.dtypes, only) as mode:
                noisy = _floats(named(self._call(function, *extra)))
            for k, v in noisy.items():
                with np.errstate(invalid="ignore", over="ignore"):
                    off = np.nan_to_num(np.abs(v - exact[k]), nan=0.0, posinf=0.0)
                square[k] += off**2
                total[k] += off
            return mode

        first = perturb(0, None)
        if first.reduced:
            for run in range(1, RUNS):
                perturb(run, None)
            sigma = {k: _mixed(np.sqrt(v / RUNS)) for k, v in square.items()}
            return {k: Spread(exact[k], sigma[k], 6 * sigma[k]) for k in exact}
        # Without reductions each point is perturbed alone: eight runs of few signs can cancel, and the sum is a bound.
        for k in exact:
            square[k][...] = total[k][...] = 0
        for point in range(first.met):
            perturb(point, point)
        return {k: Spread(exact[k], s := np.sqrt(square[k]), np.minimum(6 * s, 3**0.5 * total[k])) for k in exact}

    def scores(self) -> Spread:
        return self.spread(self.contract.scores)["value"]

    def _call(self, function: Any, *extra: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*self.operands.values(), *extra, **self.inputs.attrs)

    def _named(self, out: Any) -> dict[str, Any]:
        return dict(zip((r.name for r in self.contract.signature.results), out if isinstance(out, tuple) else (out,)))


def _as_dict(out: Any) -> dict[str, Any]:
    return out if isinstance(out, dict) else {"value": out}


def _floats(named: Mapping[str, Any]) -> dict[str, Array]:
    """The float arrays among results, those of pages as "name.field"."""
    found = {}
    for name, value in named.items():
        if isinstance(value, Pages):
            found.update({f"{name}.{f}": a for f, a in value.native.items()})
        elif isinstance(value, np.ndarray) and value.dtype == np.float64:
            found[name] = value
    return found


def _mixed(sigma: Array) -> Array:
    """After a reduction the elements of a row share errors, and eight runs are few: half of the row's mean square."""
    if not sigma.size or not sigma.ndim:
        return sigma
    return np.sqrt((sigma**2 + np.mean(sigma**2, axis=-1, keepdims=True)) / 2)


# -- judgement -------------------------------------------------------------------------------------------------------


class _Failed(Exception):
    def __init__(self, verdict: Verdict, message: str, **figures: Any) -> None:
        super().__init__(message)
        self.judgement = Judgement(verdict, message, **figures)


def judge(inputs: Inputs, outcome: Outcome, level: str = "bring-up", tie: str = "lowest") -> Judgement:
    """Compare what a kernel did with what the contract says; `tie` is the kernel's declared order of ties."""
    if outcome.error:
        return Judgement("FAIL_ERROR", outcome.error)
    try:
        return _judged(inputs, outcome, STRICTNESS[level], tie)
    except _Failed as failed:
        return failed.judgement


def _judged(inputs: Inputs, outcome: Outcome, limit: Strictness, tie: str) -> Judgement:
    golden, contract = Golden(inputs), inputs.contract
    for name, (shape, wanted) in golden.shapes.items():
        _check_form(name, outcome.results.get(name), shape, wanted, inputs)
    if outcome.trespasses:
        raise _Failed("FAIL_WROTE_OUTSIDE", outcome.trespasses[0])
    figures: list[Judgement] = []
    note = ""
    if contract.admits:
        _judge_admitted(golden, outcome, limit)
        spreads: dict[str, Spread] = {}
    elif contract.choice:
        chosen = outcome.results[contract.choice]
        note = _judge_choice(golden, chosen, limit, tie)
        spreads = golden.spread(contract.finish, chosen) if contract.finish else {}
    else:
        expected = golden.results()
        spreads = _exactly(expected) if contract.exact else golden.spread()
        for name, value in expected.items():
            if not isinstance(value, Pages) and name not in spreads:
                _judge_exact(name, outcome.results[name], value)
    for key, spread in spreads.items():
        figures.append(_judge_spread(golden, key, spread, outcome, limit))
    _check_repeat(outcome)
    if not figures:
        return Judgement("PASS", note=note)
    worst = max(figures, key=lambda f: f.worst)
    return replace(worst, ratio=max(f.ratio for f in figures), z=max((f.z for f in figures), key=abs), note=note)


def _exactly(expected: Mapping[str, Any]) -> dict[str, Spread]:
    return {k: Spread(v, zero := np.zeros(v.shape), zero) for k, v in _floats(expected).items()}


def _check_form(name: str, value: Any, shape: tuple[int, ...], wanted: str, inputs: Inputs) -> None:
    if isinstance(value, dict):  # pages
        before = inputs.operands[name]
        for f, width in before.spec.fields:
            _check_form(f"{name}.{f}", value.get(f), (before.spec.slots, width), before.spec.dtype, inputs)
    elif isinstance(value, Rows):
        _check_form(f"{name}.indices", value.indices, shape, "int32", inputs)
        _check_form(f"{name}.length", value.length, shape[:1], "int32", inputs)
    elif not isinstance(value, np.ndarray):
        raise _Failed("FAIL_SHAPE", f"{name} is {type(value).__name__}, expected an array of {list(shape)}")
    elif value.shape != shape:
        raise _Failed("FAIL_SHAPE", f"{name} has shape {list(value.shape)}, expected {list(shape)}")
    elif dtype(value) != wanted:
        raise _Failed("FAIL_DTYPE", f"{name} is {dtype(value)}, expected {wanted}")


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
    raise _Failed("FAIL_VALUE", f"{name}{list(at)} is {got[at]}, expected {expected[at]}", at=f"{name}{list(at)}")


def _judge_spread(golden: Golden, key: str, spread: Spread, outcome: Outcome, limit: Strictness) -> Judgement:
    """One float result, or one field of mutated pages: untouched slots bit for bit first."""
    inputs = golden.inputs
    name, _, part = key.partition(".")
    got = outcome.results[name]
    if not part:
        rows = specified_rows(inputs, name)
        return _judge_floats(inputs, key, got[:rows], spread[:rows], limit)
    before: Pages = inputs.operands[name]
    written = written_slots(inputs, before)
    touched = (bits(got[part]) != bits(before.native[part])).any(-1) & ~written
    if touched.any():
        raise _Failed("FAIL_WROTE_OUTSIDE", f"{key} slot {int(np.argmax(touched))} changed and is none that is written")
    return _judge_floats(inputs, key, got[part][written], spread[written], limit)


def _judge_floats(inputs: Inputs, name: str, y: Array, spread: Spread, limit: Strictness) -> Judgement:
    kind, g = dtype(y), spread.value
    rounded = narrow(g, kind)
    if not y.size:
        return Judgement("PASS")
    if inputs.contract.exact or _exact_data(inputs, g):
        differs = bits(y) != bits(rounded) if inputs.contract.exact else y != rounded
        if differs.any():
            at = _first(differs)
            raise _Failed("FAIL_VALUE", f"{name}{at} is {y[tuple(at)]}, expected exactly {rounded[tuple(at)]}",
                          worst=np.inf, at=f"{name}{at}")  # fmt: skip
        return Judgement("PASS", at=name)
    wide = widen(y)
    _check_special(name, wide, g, kind, limit)
    finite = np.isfinite(wide) & np.isfinite(g)
    e = np.where(finite, np.abs(np.where(finite, wide, 0) - np.where(finite, g, 0)), 0.0)
    size = np.where(finite, np.abs(g), 0.0)
    budget = UNIT_ROUNDOFF[kind] * size + spread.most + tiny(kind)
    over = e / budget
    at = [int(i) for i in np.unravel_index(int(np.argmax(over)), over.shape)]
    worst, where = float(over[tuple(at)]), f"{name}{at}"
    figures: dict[str, Any] = {"worst": worst, "at": where}
    if worst > limit.pointwise:
        message = (
            f"{where} is {wide[tuple(at)]:.9g}, expected {g[tuple(at)]:.9g}: off by {worst:.3g} times its error budget, "
            f"permitted is {limit.pointwise:g}"
        )
        raise _Failed("FAIL_VALUE", message, **figures)
    ideal = np.where(finite & np.isfinite(rounded), widen(rounded), g)
    ideal = np.where(finite, ideal - np.where(finite, g, 0), 0.0)
    figures["ratio"], why = _ratio(e, ideal, spread.sigma, size, kind, limit)
    if why:
        raise _Failed("FAIL_VALUE", f"{name}: {why}", **figures)
    figures["z"] = _bias(wide, g, finite, ideal, spread.sigma)
    if abs(figures["z"]) > BIAS:
        side = "away from" if figures["z"] > 0 else "toward"
        raise _Failed("FAIL_VALUE", f"{name} is rounded {side} zero: bias z = {figures['z']:.1f}", **figures)
    nonzero = finite & (widen(rounded) != 0)
    missing = np.count_nonzero(nonzero & (wide == 0)) / max(np.count_nonzero(nonzero), 1)
    if missing > ZEROS:
        raise _Failed("UNTRUSTED", f"{name} is zero in {missing:.0%} of the places where it should not be", **figures)
    return Judgement("PASS", **figures)


def _exact_data(inputs: Inputs, g: Array) -> bool:
    """Sums of products of small integers have one answer, which float32 holds."""
    chosen = {inputs.case.recipe(n) for n, v in inputs.operands.items() if _is_float_operand(v)}
    scaled = any(isinstance(v, float) for v in inputs.attrs.values())
    return chosen == {"integer"} and not scaled and bool(((g == np.rint(g)) & (np.abs(g) < 2**24)).all())


def _is_float_operand(value: Any) -> bool:
    if isinstance(value, (Weight, Pages)):
        return True
    return isinstance(value, np.ndarray) and is_float(dtype(value))


def _check_special(name: str, y: Array, g: Array, kind: str, limit: Strictness) -> None:
    wrong = np.isnan(y) != np.isnan(g)
    if wrong.any():
        at = _first(wrong)
        left = ", or was never written" if np.isnan(y[tuple(at)]) else ""
        raise _Failed("FAIL_VALUE", f"{name}{at} is {y[tuple(at)]}, expected {g[tuple(at)]:.9g}{left}",
                      worst=np.inf, at=f"{name}{at}")  # fmt: skip
    # An infinity is right where the reference's is, and where rounding within the budget overflows.
    top = largest(kind)
    near = np.abs(g) * (1 + limit.pointwise * UNIT_ROUNDOFF[kind]) >= top
    wrong = np.where(np.isinf(g), y != g, np.isinf(y) & ~(near & (np.sign(y) == np.sign(g)))) & ~np.isnan(g)
    if wrong.any():
        at = _first(wrong)
        raise _Failed("FAIL_VALUE", f"{name}{at} is {y[tuple(at)]}, expected {g[tuple(at)]:.9g}",
                      worst=np.inf, at=f"{name}{at}")  # fmt: skip


def _ratio(
    e: Array, ideal: Array, sigma: Array, size: Array, kind: str, limit: Strictness
) -> tuple[float, str]:
    """Root mean square error over that of an ideal machine, for the whole and for rows long enough to have one."""
    # A single rounding has no energy of its own: at least that of uniform rounding errors is granted.
    uniform = UNIT_ROUNDOFF[kind] * size / 3
    granted = np.maximum(ideal**2, uniform**2) + sigma**2 + (tiny(kind) ** 2)
    whole = float(np.sqrt(np.mean(e**2) / np.mean(granted)))
    if e.size >= 256 and whole > limit.whole:
        return whole, f"errors have {whole:.2f} times the energy of an ideal machine's, permitted is {limit.whole:g}"
    if e.ndim > 1 and e.shape[-1] >= 64:
        rows = np.sqrt(np.mean(e**2, axis=-1) / np.mean(granted, axis=-1))
        worst = float(rows.max())
        if worst > limit.row:
            at = _first(rows == worst)
            return worst, f"row {at} has {worst:.2f} times the error of an ideal machine's, permitted is {limit.row:g}"
    return whole, ""


def _bias(y: Array, g: Array, finite: Array, ideal: Array, sigma: Array) -> float:
    """z of the mean rounding direction, rows as samples; 0 where anything but output rounding dominates."""
    if y.ndim < 2 or y.shape[-1] < 64 or np.mean(ideal**2) < 9 * np.mean(sigma**2):
        return 0.0
    direction = np.where(finite, np.sign(np.abs(np.where(finite, y, 0)) - np.abs(np.where(finite, g, 0))), 0.0)
    rows = direction.reshape(-1, y.shape[-1]).mean(-1)
    deviation = max(float(rows.std()), y.shape[-1] ** -0.5)
    return float(rows.mean() / deviation * np.sqrt(len(rows)))


# -- choices ---------------------------------------------------------------------------------------------------------


def _judge_choice(golden: Golden, chosen: Any, limit: Strictness, tie: str) -> str:
    """A top-k: valid, complete, and made of scores that are the highest within twice their budget."""
    contract, inputs = golden.contract, golden.inputs
    scores = golden.scores() if not contract.exact else Spread(golden._call(contract.scores), np.zeros(1), np.zeros(1))
    value = np.where(np.isnan(scores.value), -np.inf, scores.value)
    expected = golden.results()[contract.choice or ""]
    ids, length, candidates = _choice_arrays(chosen, expected, inputs, value.shape[-1])
    best, best_length, _ = _choice_arrays(expected, expected, inputs, value.shape[-1])
    budget = np.zeros_like(value)
    if not contract.exact:
        budget = U_SINGLE * np.where(np.isfinite(value), np.abs(value), 0) + scores.most
    exact = contract.exact or any(r in TIED for _, r in inputs.case.recipes)
    name, deviates = contract.choice, False
    for t in range(len(ids)):
        n = int(best_length[t])
        if int(length[t]) != n:
            raise _Failed("FAIL_VALUE", f"{name} row {t} has {int(length[t])} entries, expected {n}", at=f"{name}[{t}]")
        row, tail = ids[t, :n].astype(np.int64), ids[t, n:]
        if (tail != -1).any():
            raise _Failed("FAIL_VALUE", f"{name} row {t} ends in {int(tail[tail != -1][0])}, expected -1 beyond its {n}")
        if ((row < 0) | (row >= candidates[t])).any():
            bad = int(row[(row < 0) | (row >= candidates[t])][0])
            raise _Failed("FAIL_VALUE", f"{name} row {t} has {bad}, expected 0 to {int(candidates[t]) - 1}")
        if len(np.unique(row)) != n:
            raise _Failed("FAIL_VALUE", f"{name} row {t} has an entry twice")
        if not n:
            continue
        wanted = best[t, :n].astype(np.int64)
        last = wanted[np.argmin(value[t, wanted])]
        kth = value[t, last]
        if np.isneginf(kth):
            low = np.zeros(n, bool)
        else:
            low = value[t, row] < kth - limit.pointwise * (budget[t, row] + budget[t, last])
        if low.any():
            bad = int(row[low][0])
            raise _Failed(
                "FAIL_VALUE", f"{name} row {t} has {bad} with score {value[t, bad]:.9g}, the lowest chosen should be {kth:.9g}"
            )
        # Everything clearly above the k-th score must be there.
        clear = np.nonzero(value[t] > kth + limit.pointwise * (budget[t] + budget[t, last]))[0]
        lost = np.setdiff1d(clear, row)
        if len(lost):
            bad = int(lost[0])
            raise _Failed("FAIL_VALUE", f"{name} row {t} lacks {bad} with score {value[t, bad]:.9g} above the k-th {kth:.9g}")
        if exact:
            tied = row[value[t, row] == kth]
            ought = wanted[value[t, wanted] == kth]
            if len(tied) == len(ought) and set(tied.tolist()) != set(ought.tolist()):
                if tie == "lowest":
                    bad = int(np.setdiff1d(tied, ought)[0])
                    raise _Failed("FAIL_VALUE", f"{name} row {t} has {bad} from a tie that goes to the lowest positions")
                deviates = True
    return "the kernel declares its own order of ties" if deviates else ""


def _choice_arrays(chosen: Any, expected: Any, inputs: Inputs, columns: int) -> tuple[Array, Array, Array]:
    """ids [rows, k], valid entries per row, candidates per row."""
    if isinstance(chosen, Selection):
        chosen = chosen.native
    if isinstance(chosen, Rows):
        batch: Batch = inputs.batch  # type: ignore[assignment]
        return chosen.indices, chosen.length, batch.visible
    ids = chosen[:, None] if chosen.ndim == 1 else chosen
    return ids, np.full(len(ids), ids.shape[1]), np.full(len(ids), columns)


def _judge_admitted(golden: Golden, outcome: Outcome, limit: Strictness) -> None:
    contract, operands = golden.contract, golden.operands
    values = [outcome.results[r.name] for r in contract.signature.results]
    V = golden.inputs.spec.dims["V"]
    ids = values[0]
    wrong = (ids >= V) | (ids < (0 if ids.ndim == 1 else -1))  # a row of several may end in -1
    if wrong.any():
        raise _Failed("FAIL_VALUE", f"{contract.choice} has {int(ids[wrong][0])}, expected 0 to {V - 1}")
    # A float32 softmax: four ulps of exp, its argument's rounding, and a running sum of V terms.
    temperature = operands["temperature"]
    hottest = np.abs(operands["logits"]).max(initial=0) / np.where(temperature > 0, temperature, 1).min(initial=1)
    slack = limit.pointwise * U_SINGLE * (8 + 2 * hottest + 6 * np.sqrt(V))
    with np.errstate(all="ignore"):
        bad = contract.admits(*operands.values(), results=values[0], slack=slack, **golden.inputs.attrs)
    if bad is not None:
        wanted = golden.results()[contract.choice or ""][bad]
        raise _Failed("FAIL_VALUE", f"{contract.choice} row {bad} is {ids[bad]}, the reference gives {wanted}")


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
    for name, first in outcome.results.items():
        second = outcome.again[name]
        parts = first.items() if isinstance(first, dict) else [("", first)]
        if isinstance(first, Rows):
            parts = [(f, getattr(first, f)) for f in Rows._fields]
            second = second._asdict()
        for part, a in parts:
            b = second[part] if part else second
            if a.shape != b.shape or (bits(a) != bits(b)).any():
                raise _Failed("FAIL_NONDETERMINISTIC", f"{name} differs between two runs on the same inputs")


def tiny(kind: str) -> float:
    """Half the smallest step of float16; elsewhere the smallest normal number, below which chips may flush to zero."""
    return 2.0**-25 if kind == "float16" else 2.0**-126


def largest(kind: str) -> float:
    x = np.array(np.inf, numpy_dtype(kind))
    return float(np.nextafter(x, np.array(0, x.dtype)))


def _first(mask: Array) -> list[int]:
    return [int(i[0]) for i in np.nonzero(mask)]
