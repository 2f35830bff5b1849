"""What the reference says about a call in float64, and how far the contract lets a chip deviate from it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from porthal.conformance.cache import recall
from porthal.conformance.inputs import Array, Inputs
from porthal.hal import Pages, Weight
from porthal.hal.dtypes import widen
from porthal.hal.numerics import FLUSHED, ROUNDED, ROUNDED_TO_ZERO, Noise, blocks, noise

RUNS = 8  # noisy runs of the reference behind one sigma


@dataclass(frozen=True)
class Spread:
    """A float64 value, the standard deviation that the contract permits a chip, and the largest deviation."""

    value: Array
    sigma: Array
    most: Array

    def __getitem__(self, rows: Any) -> Spread:
        return Spread(self.value[rows], self.sigma[rows], self.most[rows])

    def wider(self, by: Array) -> Spread:
        return Spread(self.value, np.hypot(self.sigma, by), self.most + by)


def widened(operand: Any) -> Any:
    """An operand as references take it."""
    if isinstance(operand, Weight):
        return widen(operand.native)
    if isinstance(operand, Pages):
        return replace(operand, native={n: widen(a) for n, a in operand.native.items()})
    return widen(operand) if isinstance(operand, np.ndarray) else operand


def _flushed(operand: Any) -> Any:
    """An operand as a chip reads it that takes denormals for zeros: the same object where it has none."""
    if isinstance(operand, Pages):
        fields = {n: _flushed(a) for n, a in operand.native.items()}
        return operand if all(fields[n] is a for n, a in operand.native.items()) else replace(operand, native=fields)
    if not isinstance(operand, np.ndarray) or operand.dtype != np.float64:
        return operand
    denormal = (np.abs(operand) < FLUSHED) & (operand != 0)
    return np.where(denormal, 0.0, operand) if denormal.any() else operand


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
        return self._results

    @cached_property
    def _results(self) -> dict[str, Any]:
        return self._named(self.call(self.contract.reference))

    def spread(self, function: Any = None, *extra: Any) -> dict[str, Spread]:
        """Value and deviation of every float result of the reference (or of another function of the contract)."""
        if extra:  # a choice of the chip's takes part
            return self._perturbed(function, *extra)

        def compute() -> dict[str, Array]:
            found = self._perturbed(function)
            values = {f"value/{k}": s.value for k, s in found.items()}
            deviations = {f"{part}/{k}": getattr(s, part) for k, s in found.items() for part in ("sigma", "most")}
            return values | {k: a.astype(np.float32) for k, a in deviations.items()}

        kept = recall(self.inputs, "scores" if function else "results", compute)
        keys = [k.partition("/")[2] for k in kept if k.startswith("value/")]
        parts = ("value", "sigma", "most")
        return {k: Spread(*(kept[f"{part}/{k}"].astype(np.float64, copy=False) for part in parts)) for k in keys}

    def _perturbed(self, function: Any = None, *extra: Any) -> dict[str, Spread]:
        exact = _floats(self._call_named(function, *extra) if function else self._results)
        scores = function is not None and function is self.contract.scores
        turned = np.inf if scores else 0.0  # what an inner choice may exclude as well is free
        modes: list[Noise] = []

        def deviating(runs: Iterable[tuple[int, int | None]]) -> Iterator[dict[str, Array]]:
            for run, only in runs:
                noisy, mode = self._noisy(run, only, function, *extra)
                modes.append(mode)
                yield noisy

        first = next(deviating([(0, None)]))
        if modes[0].reduced:
            square, _ = _sums(exact, chain([first], deviating((run, None) for run in range(1, RUNS))), turned)
            del first
            sigma = {k: _mixed(np.sqrt(v / RUNS)) for k, v in square.items()}
            spreads = {k: Spread(exact[k], s, 6 * s) for k, s in sigma.items()}
        else:
            # Each point is perturbed alone: eight runs of few signs can cancel, and the sum is a bound.
            points = (*range(modes[0].met), *((ROUNDED, ROUNDED_TO_ZERO) if scores else ()))
            square, total = _sums(exact, deviating((abs(point), point) for point in points), turned)
            spreads = {k: Spread(exact[k], s := np.sqrt(square[k]), np.minimum(6 * s, 3**0.5 * total[k])) for k in exact}
        if "float16" in self.dtypes.values():  # sums of what it cannot hold lose every term
            lost = self._noisy(0, ROUNDED, function, *extra)[0]
            with np.errstate(invalid="ignore"):
                spreads = {k: replace(s, most=np.fmax(s.most, np.abs(lost[k] - s.value))) for k, s in spreads.items()}
        flushed = {n: _flushed(v) for n, v in self.operands.items()}
        if all(flushed[n] is v for n, v in self.operands.items()):
            return spreads
        least = _floats(self._call_named(function, *extra, operands=flushed))
        with np.errstate(invalid="ignore"):
            off = {k: np.nan_to_num(np.abs(least[k] - s.value), nan=0.0, posinf=0.0) for k, s in spreads.items()}
        return {k: s.wider(off[k]) for k, s in spreads.items()}

    def machines(self, function: Any = None, *extra: Any) -> Iterator[dict[str, Array]]:
        """Float results of machines that round where the contract permits; they themselves round once more, at the end."""
        for run, only in ((0, ROUNDED), *((run, None) for run in range(RUNS))):
            yield self._noisy(run, only, function, *extra)[0]

    def _noisy(self, run: int, only: int | None, function: Any, *extra: Any) -> tuple[dict[str, Array], Noise]:
        rng = np.random.default_rng([run, zlib.crc32(self.inputs.case.token.encode())])
        with noise(rng, self.dtypes, only) as mode:
            return _floats(self._call_named(function, *extra)), mode

    def exactly(self) -> dict[str, Spread]:
        """The float results of an op that has one right answer."""
        return {k: Spread(v, np.zeros(v.shape), np.zeros(v.shape)) for k, v in _floats(self.results()).items()}

    def scores(self) -> Spread:
        """The scores behind a discrete choice."""
        return self.spread(self.contract.scores)["value"]

    def call(self, function: Any, *extra: Any, operands: Mapping[str, Any] | None = None) -> Any:
        with np.errstate(all="ignore"):
            return function(*(operands or self.operands).values(), *extra, **self.inputs.attrs)

    def _call_named(self, function: Any, *extra: Any, operands: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Results of another function of the contract, or where that is None of the reference, by name."""
        out = self.call(function or self.contract.reference, *extra, operands=operands)
        return _as_dict(out) if function else self._named(out)

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


def _sums(
    exact: Mapping[str, Array], runs: Iterable[Mapping[str, Array]], turned: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums of the squares and of the magnitudes of what runs deviate by, without keeping the runs; NaN counts as 0 and
    infinity as `turned`."""
    square, total = ({k: np.zeros_like(v) for k, v in exact.items()} for _ in range(2))
    with np.errstate(invalid="ignore", over="ignore"):
        for noisy in runs:
            for k in noisy:
                for v, g, squares, magnitudes in blocks(noisy[k], exact[k], square[k], total[k]):
                    off = np.abs(v - g)
                    if not np.isfinite(off).all():
                        off = np.nan_to_num(off, nan=0.0, posinf=turned)
                    magnitudes += off
                    squares += np.square(off)
    return square, total


def _mixed(sigma: Array) -> Array:
    """After a reduction the elements of a row share errors, and eight runs are few: half of the row's mean square."""
    if not sigma.size or not sigma.ndim:
        return sigma
    return np.sqrt((sigma**2 + np.mean(sigma**2, axis=-1, keepdims=True)) / 2)
