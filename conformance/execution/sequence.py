"""Runs a program: calls one after the other, on operands that stay where they are and results that are held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.steps import (
    first,
    grown,
    other,
    otherwise,
    pages_of,
    rearranged,
    regrown,
    repaged,
    reparted,
    scenario,
    shorter,
)
from porthal.conformance.execution.bindings import Bindings, Bound
from porthal.conformance.execution.call import Run, called, logical, told, turned
from porthal.conformance.execution.outcome import Outcome, by_kernel, difference
from porthal.conformance.execution.placing import Watch, place, unwritten
from porthal.conformance.verdicts import Failed
from porthal.hal import (
    Batch,
    Binding,
    DataNotTaken,
    NotClaimed,
    Operand,
    Rows,
    Selection,
    SelectionSpec,
    contracts,
    create,
)
from porthal.hal.signature import ARRAY

JUDGED = 2**18  # most elements of a large call whose values are judged, if it has no small golden: others judge its values


@dataclass(frozen=True)
class Step:
    """One call of a program: what it is called, what it really got, what came of it, by which kernel; `judged` by value,
    or only watched."""

    label: str
    inputs: Inputs
    outcome: Outcome
    bound: Bound
    judged: bool = True


class Stage:
    """The operands of one call where a backend keeps them, from call to call."""

    def __init__(self, bindings: Bindings, inputs: Inputs, given: Mapping[str, Any] | None = None) -> None:
        self.bindings, self.inputs = bindings, inputs
        binding, there = self.bound.binding, given or {}
        self.placed = {
            name: there[name] if name in there else place(binding, name, value)[0] for name, value in inputs.operands.items()
        }

    @property
    def bound(self) -> Bound:
        return self.bindings.bound(self.inputs)

    def write(self, inputs: Inputs) -> None:
        """Other values into the same memory; what is the same object stays, a plan of the same batch too."""
        before, self.inputs = self.inputs.operands, inputs
        for name, value in inputs.operands.items():
            if value is not before[name]:
                self.placed[name] = self._written(name, before[name], value)

    def _written(self, name: str, before: Any, value: Any) -> Any:
        binding, now = self.bound.binding, self.placed[name]
        if value is None or isinstance(value, Batch) or now is None:
            return place(binding, name, value)[0]
        if not isinstance(value, Operand):
            if before.shape != value.shape or before.dtype != value.dtype:
                return place(binding, name, value)[0]
            return binding.backend.write(now, binding.from_numpy(value.copy()))
        if before.spec != value.spec:
            return place(binding, name, value)[0]
        made = value.place(binding, now)
        if wrong := unwritten(binding, name, value, made):
            raise Failed("FAIL_VALUE", wrong)
        return made


@dataclass
class Program:
    """The calls of one program so far, and the results that are held."""

    bindings: Bindings
    case: Case
    kept: list[tuple[str, Binding, Inputs, Run]] = field(default_factory=list)
    count: int = 0

    def stage(self, inputs: Inputs) -> Stage:
        return Stage(self.bindings, inputs)

    def call(self, stage: Stage, label: str, judged: bool = True) -> Step:
        """One call; earlier results are looked at again, and the caches that it has written are those of the next."""
        bound, inputs = stage.bound, stage.inputs
        binding, mutated = bound.binding, {o.name for o in inputs.contract.signature.mutated}
        watches = []
        for name, value in inputs.operands.items():
            placed = stage.placed[name]
            if isinstance(value, Operand) and name not in mutated:
                what = f"{type(value).__name__.lower()} {name}"
                watches.append(Watch.over(binding.backend, what, placed, value.parts()))
            elif value is not None and not isinstance(value, Operand):
                watches.append(Watch(f"input {name}", placed, {"": value}))
        try:
            run = called(binding, inputs, stage.placed, watches)
            trespasses = [*run.trespasses, *self._changed()]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, NotClaimed) and not by_kernel(error):
                raise
            return Step(label, inputs, Outcome(error=told(error)), bound)
        self.count += 1
        held, results = ({n: v for n, v in found.items() if n not in mutated} for found in (run.held, run.results))
        self.kept.append((f"step {self.count}", binding, inputs, replace(run, held=held, results=results)))
        operands = dict(inputs.operands)
        for name in mutated:
            stage.placed[name] = run.held[name]
            operands[name] = replace(operands[name], native=run.results[name])
        stage.inputs = replace(inputs, operands=operands)
        unread = tuple(dict.fromkeys(what for watch in watches for what in watch.unread))
        flushes = binding.backend.traits.flushes_denormals
        outcome = Outcome(run.results, run.results, tuple(trespasses), flushes=flushes, unread=unread)
        return Step(label, inputs, outcome, bound, judged)

    def selected(self, step: Step) -> tuple[Selection, Any]:
        """The selection that the last step has made: in logical form, and as the backend holds it."""
        (result,) = (r.name for r in step.inputs.contract.signature.results if r.kind == "Selection")
        parts = step.outcome.results.get(result)
        if not parts:
            raise Failed("FAIL_ERROR", step.outcome.error or "it gave no selection")
        spec = SelectionSpec(*parts["indices"].shape)
        return Selection(spec, Rows(parts["indices"], parts["length"])), self.kept[-1][3].held[result]

    def _changed(self) -> Iterator[str]:
        for label, binding, inputs, run in self.kept:
            if change := difference(run.results, logical(binding, inputs, run.held)):
                yield f"the call changed a result of {label} that is still held: {change}"


# -- programs ------------------------------------------------------------------------------------------------------------


def _second(case: Case, one: Inputs) -> Inputs:
    return other(case, 1, one.batch and rearranged(one.batch))


def _update(program: Program) -> Iterator[Step]:
    one = first(program.case)
    two, stage = _second(program.case, one), program.stage(one)
    yield program.call(stage, "the first values")
    stage.write(two)
    yield program.call(stage, "new values in the same memory")
    stage.write(one)
    yield program.call(stage, "the first values again")
    for what, inputs in () if one.batch else otherwise(program.case, None):
        stage.write(inputs)
        yield program.call(stage, f"the same memory {what}")


def _plans(program: Program) -> Iterator[Step]:
    one = first(program.case)
    a = program.stage(one)
    yield program.call(a, "the first plan")
    assert one.batch  # what is planned next has the same lengths, by which a kept plan may be found
    yield program.call(program.stage(other(program.case, 2, repaged(one.batch))), "a plan of other pages")
    yield program.call(program.stage(_second(program.case, one)), "a second plan")
    yield program.call(program.stage(other(program.case, 3, reparted(one.batch))), "a plan of other rows")
    yield program.call(a, "the first plan again")
    for what, inputs in otherwise(program.case, one.batch):
        carried = {n: v for n, v in a.inputs.operands.items() if isinstance(v, Batch)}
        a.write(replace(inputs, operands={**inputs.operands, **carried}))
        yield program.call(a, f"the first plan {what}")


def _rewrite(program: Program) -> Iterator[Step]:
    one = first(program.case)
    name, stage = pages_of(one.contract), program.stage(one)
    yield program.call(stage, "the first pages")
    two = other(program.case, 1, one.batch)
    stage.write(replace(one, operands={**one.operands, name: two.operands[name]}))
    yield program.call(stage, "the pages rewritten")


def _drafts(program: Program) -> Iterator[Step]:
    one = first(program.case)
    name, stage = pages_of(one.contract), program.stage(one)
    mutated = bool(one.contract.signature.mutated)
    assert one.batch
    long, short = one.batch, shorter(one.batch)
    for n, batch, label in ((0, long, "with drafts"), (1, short, "drafts dropped"), (2, long, "grown again")):
        if n:
            inputs, before = other(program.case, n, batch), stage.inputs.operands[name]
            pages = before if mutated or batch is short else regrown(before, inputs.operands[name], short)
            stage.write(replace(inputs, operands={**inputs.operands, name: pages}))
        yield program.call(stage, label)


def _held(program: Program) -> Iterator[Step]:
    one, case = first(program.case), program.case
    stage = program.stage(one)
    small = elements(case) <= JUDGED or bool(case.distinct)
    yield program.call(stage, "a result that is held", judged=small)
    with suppress(DataNotTaken):
        stage.write(replace(one, operands={n: v if v is None else turned({n: v})[n] for n, v in stage.inputs.operands.items()},
                            copies=None))  # fmt: skip
        yield program.call(stage, "other values in the same shape", judged=False)
    rows = case.contract.rows
    if dict(case.dims).get(rows, 0) > 1:
        fewer = replace(case, dims=tuple((n, v - (n == rows)) for n, v in case.dims))
        yield program.call(program.stage(first(replace(fewer, seed=case.seed + 2))), "another shape", judged=False)
    yield program.call(stage, "the second call again", judged=False)


def _models(program: Program) -> Iterator[Step]:
    one = first(program.case)
    stages = {"the first weights": program.stage(one), "others of their shape": program.stage(_second(program.case, one))}
    if sibling := _sibling(program.bindings):
        stages["a second instance of the backend"] = Stage(sibling, other(program.case, 2, one.batch))
    for again in ("", " again"):
        for what, stage in stages.items():
            yield program.call(stage, what + again)


def _sibling(bindings: Bindings) -> Bindings | None:
    """Bindings of another instance of the backend on the same device."""
    for make in (type(bindings.backend), lambda: create(str(bindings.backend))):
        with suppress(Exception):
            made = make()
            if type(made) is type(bindings.backend) and str(made) == str(bindings.backend):
                return Bindings(made)
    return None


def _reuse(program: Program) -> Iterator[Step]:
    calls = scenario(program.case)
    attend, write = first(calls["attend"]), first(calls["write"])
    batch, cache, sel = attend.batch, pages_of(attend.contract), _named(attend, "Selection")
    assert batch

    def name(role: str, later: str = "") -> str:
        return calls[role].op + later

    def plan(stage: Stage, inputs: Inputs) -> dict[str, Any]:
        """The plan of another stage, for a call on the same batch."""
        return {_named(inputs, "Batch"): stage.placed[_named(stage.inputs, "Batch")]}

    def like(inputs: Inputs, chosen: Any, pages: Any) -> Inputs:
        return _with(inputs, {sel: chosen, cache: pages, _named(inputs, "Batch"): inputs.batch})

    writing = program.stage(_with(write, {pages_of(write.contract): attend.operands[cache], _named(write, "Batch"): batch}))
    yield program.call(writing, name("write"))
    pages, there = (where[pages_of(write.contract)] for where in (writing.inputs.operands, writing.placed))
    select = other(calls["select"], 0, batch)
    selecting = Stage(program.bindings, select, plan(writing, select))
    yield (step := program.call(selecting, name("select")))
    chosen, on_chip = program.selected(step)
    attend = like(attend, chosen, pages)
    attending = Stage(program.bindings, attend, {**plan(writing, attend), sel: on_chip, cache: there})
    yield program.call(attending, name("attend"))

    later = grown(batch)
    rows = np.maximum(batch.last_rows, 0).astype(np.int32)
    (many,) = (o for o in contracts()[calls["pick"].op].signature.of_kind(ARRAY))
    pick = first(_sized(calls["pick"], **{many.dims[0]: len(rows)}))
    pick = _with(pick, {_named(pick, "Selection"): chosen, many.name: rows})
    yield (step := program.call(Stage(program.bindings, pick, {_named(pick, "Selection"): on_chip}), name("pick")))
    picked, held = program.selected(step)
    few = {attend.contract.rows: later.T}
    more = other(replace(_sized(calls["write"], **few), batch="decode"), 1, later)
    writing.write(_with(more, {pages_of(more.contract): pages}))
    yield program.call(writing, name("write", " a step later"))
    pages, there = (where[pages_of(write.contract)] for where in (writing.inputs.operands, writing.placed))
    after = like(other(replace(_sized(calls["attend"], **few), batch="decode"), 1, later), picked, pages)
    stage = Stage(program.bindings, after, {**plan(writing, after), sel: held, cache: there})
    yield program.call(stage, name("attend", " a step later, with the rows that were selected"))
    longer = other(replace(_sized(calls["select"], **few), batch="decode"), 1, later)
    yield program.call(Stage(program.bindings, longer, plan(stage, longer)), name("select", " a step later"))
    layer = other(calls["attend"], 2, attending.inputs.batch)
    attending.write(like(layer, chosen, layer.operands[cache]))
    yield program.call(attending, name("attend", " of a later layer, which shares the selection"))


def _named(inputs: Inputs, kind: str) -> str:
    """The name of a call's operand of a kind."""
    return inputs.contract.signature.of_kind(kind)[0].name


def _sized(case: Case, **sizes: int) -> Case:
    return replace(case, dims=tuple((name, sizes.get(name, size)) for name, size in case.dims))


def _with(inputs: Inputs, operands: Mapping[str, Any]) -> Inputs:
    """A call with some of its operands replaced."""
    found = {**inputs.operands, **operands}
    return replace(inputs, operands=found, spec=inputs.contract.spec(found, inputs.attrs))


STEPS: Mapping[str, Callable[[Program], Iterator[Step]]] = {
    "update": _update,
    "plans": _plans,
    "rewrite": _rewrite,
    "drafts": _drafts,
    "held": _held,
    "models": _models,
    "reuse": _reuse,
}


def steps(bindings: Bindings, case: Case) -> Iterator[Step]:
    """The steps of a case's program, each after it has run; Failed where new values were not written."""
    program = Program(bindings, case)
    try:
        yield from STEPS[case.seq](program)
    except Failed as failed:
        raise Failed(failed.judgement.verdict, f"step {program.count + 1}: {failed}") from None
