"""What the reference says about a call in float64, and how far the contract lets a chip deviate from it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from porthal.conformance.cases.inputs import Array, Inputs, written_slots
from porthal.conformance.execution.invariance import independent
from porthal.conformance.judgement.golden_cache import recall
from porthal.hal import Batch, Operand, Pages, Quantised
from porthal.hal.dtypes import widen
from porthal.hal.numerics import EXACT, FLUSHED, ROUNDED, ROUNDED_TO_ZERO, Known, Noise, blocks, noise
from porthal.hal.scheme import Scaled
from porthal.hal.signature import ARRAY

PIECE = 2**16  # elements of the widest operand at a time, where rows do not depend on each other
LARGE = 2**23  # elements of what is widened where it is read
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


class Piece(NamedTuple):
    """Some rows of a call: the operands of these rows alone, and what else the function takes."""

    rows: slice
    operands: Mapping[str, Any]
    extra: tuple[Any, ...]


class Widening:
    """A large array that is widened where it is read: references index a cache by slots, and experts one by one."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape = array, array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, at: Any) -> Array:
        return widen(self.array[at])


def widened(operand: Any, indexed: bool = False) -> Any:
    """An operand as references take it; where they only index it, a large one is widened there."""

    def wide(x: Array) -> Any:
        return Widening(x) if indexed and x.size > LARGE else widen(x)

    if isinstance(operand, Operand):
        return operand.for_reference(wide)
    return widen(operand) if isinstance(operand, np.ndarray) else operand


def _flushed(operand: Any) -> Any:
    """An operand as read by a chip that flushes denormals to zero: the same object where it has none."""
    if isinstance(operand, Scaled):
        return operand.flushed(FLUSHED)
    if isinstance(operand, Operand):
        return operand.mapped(_flushed)
    if not isinstance(operand, np.ndarray) or operand.dtype != np.float64:
        return operand
    small = sum(np.count_nonzero(np.abs(part) < FLUSHED) for [part] in blocks(operand))
    if small == operand.size - np.count_nonzero(operand):  # they are zeros
        return operand
    return np.where((np.abs(operand) < FLUSHED) & (operand != 0), 0.0, operand)


class Golden:
    """What the contract's reference says about a call."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.contract = inputs, inputs.contract
        kept = [o for o in self.contract.signature.operands if not o.mutated]
        indexed = [o.name for o in kept if o.kind == "Pages" or o.dims[:1] == ("E",)]
        self.operands = {n: widened(v, n in indexed) for n, v in inputs.operands.items()}
        # References that are used inside others name their operand x and their result y.
        first = next(iter(inputs.spec.dtypes.values()), "float32")
        self.dtypes = {"x": first, "y": first, **inputs.spec.dtypes}
        self.shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for result, shape, name in self.contract.results(inputs.spec):
            self.shapes[result.name] = shape, name
            if name:
                self.dtypes[result.name] = name

    def flushed(self) -> Golden:
        """The same call as read by a chip that flushes denormals to zero."""
        read = Golden(self.inputs)
        read.operands = {n: _flushed(v) for n, v in self.operands.items()}
        return read

    def results(self) -> dict[str, Any]:
        """The results by name; where the call makes a choice, at the reference's own one."""
        return self._results

    @property
    def _results(self) -> dict[str, Any]:
        return self._reference[0]

    @cached_property
    def _reference(self) -> tuple[dict[str, Any], Noise]:
        return self._exactly(None)

    def _exactly(
        self, function: Any, *extra: Any, operands: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], Noise]:
        """The exact results, and how often they could have been perturbed."""
        with noise(np.random.default_rng(0), self.dtypes, EXACT) as mode:
            return self._call_named(function, *extra, operands=operands), mode

    def spread(self, function: Any = None, *extra: Any) -> dict[str, Spread]:
        """Value and deviation of every float result of the reference (or of another function of the contract)."""
        if extra:  # depends on the chip's choice
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
        found, counted = self._exactly(function, *extra) if function else self._reference
        exact = self._floats(found)
        scores = function is not None and function is self.contract.scores
        if counted.reduced:
            runs: list[tuple[int, int | None]] = [(run, None) for run in range(RUNS)]
        else:
            # Each point is perturbed alone: eight runs of few signs can cancel, and the sum is a bound.
            points = (*range(counted.count), *((ROUNDED, ROUNDED_TO_ZERO) if scores else ()))
            runs = [(abs(point), point) for point in points]
        infinite = np.inf if scores else 0.0  # a score that an inner choice may exclude is free
        pieces, whole = self._pieces(extra), [Piece(slice(None), self.operands, extra)]
        sums = self._summed(function, exact, runs, pieces, counted.count, infinite)
        if sums is None:  # the reference perturbs row by row
            pieces, sums = whole, self._summed(function, exact, runs, whole, None, infinite)
        assert sums is not None
        square, total = sums
        if counted.reduced:
            sigma = {k: _mixed(np.sqrt(v / RUNS)) for k, v in square.items()}
            spreads = {k: Spread(exact[k], s, 6 * s) for k, s in sigma.items()}
        else:
            spreads = {k: Spread(exact[k], s := np.sqrt(square[k]), np.minimum(6 * s, 3**0.5 * total[k])) for k in exact}
        if "float16" in self.dtypes.values():  # a sum of terms too small for it loses them all
            for piece in pieces:
                lost, _ = self._noisy(0, ROUNDED, function, piece)
                with np.errstate(invalid="ignore"):
                    for k, spread in spreads.items():
                        most = spread.most[piece.rows]
                        np.fmax(most, np.abs(lost[k] - spread.value[piece.rows]), out=most)
        flushed = {n: _flushed(v) for n, v in self.operands.items()}
        if all(flushed[n] is v for n, v in self.operands.items()):
            return spreads
        least = self._floats(self._call_named(function, *extra, operands=flushed))
        with np.errstate(invalid="ignore"):
            off = {k: np.nan_to_num(np.abs(least[k] - s.value), nan=0.0, posinf=0.0) for k, s in spreads.items()}
        return {k: s.wider(off[k]) for k, s in spreads.items()}

    def _summed(
        self,
        function: Any,
        exact: Mapping[str, Array],
        runs: Sequence[tuple[int, int | None]],
        pieces: Sequence[Piece],
        count: int | None,
        infinite: float,
    ) -> tuple[dict[str, Array], dict[str, Array]] | None:
        """Sums over the runs of the squares and magnitudes of their deviations, piece by piece; None where a piece is
        perturbed at other than `count` points."""
        square, total = ({k: np.zeros_like(v) for k, v in exact.items()} for _ in range(2))
        for piece in pieces:
            known = Known(piece.operands.values())
            here, squares, totals = ({k: a[piece.rows] for k, a in arrays.items()} for arrays in (exact, square, total))
            for run in runs:
                noisy, mode = self._noisy(*run, function, piece, known)
                _add(noisy, here, squares, totals, infinite)
                if count is not None and len(pieces) > 1 and mode.count != count:
                    return None
        return square, total

    def _pieces(self, extra: tuple[Any, ...]) -> list[Piece]:
        """This call, split where it has many rows into calls of few, each small enough for a core's cache."""
        whole = [Piece(slice(None), self.operands, extra)]
        signature, batch, rows = self.contract.signature, self.inputs.batch, independent(self.contract)
        plain = all(o.kind in (ARRAY, "Weight") or (o.kind == "Batch" and len(o.dims) == 1) for o in signature.operands)
        count = batch.T if batch else self.inputs.spec.dims.get(rows, 0)
        if not rows or not plain or not isinstance(count, int) or count < 2:
            return whole
        if not all(isinstance(a, np.ndarray) for a in extra):
            return whole
        carried = [o.name for o in signature.of_kind(ARRAY) if o.dims[:1] == (rows,) and self.operands[o.name] is not None]
        width = max((self.operands[name].size for name in carried), default=0) // count
        shared = sum(v.size for n, v in self.operands.items() if n not in carried and isinstance(v, np.ndarray))
        starts = batch.cu_q if batch else np.arange(count + 1)
        cuts = [0]
        for at in range(1, len(starts)):
            if (starts[at] - starts[cuts[-1]]) * width >= max(PIECE, shared) or at == len(starts) - 1:
                cuts.append(at)
        if len(cuts) < 3:
            return whole
        pieces = []
        for first, last in pairwise(cuts):
            part = slice(int(starts[first]), int(starts[last]))
            operands = {n: v[part] if n in carried else v for n, v in self.operands.items()}
            for o in signature.of_kind("Batch"):
                assert batch
                operands[o.name] = _requests(batch, first, last)
            pieces.append(Piece(part, operands, tuple(a[part] for a in extra)))
        return pieces

    def rounding_runs(self, function: Any = None, *extra: Any) -> Iterator[dict[str, Array]]:
        """Float results of runs that round where the contract permits, everywhere and at one point alone, as chips do; a chip
        rounds them once more, at the end."""
        whole = Piece(slice(None), self.operands, extra)
        everywhere, mode = self._noisy(0, ROUNDED, function, whole)
        yield everywhere
        for run, only in (*((0, name) for name in dict.fromkeys(mode.points)), *((run, None) for run in range(RUNS))):
            yield self._noisy(run, only, function, whole)[0]

    def _noisy(
        self, run: int, only: int | str | None, function: Any, piece: Piece, known: Known | None = None
    ) -> tuple[dict[str, Array], Noise]:
        rng = np.random.default_rng([run, zlib.crc32(self.inputs.case.stream.encode())])
        with noise(rng, self.dtypes, only, known, run) as mode:
            return self._floats(self._call_named(function, *piece.extra, operands=piece.operands)), mode

    def exactly(self) -> dict[str, Spread]:
        """The float results of an op that has one right answer."""
        return {k: Spread(v, np.zeros(v.shape), np.zeros(v.shape)) for k, v in self._floats(self.results()).items()}

    def scores(self) -> Spread:
        """The scores behind a discrete choice."""
        return self.spread(self.contract.scores)["value"]

    def call(self, function: Any, *extra: Any, operands: Mapping[str, Any] | None = None) -> Any:
        with np.errstate(all="ignore"):
            return function(*(operands or self.operands).values(), *extra, **self.inputs.attrs)

    def _call_named(self, function: Any, *extra: Any, operands: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Results by name of another function of the contract, or of the reference where that is None."""
        out = self.call(function or self.contract.reference, *extra, operands=operands)
        return _as_dict(out) if function else self.contract.named(out)

    def _floats(self, named: Mapping[str, Any]) -> dict[str, Array]:
        """The float arrays among results; of pages, the slots that the call may write, as "name.field". What is quantised
        stands here as the numbers that were."""
        found = {}
        for name, value in named.items():
            if isinstance(value, Pages):
                written = written_slots(self.inputs, value)
                asked = {f: a.asked if isinstance(a, Scaled) else a for f, a in value.native.items()}
                found.update({f"{name}.{f}": a[written] for f, a in asked.items() if a is not None})
            elif isinstance(value, Quantised):
                found[f"{name}.codes"] = value.native.asked
            elif isinstance(value, Operand):
                found.update({f"{name}.{part}": a for part, a in value.parts().items() if a.dtype == np.float64})
            elif isinstance(value, np.ndarray) and value.dtype == np.float64:
                found[name] = value
        return found


def _requests(batch: Batch, first: int, last: int) -> Batch:
    """Some requests of a batch, one after the other."""
    cu_q = batch.cu_q[first : last + 1] - batch.cu_q[first]
    return Batch(cu_q, batch.kv_len[first:last], batch.block_table[first:last], batch.block_size)


def _as_dict(out: Any) -> dict[str, Any]:
    return out if isinstance(out, dict) else {"value": out}


def _add(
    noisy: Mapping[str, Array],
    exact: Mapping[str, Array],
    square: Mapping[str, Array],
    total: Mapping[str, Array],
    infinite: float,
) -> None:
    """Add the squares and the magnitudes of a run's deviations; NaN counts as 0, and infinity as `infinite`."""
    with np.errstate(invalid="ignore", over="ignore"):
        for k in noisy:
            for v, g, squares, magnitudes in blocks(noisy[k], exact[k], square[k], total[k]):
                off = np.abs(v - g)
                if not np.isfinite(off).all():
                    off = np.nan_to_num(off, nan=0.0, posinf=infinite)
                magnitudes += off
                squares += np.square(off)


def _mixed(sigma: Array) -> Array:
    """After a reduction the elements of a row share errors, and eight runs are few: half is the row's mean."""
    if not sigma.size or not sigma.ndim:
        return sigma
    return np.sqrt((sigma**2 + np.mean(sigma**2, axis=-1, keepdims=True)) / 2)
