"""One call on a backend: runs the kernel again, in threads and among other rows, and watches what must not change."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from threading import Barrier, BrokenBarrierError
from types import FrameType
from typing import Any

import numpy as np

from porthal.conformance.cases.inputs import Inputs, specified_rows
from porthal.conformance.cases.legal import PAST_2G, THREADS, elements
from porthal.conformance.cases.values import TIED
from porthal.conformance.execution.bindings import Bindings, Bound
from porthal.conformance.execution.distant import Distant
from porthal.conformance.execution.invariance import disturbed, joined, restored, split
from porthal.conformance.execution.outcome import Array, Outcome, by_kernel, difference, named, raised
from porthal.conformance.execution.placing import Watch, filled, jointly, place, poisoned, read, spreads, view_of
from porthal.conformance.verdicts import Failed
from porthal.hal import Binding, DataNotTaken, NotClaimed, Pages, Weight
from porthal.hal.dtypes import dtype
from porthal.hal.errors import out_of_memory

REPLAYS = 25  # runs of a choice among equals, as at any level while patience lasts
PATIENCE = 0.5  # seconds, after which two runs are enough
SMALL = 2**17  # most elements of a case that another call follows, to see that results keep their bits
ABREAST = 4  # threads that call a kernel at once, and
ROUNDS = range(3, 8)  # how often at least, and at most while a fifth of PATIENCE lasts
WAIT, WAITING = 1e-4, 12  # seconds at each of so many lines


def execute(bindings: Bindings, bound: Bound, inputs: Inputs, runs: int = 2) -> Outcome:
    """The kernel's results on a call, on the same call again, and on its rows among others."""
    same_shape = bindings.backend.traits.static_shapes
    call = disturbed(inputs, not same_shape)  # made before a kernel that writes where it must not can spoil it
    promised = bound.batch_invariant or (bound.tie == "any" and inputs.contract.choice)
    parts = split(inputs) if promised and not same_shape else []
    outcome = repeated(bound.binding, inputs, max(runs, REPLAYS) if _chooses(inputs) else runs)
    outcome = among_other_rows(bindings, bound, *call, outcome) if call else outcome
    return _apart(bindings, bound, parts, outcome) if parts else outcome


def _chooses(inputs: Inputs) -> bool:
    """Whether it is a choice among equals, whose order threads may decide."""
    discrete = any(name in ("", "int32") for _, _, name in inputs.contract.results(inputs.spec))  # "" of a selection
    return discrete and any(recipe in (*TIED, "crowded") for _, recipe in inputs.case.recipes)


def repeated(binding: Binding, inputs: Inputs, runs: int = 2) -> Outcome:
    """Run the kernel on fresh operands, twice, then up to `runs` times while PATIENCE lasts and nothing differs.

    What it raises becomes the outcome's error; running out of memory raises Failed with CRASH instead.
    """
    until = time.perf_counter() + PATIENCE
    try:
        first = once(binding, inputs)
        trespasses = list(first.trespasses)
        for run in range(1, runs):
            second = once(binding, inputs)
            again = second.results
            trespasses += second.trespasses
            if time.perf_counter() > until or (run < runs - 1 and difference(first.results, again)):
                break
        if inputs.case.view == THREADS and not difference(first.results, again):
            again = next((found for found in _abreast(binding, inputs) if difference(first.results, found)), again)
        if elements(inputs.case) <= SMALL:
            trespasses += _kept(binding, inputs, first)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too must not end the run
        if isinstance(error, NotClaimed) and not by_kernel(error):
            raise
        return Outcome(error=told(error))
    flushes = binding.backend.traits.flushes_denormals
    unread = dict.fromkeys(what for watch in first.watches for what in watch.unread)
    return Outcome(first.results, again, tuple(trespasses), flushes=flushes, unread=tuple(unread))


def among_other_rows(bindings: Bindings, bound: Bound, call: Inputs, to: Array, outcome: Outcome) -> Outcome:
    """The outcome together with that of the same call among other rows."""
    where = "among other rows, one of them poisoned"

    def with_moved(runs: Sequence[Run]) -> Outcome:
        [run] = runs
        trespasses = tuple(type(t)(f"{where}: {t}") for t in run.trespasses)
        moved = restored(call, run.results, to)
        return replace(outcome, moved=moved, invariant=bound.batch_invariant, trespasses=trespasses)

    return _beside(bindings, bound, [call], where, outcome, with_moved)


def _apart(bindings: Bindings, bound: Bound, parts: Sequence[Inputs], outcome: Outcome) -> Outcome:
    """The outcome together with that of the same rows in several calls."""

    def with_apart(runs: Sequence[Run]) -> Outcome:
        return replace(outcome, apart=joined(parts, [run.results for run in runs]))

    return _beside(bindings, bound, parts, "in calls of fewer rows", outcome, with_apart)


def _beside(
    bindings: Bindings,
    bound: Bound,
    calls: Sequence[Inputs],
    where: str,
    outcome: Outcome,
    together: Callable[[Sequence[Run]], Outcome],
) -> Outcome:
    """The outcome together with what other calls of the same rows give, where the same kernel takes these."""
    if outcome.error or outcome.trespasses:
        return outcome
    try:
        there = [bindings.bound(call) for call in calls]
        if any(_kernel(bound) != _kernel(other) for other in there):
            return outcome
        runs = [once(other.binding, call) for other, call in zip(there, calls)]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, NotClaimed) and not by_kernel(error):
            return outcome
        return Outcome(error=f"{where}: {told(error)}")
    return together(runs)


def _kernel(bound: Bound) -> tuple[str, str, str]:
    return bound.choice.status, bound.choice.owner, bound.choice.provider


@dataclass(frozen=True)
class Run:
    """Results in logical form, what was written elsewhere; results and watched operands as they lie on the device."""

    results: dict[str, Any]
    trespasses: list[str]
    held: dict[str, Any]
    watches: list[Watch]


def once(binding: Binding, inputs: Inputs, abreast: Barrier | None = None) -> Run:
    """One call on fresh operands.

    With a barrier it waits there for the other threads before it places operands, and again before it calls the kernel;
    the backend's memory, which all threads share, is not watched then.
    """
    _meet(abreast)
    mutated = {o.name for o in inputs.contract.signature.mutated}
    operands, watches = {}, []
    distant = Distant(binding, inputs) if inputs.case.view == PAST_2G else None
    apart = next((n for n, v in inputs.operands.items() if spreads(v)), "")  # one such operand takes enough memory
    joint = jointly(binding, inputs) if inputs.case.view == "joint" else {}
    for name, value in inputs.operands.items():
        view = view_of(name, inputs.case, apart)
        operands[name], watch = joint.get(name) or place(binding, name, value, view, distant)
        if watch and name not in mutated:
            watches.append(watch)
    _meet(abreast)
    return called(binding, inputs, operands, watches, abreast, distant)


def called(
    binding: Binding,
    inputs: Inputs,
    operands: Mapping[str, Any],
    watches: list[Watch],
    abreast: Barrier | None = None,
    distant: Distant | None = None,
) -> Run:
    """One call on operands that are placed, whose logical form the inputs are."""
    contract, mutated = inputs.contract, {o.name for o in inputs.contract.signature.mutated}
    memory: AbstractContextManager[list[Watch]] = nullcontext([]) if abreast else poisoned(binding.backend)
    with memory as blocks, _line_by_line() if abreast else nullcontext():
        out = getattr(binding, contract.name)(*operands.values(), **inputs.attrs)
    held = named(binding, contract, out)
    if not abreast:
        _churn(binding, held)
    if distant:
        held = {name: distant.near(value) for name, value in held.items()}
    results = logical(binding, inputs, held)
    results = {name: value if name in mutated else copied(value) for name, value in results.items()}
    trespasses = [t for w in (*watches, *blocks) if (t := w.trespass(binding))]
    return Run(results, trespasses, held, watches)


def logical(binding: Binding, inputs: Inputs, held: Mapping[str, Any]) -> dict[str, Any]:
    """Results in logical form, with zeros in the rows that the contract leaves unspecified."""
    results = {name: read(binding, value) for name, value in held.items()}
    if (rows := specified_rows(inputs)) is None:
        return results
    return {n: np.concatenate([y[:rows], np.zeros_like(y[rows:])]) if y.ndim else y for n, y in results.items()}


def copied(value: Any) -> Any:
    """A result in memory of its own."""
    return {part: array.copy() for part, array in value.items()} if isinstance(value, dict) else value.copy()


def _kept(binding: Binding, inputs: Inputs, first: Run) -> Iterator[str]:
    """Whether results keep their bits when the inputs are overwritten, and when the kernel is called again."""
    if binding.backend.traits.mutable:
        for watch in first.watches:
            watch.spoil(binding.backend)
        if change := difference(first.results, logical(binding, inputs, first.held)):
            yield f"a result shares memory with an input: {change} when the inputs are overwritten"
    for name, value in inputs.operands.items():
        if isinstance(value, Pages) and any(a.any() for a in read(binding, binding.alloc_pages(value.spec)).values()):
            yield f"a new cache of the form of {name} is not zero: it holds what one had that is gone"
    with suppress(DataNotTaken):
        yield from once(binding, replace(inputs, operands=turned(inputs.operands))).trespasses
    if change := difference(first.results, logical(binding, inputs, first.held)):
        yield f"the next call changed a result of this one: {change}"


def turned(operands: Mapping[str, Any]) -> dict[str, Any]:
    """Other legal values of the same form: the rows of every array from the last to the first."""
    return {name: v[::-1].copy() if isinstance(v, np.ndarray) else v for name, v in operands.items()}


def _abreast(binding: Binding, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """Results of the call in several threads, every second with other values, switched as often as Python can."""
    other = turned(inputs.operands)
    for name, value in inputs.operands.items():
        if isinstance(value, Weight):
            other[name] = replace(value, native=value.native[::-1].copy())
    calls = (inputs, replace(inputs, operands=other))
    abreast, interval = Barrier(ABREAST), sys.getswitchinterval()

    def call(n: int) -> dict[str, Any]:
        with suppress(DataNotTaken):  # by the kernel, of the other values
            return once(binding, calls[n % 2], abreast).results
        return {}

    sys.setswitchinterval(1e-6)
    until = time.perf_counter() + PATIENCE / 5
    try:
        with ThreadPoolExecutor(ABREAST) as pool:
            for done in range(ROUNDS.stop):
                if done >= ROUNDS.start and time.perf_counter() > until:
                    return
                yield from list(pool.map(call, range(ABREAST)))[::2]
    finally:
        sys.setswitchinterval(interval)


@contextmanager
def _line_by_line() -> Iterator[None]:
    """At every line of a kernel in Python another thread has its turn, so that what they share is met between any two; at the
    first lines they wait for each other."""
    lines = count()

    def turn(frame: FrameType, event: str, arg: Any) -> Any:
        time.sleep(WAIT if next(lines) < WAITING else 0)
        return turn

    before = sys.gettrace()
    sys.settrace(turn)
    try:
        yield
    finally:
        sys.settrace(before)


def _meet(abreast: Barrier | None) -> None:
    with suppress(BrokenBarrierError):  # another thread has failed, and its error is reported
        if abreast:
            abreast.wait(1)


def _churn(binding: Binding, results: Mapping[str, Any]) -> None:
    """Allocate memory of the results' size and overwrite it: a result whose memory was given back early does not survive."""
    for value in results.values():
        if hasattr(value, "shape") and prod(value.shape) <= SMALL:  # operands have none
            shape, kind = tuple(value.shape), dtype(value)
            binding.backend.write(binding.backend.empty(shape, kind), binding.from_numpy(filled(shape, kind)))


def told(error: BaseException) -> str:
    """What was raised, and where; Failed with CRASH where memory was lacking, in the words of NumPy and PyTorch."""
    if out_of_memory(error):
        raise Failed("CRASH", f"out of memory: {raised(error)}") from error
    return raised(error)
