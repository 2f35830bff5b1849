"""Execution: a case's inputs on a backend, its kernel run twice, everything that must not change watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from porthal.conformance.cases import Case, Level, cases
from porthal.conformance.inputs import Array, Inputs, build
from porthal.conformance.judge import Outcome, bits, judge
from porthal.conformance.report import Report, Result
from porthal.conformance.verdicts import Judgement
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
    create,
)
from porthal.hal.abstract import Abstract
from porthal.hal.binding import Choice, Function
from porthal.hal.dtypes import dtype, is_float, numpy_dtype

Progress = Callable[[int, int, Result], None]
MARGIN = 64  # poisoned elements on both sides of what a backend allocates


# -- running -----------------------------------------------------------------------------------------------------------


def run(
    backend: str | Backend,
    ops: Sequence[str] | None = None,
    level: Level = "bring-up",
    dtypes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Every case of the ops (None: all) at a level, on one backend; `progress(done, of, result)` after each."""
    machine = create(backend) if isinstance(backend, str) else backend
    known = contracts()
    for op in ops or ():
        if op not in known:
            raise UsageError(f"unknown op {op!r}: known are {', '.join(known)}")
    plan = [case for op in ops or known for case in cases(known[op], level, dtypes)]
    bench = Bench(machine)
    results = []
    for case in plan:
        results.append(check(case, bench, level))
        if progress:
            progress(len(results), len(plan), results[-1])
    return Report.of(machine, level, results)


def replay(token: str, backend: str | Backend, level: Level = "bring-up") -> Result:
    """One case again, bit for bit; `Result.explain()` says in words what came out."""
    machine = create(backend) if isinstance(backend, str) else backend
    return check(Case.from_token(token), Bench(machine), level)


def check(case: Case, bench: Bench, level: Level = "bring-up") -> Result:
    """Build, execute, judge: one case's verdict."""
    started = time.perf_counter()
    choice: Choice | None = None
    try:
        inputs = build(case)
        binding = bench.binding(inputs)
        choice = binding.choices[case.op]
        if case.fault:
            verdict = _judge_fault(inputs, _mistake(bench.binding(inputs, checked=True), inputs))
        else:
            verdict = judge(inputs, execute(binding, inputs), level, _tie(binding, inputs))
    except NotClaimed as refusal:
        verdict = Judgement("UNCLAIMED", str(refusal))
    except Exception as error:  # the suite's own or the reference's fault: never a statement about the chip
        verdict = Judgement("NOT_JUDGED", _told(error))
    return Result.of(case, verdict, choice, time.perf_counter() - started)


def _tie(binding: Binding, inputs: Inputs) -> str:
    """The declared order of ties: a composition's is that of its parts."""
    op = inputs.contract.name
    ops = parts(inputs) if binding.choices[op].status == "composed" else (op,)
    return "any" if any(binding.choices[o].tie == "any" for o in ops) else "lowest"


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


def execute(binding: Binding, inputs: Inputs) -> Outcome:
    """Run the kernel twice on fresh operands; whatever it raises becomes the outcome's error."""
    try:
        first, trespasses = _once(binding, inputs)
        again, _ = _once(binding, inputs)
    except NotClaimed:
        raise
    except Exception as error:
        return Outcome(error=_told(error))
    return Outcome(first, again, tuple(trespasses))


def _once(binding: Binding, inputs: Inputs) -> tuple[dict[str, Any], list[str]]:
    contract = inputs.contract
    mutated = {o.name for o in contract.signature.mutated}
    operands, watches = {}, []
    for name, value in inputs.operands.items():
        operands[name], watch = place(binding, name, value, inputs.case.view)
        if watch and name not in mutated:
            watches.append(watch)
    with poisoned(binding.backend) as blocks:
        out = getattr(binding, contract.name)(*operands.values(), **inputs.attrs)
    results = dict(zip((r.name for r in contract.signature.results), out if isinstance(out, tuple) else (out,)))
    if len(results) != len(contract.signature.results) or (isinstance(out, tuple) and len(out) != len(results)):
        raise UsageError(f"{contract.name} returned {len(results)} results, expected {len(contract.signature.results)}")
    read = {name: _read(binding, value) for name, value in results.items()}
    trespasses = [t for w in watches if (t := w.trespass(binding))]
    trespasses += [t for b in blocks if (t := b.trespass(binding))]
    return read, trespasses


def _read(binding: Binding, value: Any) -> Any:
    """A result in logical form: an array, Rows, or a page's fields."""
    if isinstance(value, Selection):
        return Rows(**binding.to_logical(value))
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


def place(binding: Binding, name: str, value: Any, view: str = "") -> tuple[Any, Watch | None]:
    """An operand on the backend, and the watch over it."""
    if value is None:
        return None, None
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
