"""Two backends in one: every op runs on a backend and on the reference side by side, in four lanes of values.

reference  what the references compute, each result rounded once
local      the backend on the reference's values: the error of an op is its own
forced     the backend's own values under the reference's discrete choices: the error that accumulates
free       the backend's own values and choices

A model loaded on `binding(Lockstep(theirs))` computes all four at once; `Lockstep.calls` has each call's findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from porthal.conformance.cases.inputs import Array, Inputs, observed, specified_rows, written_slots
from porthal.conformance.diff.suspects import suspect
from porthal.conformance.execution.outcome import Outcome, bits, by_kernel, named, raised
from porthal.conformance.execution.placing import read
from porthal.conformance.judgement.call import judge
from porthal.conformance.judgement.golden import Golden
from porthal.conformance.judgement.measures import tiny
from porthal.conformance.level import BRING_UP
from porthal.conformance.verdicts import Judgement
from porthal.hal import (
    Backend,
    Batch,
    Binding,
    NotClaimed,
    Operand,
    Pages,
    PagesSpec,
    Recorder,
    Selection,
    Weight,
    WeightSpec,
    bind,
)
from porthal.hal.backend import Read
from porthal.hal.contract import Contract
from porthal.hal.dtypes import dtype, is_float, narrow, widen

Named = dict[str, Any]
REFERENCE, LOCAL, FORCED, FREE = range(4)


class Lanes:
    """One value in every lane: arrays, which model code may slice and reshape, or operands."""

    def __init__(self, *each: Any) -> None:
        self.each = each

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.each[REFERENCE].shape)

    def reshape(self, *shape: int) -> Lanes:
        return Lanes(*(x.reshape(*shape) for x in self.each))

    def __getitem__(self, key: Any) -> Lanes:
        return Lanes(*(x[key] for x in self.each))


class Prepared(Lanes):
    """A weight in every lane, and what is wrong with the backend's."""

    fault = ""


class Cached(Lanes):
    """A cache in every lane, and the call that wrote it last with its inputs."""

    writer: tuple[Call, Inputs] | None = None


@dataclass
class Call:
    """One op of the model: its local verdict, its accumulated error, and how many rows chose differently when free.

    place        layer, then the op inside its composites: ("layer 1", "index_prolog", "rope")
    worst        the largest local |e| / B, found `at`
    accumulated  root mean square of forced - reference over that of the reference, the worst of the float results
    honest       rows whose different choice is right for the free lane's own scores while every op kept its budget
    wrong        other rows with a different choice
    fault        why the op is at fault, or ""
    inputs, returned  of a call at fault: the reference lane's operands, and what the backend made of them
    """

    step: int
    place: tuple[str, ...]
    worst: float = 0.0
    at: str = ""
    accumulated: float | None = None
    honest: int = 0
    wrong: int = 0
    fault: str = ""
    inputs: Inputs | None = field(default=None, repr=False)
    returned: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def layer(self) -> str:
        return self.place[0]

    @property
    def op(self) -> str:
        return self.place[-1]

    @property
    def label(self) -> str:
        return " / ".join(self.place)

    def blame(self, fault: str, inputs: Inputs, returned: Mapping[str, Any]) -> None:
        """Mark the call as at fault; the first reason is kept."""
        if not self.fault:
            self.fault, self.inputs, self.returned = fault, inputs, returned


class Halt(Exception):
    """A kernel raised, or returned something of another form: there is no value to continue with."""


class Lockstep(Backend):
    """Runs the binding `theirs` beside the reference; local results are judged at a conformance level."""

    name = "lockstep"

    def __init__(self, theirs: Binding, level: str = BRING_UP.name) -> None:
        super().__init__()
        self.theirs, self.level = theirs, level
        self.ours = bind("reference", overrides={}, fallback="error", check=False)
        self.calls: list[Call] = []
        self.step = 0
        self._layers = ["head"]
        self.recorder = Recorder()
        self._written: list[Pages] = []

    @property
    def at_fault(self) -> Call | None:
        """The first call at fault, in the order of execution."""
        return next((c for c in self.calls if c.fault), None)

    # -- where we are ------------------------------------------------------------------------------------------------

    @contextmanager
    def inside(self, layer: str) -> Iterator[None]:
        """Calls made meanwhile belong to this layer."""
        self._layers.append(layer)
        try:
            yield
        finally:
            self._layers.pop()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """One step; at its end every cache it wrote is compared as a whole. Calls up to the next step belong to it."""
        self.step += bool(self.calls)
        yield
        for pages in self._written:
            self._check_writer(pages)
        self._written.clear()

    # -- services ----------------------------------------------------------------------------------------------------

    def from_numpy(self, x: Array) -> Lanes:
        return Lanes(x, *(self.theirs.from_numpy(x.copy()) for _ in range(3)))

    def to_numpy(self, x: Lanes) -> Array:
        """The reference's values, so that every lane continues with the same tokens."""
        return np.asarray(self.ours.to_numpy(x.each[REFERENCE]))

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        planned = self.theirs.plan(batch)
        return batch.with_native(Lanes(self.ours.plan(batch), planned, planned, planned))

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        return Pages(spec, Cached(self.ours.alloc_pages(spec), *(self.theirs.alloc_pages(spec) for _ in range(3))))

    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        ours = self.ours.prepare(spec, read, into and into.native.each[REFERENCE])
        theirs = self.theirs.prepare(spec, read, into and into.native.each[LOCAL])
        prepared = Prepared(ours, theirs, theirs, theirs)
        held = self.theirs.to_logical(theirs)
        found = ((part, _differs(array, held[part])) for part, array in self.ours.to_logical(ours).items())
        prepared.fault = next((f"{part}{differs}" for part, differs in found if differs), "")
        return Weight(spec, prepared)

    # -- ops ---------------------------------------------------------------------------------------------------------

    def derive(self, contract: Contract) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            out = tuple(self._run(contract, *contract.arrange(args, kwargs)).values())
            return out if len(out) > 1 else out[0]

        return kernel

    def _run(self, contract: Contract, operands: Named, attrs: Named) -> Named:
        call = Call(self.step, (self._layers[-1], *self.recorder.path))
        self.calls.append(call)
        inputs = self._inputs(contract, operands, attrs, REFERENCE)
        ours = self._execute(inputs, operands, REFERENCE)
        try:
            return self._compared(call, inputs, operands, ours)
        except (Halt, NotClaimed):
            raise
        except Exception as error:  # what a kernel returned cannot be read or continued with
            call.blame(f"it led to {raised(error)}", inputs, {})
            raise Halt from error

    def _compared(self, call: Call, inputs: Inputs, operands: Named, ours: Named) -> Named:
        """What the op gives in every lane, beside what the reference gives."""
        contract = inputs.contract
        local = self._judged(call, inputs, operands)
        outs = [ours, local, *(self._attempt(call, inputs, operands, lane) for lane in (FORCED, FREE))]
        call.accumulated = self._accumulated(inputs, ours, outs[FORCED])
        if contract.choice:
            self._choices(call, inputs, operands, outs)
        made: Named = {}
        for result in contract.signature.results:
            each = [out[result.name] for out in outs]
            if result.mutated:
                made[result.name] = self._kept(call, inputs, operands[result.name], each)
            elif result.kind == "Selection":
                made[result.name] = Selection(each[REFERENCE].spec, Lanes(*each))
            else:
                each[LOCAL] = self.theirs.from_numpy(each[REFERENCE].copy())
                made[result.name] = Lanes(*each)
        return made

    def _execute(self, inputs: Inputs, operands: Named, lane: int) -> Named:
        binding, contract = self.ours if lane == REFERENCE else self.theirs, inputs.contract
        with np.errstate(all="ignore"):
            out = getattr(binding, contract.name)(*(_of(v, lane) for v in operands.values()), **inputs.attrs)
        return named(binding, contract, out)

    def _attempt(self, call: Call, inputs: Inputs, operands: Named, lane: int) -> Named:
        try:
            return self._execute(inputs, operands, lane)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, NotClaimed) and not by_kernel(error):
                raise
            what = "" if lane == LOCAL else "when given the backend's own values, "
            call.blame(f"{what}it raised {raised(error)}", inputs, {})
            raise Halt from error

    def _inputs(self, contract: Contract, operands: Named, attrs: Named, lane: int) -> Inputs:
        """A lane's operands in logical form; the reference's with its weights widened, as goldens take them."""
        return observed(contract, {name: self._input(value, lane) for name, value in operands.items()}, attrs)

    def _input(self, value: Any, lane: int) -> Any:
        if isinstance(value, (Weight, Batch)):
            return _of(value, REFERENCE)
        if isinstance(value, Selection) and lane == REFERENCE:
            lane = LOCAL  # the same positions, in the order of the backend
        return _logical(self.ours if lane == REFERENCE else self.theirs, _of(value, lane))

    # -- the local lane ----------------------------------------------------------------------------------------------

    def _judged(self, call: Call, inputs: Inputs, operands: Named) -> Named:
        """Run the local lane and judge it. A cache that its writer has corrupted is repaired before it is read."""
        for pages in _read(inputs, operands).values():
            self._check_writer(pages)
        local = self._attempt(call, inputs, operands, LOCAL)
        judgement, returned = self._judge(inputs, local, self._changed(inputs, operands))
        call.worst, call.at = float(judgement.worst), judgement.at
        for name, value in operands.items():
            if isinstance(value, Weight) and value.native.fault:
                call.blame(f"its weight {name} was prepared wrongly: {value.native.fault}", inputs, returned)
        if judgement.verdict != "PASS":
            call.blame(judgement.message + self._suspect(inputs, operands), inputs, returned)
        if judgement.verdict == "FAIL_SHAPE":
            raise Halt
        return local

    def _suspect(self, inputs: Inputs, operands: Named) -> str:
        """Whose scales or codes are at fault, in words, where a call under schemes is the first that is."""
        contract, attrs = inputs.contract, dict(inputs.attrs)

        def right(changed: Mapping[str, Any]) -> bool:
            given = [
                _of(operands[name], LOCAL) if value is inputs.operands[name] else value.place(self.theirs)
                for name, value in changed.items()
            ]
            out = named(self.theirs, contract, getattr(self.theirs, contract.name)(*given, **attrs))
            return self._judge(observed(contract, changed, attrs), out)[0].verdict == "PASS"

        return "" if self.at_fault else suspect(inputs.operands, right)

    def _judge(self, inputs: Inputs, out: Named, changed: tuple[str, ...] = ()) -> tuple[Judgement, Named]:
        """The verdict on a lane's results given its inputs, and the results in logical form."""
        returned: Named = {}
        for result in inputs.contract.signature.results:
            value = out[result.name]
            if not result.mutated:
                returned[result.name] = read(self.theirs, value)
                continue
            before = inputs.operands[result.name]
            after = {name: array.copy() for name, array in before.native.items()}
            for rows in _written(inputs, before):
                for name, part in self._rows(value, rows).items():
                    after[name][rows] = part
            returned[result.name] = after
        tie = self.theirs.choices[inputs.contract.name].tie
        flushes = self.theirs.backend.traits.flushes_denormals
        return judge(inputs, Outcome(returned, returned, changed, flushes=flushes), self.level, tie), returned

    def _changed(self, inputs: Inputs, operands: Named) -> tuple[str, ...]:
        """What a kernel wrote though it may only read it; a cache is repaired."""
        found = {name: self._repaired(pages)[0] for name, pages in _read(inputs, operands).items()}
        for name, value in operands.items():
            if isinstance(value, Lanes):
                found[name] = _differs(inputs.operands[name], self.theirs.to_numpy(value.each[LOCAL]))
            elif isinstance(value, Selection):
                before, after = inputs.operands[name].parts(), _logical(self.theirs, _of(value, LOCAL)).parts()
                found[name] = next((f".{part}{d}" for part in before if (d := _differs(before[part], after[part]))), "")
        return tuple(f"its input {name}{differs}" for name, differs in found.items() if differs)

    # -- the other lanes ---------------------------------------------------------------------------------------------

    def _accumulated(self, inputs: Inputs, ours: Named, forced: Named) -> float | None:
        found = []
        for result in inputs.contract.signature.results:
            rows, g = specified_rows(inputs), ours[result.name]
            if isinstance(g, np.ndarray) and is_float(dtype(g)) and g[:rows].size:
                y, g = (widen(v)[:rows] for v in (self.theirs.to_numpy(forced[result.name]), g))
                there = np.isfinite(g)
                with np.errstate(all="ignore"):
                    off = np.sqrt(np.sum((y - g)[there] ** 2) / max(np.sum(g[there] ** 2), tiny("float32")))
                found.append(float(np.nan_to_num(off, nan=np.inf)))
        return max(found, default=None)

    def _choices(self, call: Call, inputs: Inputs, operands: Named, outs: list[Named]) -> None:
        """Compare every lane's choice with the reference's; the local and forced lanes continue with that."""
        contract, name = inputs.contract, inputs.contract.choice
        wanted = _logical(self.ours, outs[REFERENCE][name])
        flipped = [_flipped(contract, wanted, _logical(self.theirs, out[name])) for out in outs[LOCAL:]]
        for lane in (LOCAL, FORCED):
            if not flipped[lane - LOCAL].any():  # then the backend keeps its own form of a selection
                continue
            outs[lane][name] = self._placed(wanted)
            if lane == FORCED and contract.finish:
                own = self._inputs(contract, operands, dict(inputs.attrs), FORCED)
                golden = Golden(own)
                for other, value in golden.call(contract.finish, wanted).items():
                    outs[lane][other] = self.theirs.from_numpy(narrow(value, golden.shapes[other][1]))
        if count := int(flipped[FREE - LOCAL].sum()):
            own = self._inputs(contract, operands, dict(inputs.attrs), FREE)
            right = self._judge(own, outs[FREE])[0].verdict == "PASS"
            call.honest, call.wrong = (count, 0) if right and not self.at_fault else (0, count)

    def _placed(self, value: Any) -> Any:
        return value.place(self.theirs) if isinstance(value, Operand) else self.theirs.from_numpy(value.copy())

    # -- caches ------------------------------------------------------------------------------------------------------

    def _plain(self, pages: Pages) -> bool:
        """Whether the fields can be read and written slot by slot."""
        form = Pages.form(pages.spec)
        return all(name in pages.native and tuple(pages[name].shape) == shape for name, (shape, _) in form.items())

    def _rows(self, pages: Pages, rows: slice) -> dict[str, Array]:
        """Some slots of a cache of the backend, in logical form."""
        if not self._plain(pages):
            return {name: whole[rows] for name, whole in self.theirs.to_logical(pages).items()}
        form = Pages.form(pages.spec)
        return {name: _held(self.theirs.to_numpy(pages[name][rows]), kind) for name, (_, kind) in form.items()}

    def _kept(self, call: Call, inputs: Inputs, before: Pages, each: list[Pages]) -> Pages:
        """The cache after a write; its local lane gets the reference's rows where they differ."""
        spec, ours, local = before.spec, each[REFERENCE], each[LOCAL]
        for rows in _written(inputs, before):
            wanted = {name: _held(ours[name][rows], kind) for name, (_, kind) in Pages.form(spec).items()}
            found = self._rows(local, rows)
            if not any(_differs(part, found[name]) for name, part in wanted.items()):
                continue
            if not self._plain(local) or not self.theirs.backend.traits.views_alias:
                each[LOCAL] = self.theirs.from_logical(spec, self.ours.to_logical(ours), local)
                break
            for name, part in wanted.items():
                self.theirs.backend.write(local[name][rows], self.theirs.from_numpy(part))
        kept = Pages(spec, Cached(*each))
        kept.native.writer = call, inputs
        self._written = [*(p for p in self._written if p.native is not before.native), kept]
        return kept

    def _repaired(self, pages: Pages) -> tuple[str, Named]:
        """Where the local cache was not the reference's, in words, and what it was; it is now."""
        cached = pages.native
        wanted, found = self.ours.to_logical(cached.each[REFERENCE]), self.theirs.to_logical(cached.each[LOCAL])
        differs = next((f".{name}{d}" for name in wanted if (d := _differs(wanted[name], found[name]))), "")
        if differs:
            repaired = self.theirs.from_logical(pages.spec, wanted, cached.each[LOCAL])
            cached.each = (cached.each[REFERENCE], repaired, *cached.each[FORCED:])
        return differs, found

    def _check_writer(self, pages: Pages) -> None:
        """Repair a cache that changed outside what was written since others looked, and blame its last writer."""
        differs, found = self._repaired(pages)
        if differs and pages.native.writer:
            call, inputs = pages.native.writer
            result = inputs.contract.signature.mutated[0].name
            call.blame(f"{result}{differs} outside the slots it writes", inputs, {result: found})


def binding(lockstep: Lockstep) -> Binding:
    """The ops of a lockstep: what the backend's binding composes is composed here too, so that its parts are judged."""
    composed = {op: "composed" for op, c in lockstep.theirs.choices.items() if c.status == "composed"}
    return bind(backend=lockstep, overrides=composed, fallback="error", check=False, wrap=[lockstep.recorder])


def _of(value: Any, lane: int) -> Any:
    """An operand of the model in one lane."""
    if isinstance(value, Lanes):
        return value.each[lane]
    return None if value is None else value.native.each[lane]


def _logical(binding: Binding, value: Any) -> Any:
    """A value of a binding as inputs hold it."""
    if value is None:
        return None
    found = read(binding, value)
    if isinstance(value, Operand):
        return value.of(value.spec, {part: array.copy() for part, array in found.items()})
    return found.copy()


def _held(array: Array, kind: str) -> Array:
    """A part of a cache as a logical form holds it."""
    return array if dtype(array) == kind else narrow(array, kind)


def _read(inputs: Inputs, operands: Named) -> dict[str, Pages]:
    """The caches that a call reads and does not write."""
    mutated = {o.name for o in inputs.contract.signature.mutated}
    return {name: v for name, v in operands.items() if isinstance(v, Pages) and name not in mutated}


def _differs(wanted: Array, found: Array) -> str:
    """Where an array is not what is wanted, bit for bit, in words; "" where it is."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return f" is {dtype(found)} {list(found.shape)}, expected {dtype(wanted)} {list(wanted.shape)}"
    odd = bits(wanted) != bits(found)
    if not odd.any():
        return ""
    at = tuple(int(i[0]) for i in np.nonzero(odd))
    return f"{list(at)} is {found[at]}, expected {wanted[at]}"


def _flipped(contract: Contract, wanted: Any, found: Any) -> Array:
    """bool [rows]: which rows made another choice; the order inside a top-k is free."""
    a, b = (v.native.indices if isinstance(v, Selection) else v.reshape(len(v), -1) for v in (wanted, found))
    if contract.admits is None:
        a, b = np.sort(a, axis=1), np.sort(b, axis=1)
    return np.asarray((a != b).any(axis=1))


def _written(inputs: Inputs, pages: Pages) -> list[slice]:
    """The slots that a call may write, as runs."""
    edges = np.flatnonzero(np.diff(written_slots(inputs, pages), prepend=False, append=False))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]
