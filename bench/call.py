"""One call on one backend: judged first, then timed on the same operands."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from porthal.bench.roofline import Work
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.cases.values import Draw
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.call import logical, told
from porthal.conformance.execution.outcome import Outcome, by_kernel, named
from porthal.conformance.judgement.call import judge
from porthal.conformance.level import BRING_UP
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import Backend, Batch, Binding, NotClaimed, Operand, Pages

EVICTED, PARTS = 2**27, 32  # bytes that are copied between two cold calls, at least; such a part fills a core's own cache
LARGE = 2**24  # bytes of a call, besides which it matters little whether its code is still in a cache
PATIENCE = 2.0  # seconds of a call, from which on it is judged by its first results alone


@dataclass(frozen=True)
class Judged:
    """What was found of a call before it is timed: the verdict, whose kernel it is, its work."""

    verdict: str
    message: str
    kernel: str
    provider: str
    work: Work | None = None


class Call:
    """A call whose operands lie on the backend, ready to be repeated; `judged` says whether its time means anything."""

    def __init__(self, case: Case, bindings: Bindings) -> None:
        self.backend = bindings.backend
        self.run: Callable[[], Any] = lambda: None
        self.other: Callable[[], Any] | None = None  # the same call on other memory
        try:
            inputs = apart(build(case))
            bound = bindings.bound(inputs)
        except NotClaimed as refusal:
            self.judged = Judged("UNCLAIMED", str(refusal), "", "")
            return
        work = Work.of(inputs)
        self.run = _ready(inputs, bound.binding)
        self.other = _ready(deepcopy(inputs), bound.binding) if work.bytes < LARGE else None
        judged = self._judged(inputs, bound)
        self.judged = Judged(judged.verdict, judged.message, bound.choice.status, bound.choice.provider, work)

    def _judged(self, inputs: Inputs, bound: Any) -> Judgement:
        try:
            began = perf_counter()
            first = again = self._results(inputs, bound)
            if perf_counter() - began < PATIENCE:
                again = self._results(inputs, bound)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, NotClaimed) and not by_kernel(error):
                return Judgement("UNCLAIMED", str(error))
            try:
                return Judgement("FAIL_ERROR", told(error))
            except Failed as failed:
                return failed.judgement
        flushes = self.backend.traits.flushes_denormals
        return judge(inputs, Outcome(first, again, flushes=flushes), BRING_UP.name, bound.tie)

    def _results(self, inputs: Inputs, bound: Any) -> dict[str, Any]:
        results = logical(bound.binding, inputs, named(bound.binding, inputs.contract, self.run()))
        return {name: value if isinstance(value, dict) else value.copy() for name, value in results.items()}

    def repeat(self, n: int) -> Callable[[], None]:
        """So many calls, one after the other."""
        run = self.run

        def calls() -> None:
            for _ in range(n):
                run()

        return calls


def _ready(inputs: Inputs, binding: Binding) -> Callable[[], Any]:
    """The call on operands of its own."""

    def placed(value: Any) -> Any:
        if value is None:
            return None
        return value.place(binding) if isinstance(value, Operand) else binding.from_numpy(value)

    kernel, attrs = getattr(binding, inputs.case.op), dict(inputs.attrs)
    operands = [placed(value) for value in inputs.operands.values()]
    return lambda: kernel(*operands, **attrs)


def apart(inputs: Inputs) -> Inputs:
    """The same call with pages of its own for every request: shared ones would stay in a cache from one to the next."""
    batch = inputs.batch
    if batch is None or not batch.R:
        return inputs
    held = batch.block_table >= 0
    pages = int(held.sum())
    order = Draw(f"{inputs.case.stream}/apart", (1,)).order(pages + 1).astype(np.int32)
    table = np.full_like(batch.block_table, -1)
    table[held] = order[:pages]
    operands: dict[str, Any] = {}
    for operand in inputs.contract.signature.operands:
        value = inputs.operands[operand.name]
        if isinstance(value, Pages):
            if operand.mutated:  # what a step writes has pages of its own
                return inputs
            value = _moved(value, batch.block_table[held], table[held], pages + 1)
        operands[operand.name] = replace(value, block_table=table) if isinstance(value, Batch) else value
    if not inputs.contract.signature.of_kind("Pages"):
        return inputs
    return replace(inputs, operands=operands, spec=inputs.contract.spec(operands, inputs.attrs))


def _moved(pages: Pages, source: Any, target: Any, n_blocks: int) -> Pages:
    """Pages with each of `source` at its place in `target`; what is left holds NaN, or codes of it, as nothing may read it."""
    size, native = pages.spec.block_size, {}
    for name, array in pages.native.items():
        nothing = 127 if array.dtype.kind in "iu" else np.nan
        blocks = np.full((n_blocks, size, array.shape[1]), nothing, array.dtype)
        blocks[target] = array.reshape(-1, size, array.shape[1])[source]
        native[name] = blocks.reshape(-1, array.shape[1])
    return Pages(replace(pages.spec, n_blocks=n_blocks), native)


def evicting(backend: Backend, holds: float, cores: Sequence[int] = ()) -> Callable[[], None] | None:
    """What empties the caches between two calls: a copy of twice what they hold, and on each of the host's `cores` another one
    for the cache that is its own; None where arrays cannot be changed."""
    if not backend.traits.mutable:
        return None
    block = np.zeros(int(max(EVICTED, 2 * holds)), np.int8).view(np.float32)
    source, target = backend.from_numpy(block), backend.from_numpy(block.copy())
    part = len(block) // PARTS

    def evict() -> None:
        backend.write(target, source)
        for core in cores:
            os.sched_setaffinity(0, {core})
            backend.write(target[:part], source[:part])
        if cores:
            os.sched_setaffinity(0, cores)

    evict()  # gets its memory
    return evict
