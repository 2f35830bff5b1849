"""Execution: a case's inputs on a backend, its kernel run again and among other rows, all that must not change watched."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from threading import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np

from porthal.conformance.beyond import Beyond
from porthal.conformance.cases import BEYOND, FAR, THREADS, Case, elements
from porthal.conformance.inputs import Array, Inputs, build
from porthal.conformance.invariance import brought_back, disturbed
from porthal.conformance.judge import Outcome, bits, difference, judge
from porthal.conformance.plan import Level, cases
from porthal.conformance.report import Facts, Report, Result
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import (
    Backend,
    Batch,
    Binding,
    CallSpec,
    NotClaimed,
    Pages,
    Rows,
    Selection,
    UsageError,
    Weight,
    bind,
    contracts,
)
from porthal.hal.abstract import Abstract
from porthal.hal.binding import Choice, Function
from porthal.hal.dtypes import dtype, is_float, numpy_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from porthal.conformance.workers import Bounds

Progress = Callable[[int, int, Result], None]
Returned = Callable[[Mapping[str, Any]], None]  # results in logical form by name
RUNS: Mapping[str, int] = {"bring-up": 2, "standard": 3, "strict": 50}  # of a kernel on the same inputs
PATIENCE = 0.5  # seconds, after which two runs have to do
SMALL = 2**17  # elements of a case after which another call follows, to see that results keep their bits
ABREAST = 4  # threads that call a kernel at once, and
ROUNDS = 3  # how often
MARGIN = 64  # poisoned elements on both sides of what a backend allocates


# -- running -----------------------------------------------------------------------------------------------------------


def run(
    backend: str | Backend,
    ops: Sequence[str] | None = None,
    level: Level = "bring-up",
    dtypes: Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    isolate: bool = True,
    emulated: bool = False,
    bounds: Bounds | None = None,
    journal: Path | None = None,
    resume: bool = False,
    properties: int = 0,
    seed: int = 0,
) -> Report:
    """Every case of the ops (None: all) at a level, on one backend; `progress(done, of, result)` after each.

    A backend given by name runs in worker processes within `bounds`, unless `isolate` is False; an instance runs here.
    `journal` keeps each verdict as it comes, and with `resume` those already there are not asked for again.
    `properties` draws that many further cases per op, the same for the same `seed`, and reports the smallest that fails.
    """
    from porthal.conformance.journal import Journal
    from porthal.conformance.workers import Bounds, Pool, machine

    known = contracts()
    for op in ops or ():
        if op not in known:
            raise UsageError(f"unknown op {op!r}: known are {', '.join(known)}")
    plan = [case for op in ops or known for case in cases(known[op], level, dtypes)]
    results: dict[str, Result] = {}
    with ExitStack() as stack:
        if isinstance(backend, str) and isolate:
            pool = stack.enter_context(Pool(backend, level, emulated, bounds or Bounds(), len(plan)))
            facts, judged, one = pool.facts, pool.judged, pool.one
        else:
            bench = Bench(machine(backend, emulated) if isinstance(backend, str) else backend)
            facts = Facts.of(bench.machine)
            one = lambda case: check(case, bench, level)  # noqa: E731
            judged = lambda cases: map(one, cases)  # noqa: E731
        kept = stack.enter_context(closing(Journal(journal, facts, level, resume))) if journal else None
        if kept:
            results = {case.token: kept.known[case.token] for case in plan if case.token in kept.known}
        for result in judged([case for case in plan if case.token not in results]):
            results[result.token] = result
            if kept:
                kept.add(result)
            if progress:
                progress(len(results), len(plan), result)
        drawn = _drawn(ops or known, properties, seed, dtypes, one, progress) if properties else []
    return Report.of(facts, level, [*(results[case.token] for case in plan), *drawn])


def _drawn(
    ops: Iterable[str],
    n: int,
    seed: int,
    dtypes: Sequence[str] | None,
    one: Callable[[Case], Result],
    progress: Progress | None,
) -> list[Result]:
    """Results of property-based cases, op by op."""
    from porthal.conformance.properties import search

    found: list[Result] = []
    for at, op in enumerate(names := list(ops)):
        found += search(contracts()[op], n, one, seed, dtypes)
        if progress and found:
            progress((at + 1) * n, len(names) * n, found[-1])
    return found


def replay(
    call: str | Inputs,
    backend: str | Backend,
    level: Level = "bring-up",
    *,
    isolate: bool = True,
    emulated: bool = False,
    returned: Returned | None = None,
) -> Result:
    """One case again, bit for bit, by its token or with given inputs; `Result.explain()` says in words what came out.

    Isolated as in `run`. `returned` hears the results, where there are any.
    """
    from porthal.conformance.workers import Bounds, Pool, machine

    case, inputs = (call.case, call) if isinstance(call, Inputs) else (Case.from_token(call), None)
    if isinstance(backend, str) and isolate:
        with Pool(backend, level, emulated, Bounds(), 1) as pool:
            return pool.one(case, inputs, returned)
    bench = Bench(machine(backend, emulated) if isinstance(backend, str) else backend)
    return check(case, bench, level, inputs=inputs, returned=returned)


def check(
    case: Case,
    bench: Bench,
    level: Level = "bring-up",
    chosen: Callable[[Choice], None] | None = None,
    inputs: Inputs | None = None,
    returned: Returned | None = None,
) -> Result:
    """Build (unless there are `inputs`), execute, judge: one case's verdict.

    `chosen` hears whose kernel it will be before that is called, `returned` the results before they are judged.
    """
    started = time.perf_counter()
    choice: Choice | None = None
    foreign: tuple[str, ...] = ()
    try:
        inputs = inputs or build(case)
        binding = bench.binding(inputs)
        choice = binding.choices[case.op]
        made_of = [binding.choices[op] for op in (parts(inputs) if choice.status == "composed" else (case.op,))]
        foreign = tuple(c.op for c in made_of if c.status not in ("own", "composed"))
        if chosen:
            chosen(choice)
        if case.fault:
            verdict = _judge_fault(inputs, _mistake(bench.binding(inputs, checked=True), inputs))
        else:
            call = disturbed(inputs)  # before a kernel that writes where it must not can spoil them
            outcome = execute(binding, inputs, RUNS[level])
            if returned:
                returned(outcome.results)
            if call and not (outcome.error or outcome.trespasses):
                outcome = _moved(bench, binding, *call, outcome)
            verdict = judge(inputs, outcome, level, _tie(made_of))
    except NotClaimed as refusal:
        verdict = Judgement("UNCLAIMED", str(refusal))
    except Failed as failed:
        verdict = failed.judgement
    except Exception as error:  # the suite's own or the reference's fault: never a statement about the chip
        verdict = Judgement("NOT_JUDGED", _told(error))
    return Result.of(case, verdict, choice, time.perf_counter() - started, foreign)


def _tie(made_of: Sequence[Choice]) -> str:
    """The declared order of ties: a composition's is that of its parts."""
    return "any" if any(choice.tie == "any" for choice in made_of) else "lowest"


class Bench:
    """A backend with its bindings: one per distinct call, so that own kernels serve the calls they claim."""

    def __init__(self, machine: Backend) -> None:
        self.machine = machine
        self._bindings: dict[Any, Binding] = {}

    def binding(self, inputs: Inputs, checked: bool = False) -> Binding:
        """Functions chosen for exactly this call; `checked` ones judge their arguments first."""
        op = inputs.contract.name
        key = op, inputs.spec.key(), checked
        if key not in self._bindings:
            if len(self._bindings) > 32:
                self._bindings.clear()
            binding = self._bind({op: [inputs.spec]}, checked)
            if binding.choices[op].status == "composed":  # its parts are claimed call by call as well
                binding = self._bind(parts(inputs), checked)
            self._bindings[key] = binding
        return self._bindings[key]

    def _bind(self, profile: Mapping[str, Sequence[CallSpec]], checked: bool) -> Binding:
        return bind(backend=self.machine, profile=profile, overrides={}, fallback="error", check=checked)


def parts(inputs: Inputs) -> dict[str, list[CallSpec]]:
    """The calls a composite consists of, found by running its decomposition on shapes alone."""
    found: dict[str, list[CallSpec]] = {}

    def record(op: str, function: Function) -> Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            contract = contracts()[op]
            found.setdefault(op, []).append(contract.spec(*contract.arrange(args, kwargs)))
            return function(*args, **kwargs)

        return call

    composites = {op: "composed" for op, c in contracts().items() if c.decomposition}
    shapes = bind(backend=Abstract(), overrides=composites, fallback="error", check=False, wrap=[record])
    operands = [place(shapes, name, v)[0] for name, v in inputs.operands.items()]
    getattr(shapes, inputs.contract.name)(*operands, **inputs.attrs)
    return found


# -- execution -------------------------------------------------------------------------------------------------------


def execute(binding: Binding, inputs: Inputs, runs: int = 2) -> Outcome:
    """Run the kernel on fresh operands, twice, then up to `runs` times as far as PATIENCE goes and nothing differs.

    Whatever it raises becomes the outcome's error, but for want of memory, which is a Failed CRASH.
    """
    until = time.perf_counter() + PATIENCE
    try:
        first, trespasses, held, watches = _once(binding, inputs)
        for run in range(1, runs):
            again, *_ = _once(binding, inputs)
            if time.perf_counter() > until or (run < runs - 1 and difference(first, again)):
                break
        if inputs.case.view == THREADS and not difference(first, again):
            again = next((found for found in _abreast(binding, inputs) if difference(first, found)), again)
        if elements(inputs.case) <= SMALL:
            for watch in watches:
                watch.spoil(binding)
            if change := difference(first, {name: _read(binding, value) for name, value in held.items()}):
                trespasses.append(f"a result shares memory with an input: {change}, when the inputs are overwritten")
            _once(binding, replace(inputs, operands=_reversed(inputs.operands)))
            if change := difference(first, {name: _read(binding, value) for name, value in held.items()}):
                trespasses.append(f"the next call changed a result of this one: {change}")
    except NotClaimed:
        raise
    except Exception as error:
        if _lacks_memory(error):
            raise Failed("CRASH", f"out of memory: {_told(error)}") from error
        return Outcome(error=_told(error))
    return Outcome(first, again, tuple(trespasses))


def _reversed(operands: Mapping[str, Any]) -> dict[str, Any]:
    """Other legal values of the same form: the rows of every array from the last to the first."""
    return {name: v[::-1].copy() if isinstance(v, np.ndarray) else v for name, v in operands.items()}


def _abreast(binding: Binding, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """Results of the call in several threads, every second of which has other values; switched as often as Python can."""
    other = _reversed(inputs.operands)
    for name, value in inputs.operands.items():
        if isinstance(value, Weight):
            other[name] = replace(value, native=value.native[::-1].copy())
    calls = (inputs, replace(inputs, operands=other))
    start, interval = Barrier(ABREAST), sys.getswitchinterval()

    def call(n: int) -> dict[str, Any]:
        start.wait()
        return _once(binding, calls[n % 2], guarded=False)[0]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(ABREAST) as pool:
            for _ in range(ROUNDS):
                yield from list(pool.map(call, range(ABREAST)))[::2]
    finally:
        sys.setswitchinterval(interval)


def _moved(bench: Bench, here: Binding, call: Inputs, to: Array, outcome: Outcome) -> Outcome:
    """The outcome together with that of the same call among other rows, where the same kernel takes that."""
    op = call.contract.name
    try:
        there = bench.binding(call)
        if (here.choices[op].status, here.choices[op].owner) != (there.choices[op].status, there.choices[op].owner):
            return outcome
        results, *_ = _once(there, call)
    except NotClaimed:
        return outcome
    except Exception as error:
        return Outcome(error=f"among other rows, one of them poisoned: {_told(error)}")
    invariant = getattr(getattr(here, op), "batch_invariant", False)
    return replace(outcome, moved=brought_back(results, to), invariant=invariant)


def _lacks_memory(error: Exception) -> bool:
    """NumPy's and Python's error, and what PyTorch's allocators say."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def _once(
    binding: Binding, inputs: Inputs, guarded: bool = True
) -> tuple[dict[str, Any], list[str], dict[str, Any], list[Watch]]:
    """The results in logical form, what was written elsewhere; results and watched operands as they lie on the device."""
    contract = inputs.contract
    mutated = {o.name for o in contract.signature.mutated}
    operands, watches = {}, []
    beyond = Beyond(binding, inputs) if inputs.case.view == BEYOND else None
    apart = next((n for n, v in inputs.operands.items() if _spreads(v)), "")  # one such operand is memory enough
    for name, value in inputs.operands.items():
        view = "" if inputs.case.view == FAR and name != apart else inputs.case.view
        operands[name], watch = place(binding, name, value, view, beyond)
        if watch and name not in mutated:
            watches.append(watch)
    with poisoned(binding.backend) if guarded else nullcontext([]) as blocks:
        out = getattr(binding, contract.name)(*operands.values(), **inputs.attrs)
    results = dict(zip((r.name for r in contract.signature.results), out if isinstance(out, tuple) else (out,)))
    if len(results) != len(contract.signature.results) or (isinstance(out, tuple) and len(out) != len(results)):
        raise UsageError(f"{contract.name} returned {len(results)} results, expected {len(contract.signature.results)}")
    if guarded:
        _churn(binding, results)
    if beyond:
        results = {name: beyond.near(value) for name, value in results.items()}
    read = {name: _read(binding, value) for name, value in results.items()}
    trespasses = [t for w in watches if (t := w.trespass(binding))]
    trespasses += [t for b in blocks if (t := b.trespass(binding))]
    return read, trespasses, results, watches


def _churn(binding: Binding, results: Mapping[str, Any]) -> None:
    """Allocate memory of the results' size and overwrite it: a result whose memory was given back early does not survive."""
    for value in results.values():
        if not isinstance(value, (Pages, Weight, Selection)) and prod(value.shape) <= SMALL:
            scrap = binding.backend.empty(tuple(value.shape), dtype(value))
            scrap[...] = binding.from_numpy(_filled(tuple(value.shape), dtype(value)))


def _read(binding: Binding, value: Any) -> Any:
    """A result in logical form: an array, Rows, or a page's fields."""
    if isinstance(value, Selection):
        return Rows(*(np.array(part) for part in binding.to_logical(value).values()))
    if isinstance(value, (Pages, Weight)):
        return binding.to_logical(value)
    return np.array(binding.to_numpy(value))


@dataclass(frozen=True)
class Watch:
    """Something on the device that must keep its bits: an input with what surrounds it, or the margins of a result."""

    what: str
    value: Any
    before: Mapping[str, Array]
    inner: slice | None = None

    def trespass(self, binding: Binding) -> str:
        if isinstance(self.value, Batch):
            after = _fields(self.value)
        elif isinstance(self.value, (Weight, Pages, Selection)):
            after = binding.to_logical(self.value)
        else:
            after = {"": binding.to_numpy(self.value)}
        for name, old in self.before.items():
            changed = bits(np.asarray(after[name])) != bits(old)
            if self.inner:
                changed[self.inner] = False
            if changed.any():
                at = [int(i[0]) for i in np.nonzero(changed)]
                return f"{self.what}{'.' * bool(name)}{name} changed at {at}"
        return ""

    def spoil(self, binding: Binding) -> None:
        """Overwrite an array on the device; operands of other kinds stay."""
        if not isinstance(self.value, (Batch, Weight, Pages, Selection)):
            self.value[...] = binding.from_numpy(_filled(self.before[""].shape, dtype(self.before[""])))


def place(
    binding: Binding, name: str, value: Any, view: str = "", beyond: Beyond | None = None
) -> tuple[Any, Watch | None]:
    """An operand on the backend, and the watch over it."""
    if value is None:
        return None, None
    if beyond:
        value = beyond.moved(name, value)
        if isinstance(value, (Pages, Weight)):
            placed = beyond.placed(value)
            near = isinstance(value, Pages)  # weights are too large to be read back
            return placed, Watch(f"pages {name}", beyond.near(placed), value.native) if near else None
    if isinstance(value, Batch):
        before = {n: a.copy() for n, a in _fields(value).items()}
        return binding.plan(value), Watch(f"batch {name}", value, before)
    if isinstance(value, Weight):
        placed = binding.prepare(value.spec, lambda index: value.native[index].copy())
        return placed, Watch(f"weight {name}", placed, {"w": value.native})
    if isinstance(value, Pages):
        placed = binding.from_logical(value.spec, {n: a.copy() for n, a in value.native.items()})
        return placed, Watch(f"pages {name}", placed, value.native)
    if isinstance(value, Selection):
        placed = binding.from_logical(value.spec, {n: a.copy() for n, a in value.native._asdict().items()})
        return placed, Watch(f"selection {name}", placed, value.native._asdict())
    if view == FAR and _spreads(value):
        placed = _far(binding, value)
        return placed, Watch(f"input {name}", placed, {"": value})
    parent, cut = _parent(value, view)
    device = binding.from_numpy(parent.copy())
    return cut(device), Watch(f"input {name}", device, {"": parent})


def _fields(batch: Batch) -> dict[str, Array]:
    return {"cu_q": batch.cu_q, "kv_len": batch.kv_len, "block_table": batch.block_table}


def _parent(x: Array, view: str) -> tuple[Array, Callable[[Any], Any]]:
    """A poisoned array that contains x, and how to cut x from it as a view."""
    if view == "columns" and x.ndim:
        width = x.shape[-1]
        parent = _filled((*x.shape[:-1], width + 5), dtype(x))
        parent[..., 3 : 3 + width] = x
        return parent, lambda a: a[..., 3 : 3 + width]
    if view == "rows":
        parent = _filled((2 * len(x) + 1, *x.shape[1:]), dtype(x))
        parent[1::2] = x
        return parent, lambda a: a[1::2]
    if view == "transposed" and x.ndim > 1:
        return np.ascontiguousarray(x.swapaxes(-1, -2)), lambda a: a.swapaxes(-1, -2)
    if view == "broadcast" and len(x) and is_float(dtype(x)):
        return x[:1], lambda a: np.broadcast_to(a, x.shape) if isinstance(a, np.ndarray) else a.expand(x.shape)
    return x, lambda a: a


def _spreads(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim > 1 and len(value) > 1


def _far(binding: Binding, x: Array) -> Any:
    """x with its last row 2 GiB behind the first: addresses, of which only the rows are touched."""
    width = prod(x.shape[1:])
    step = max(width, -(-(2**31) // (x.dtype.itemsize * (len(x) - 1))))
    try:
        view = binding.backend.empty((len(x), step), dtype(x))[:, :width].reshape(x.shape)
    except (MemoryError, RuntimeError) as error:
        raise NotClaimed(f"rows 2 GiB apart find no room on {binding.backend}: {_told(error)}") from None
    view[...] = binding.from_numpy(x.copy())
    return view


def poison(kind: str) -> Any:
    """NaN, or an integer that no index, count or id ever is."""
    if is_float(kind):
        return np.nan
    return True if kind == "bool" else np.iinfo(kind).max // 3


def _filled(shape: tuple[int, ...], kind: str) -> Array:
    return np.full(shape, poison(kind), numpy_dtype(kind))


@contextmanager
def poisoned(backend: Backend) -> Iterator[list[Watch]]:
    """While it lasts, `backend.empty` gives poisoned memory between poisoned margins."""
    blocks: list[Watch] = []

    def empty(shape: tuple[int, ...], kind: str) -> Any:
        n = prod(shape)
        before = _filled((n + 2 * MARGIN,), kind)
        whole = backend.from_numpy(before.copy())
        blocks.append(Watch("memory beside an output", whole, {"": before}, slice(MARGIN, MARGIN + n)))
        return whole[MARGIN : MARGIN + n].reshape(shape)

    vars(backend)["empty"] = empty
    try:
        yield blocks
    finally:
        del vars(backend)["empty"]


def _told(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no message'}"


# -- the error contract ----------------------------------------------------------------------------------------------


def _mistake(binding: Binding, inputs: Inputs) -> Exception | None:
    """Make the deliberate mistake: what the checked binding raises."""
    contract, fault = inputs.contract, inputs.case.fault
    operands, attrs = dict(inputs.operands), dict(inputs.attrs)
    first = next(o.name for o in contract.signature.operands if o.kind == "array")
    if fault == "dtype":
        operands[first] = np.zeros(operands[first].shape, np.int8)
    elif fault == "shape":
        operands[first] = operands[first][None]
    elif fault == "attribute":
        attrs[next(iter(contract.attributes))] = None
    elif fault == "range":
        name = next(iter(contract.ranges))
        operands[name] = np.full_like(operands[name], np.iinfo(np.int32).max)
    placed = {name: place(binding, name, value)[0] for name, value in operands.items()}
    if fault == "kind":
        placed[first] = operands[first].tolist()
    try:
        getattr(binding, contract.name)(*placed.values(), **attrs)
    except Exception as error:
        return error
    return None


def _judge_fault(inputs: Inputs, error: Exception | None) -> Judgement:
    op, fault = inputs.contract.name, inputs.case.fault
    if error is None:
        return Judgement("FAIL_ERROR", f"a wrong {fault} was accepted, expected a UsageError")
    if not isinstance(error, UsageError):
        return Judgement("FAIL_ERROR", f"a wrong {fault} raised {_told(error)}, expected a UsageError")
    text = str(error)
    if "\n" in text or op not in text:
        return Judgement("FAIL_ERROR", f"the message {text!r} is not one sentence that names {op}")
    return Judgement("PASS", note=text)
