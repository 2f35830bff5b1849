"""Runs: the cases of ops on a backend, each built, executed, once more among other rows, and judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porthal.conformance.cases import Case
from porthal.conformance.execution import execute, once, place, told
from porthal.conformance.inputs import Array, Inputs, build
from porthal.conformance.invariance import brought_back, disturbed
from porthal.conformance.judge import Outcome, judge
from porthal.conformance.plan import Level, cases
from porthal.conformance.report import Facts, Report, Result
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import (
    Backend,
    Binding,
    CallSpec,
    NotClaimed,
    UsageError,
    bind,
    contracts,
)
from porthal.hal.abstract import Abstract
from porthal.hal.binding import Choice, Function

if TYPE_CHECKING:
    from pathlib import Path

    from porthal.conformance.workers import Bounds

Progress = Callable[[int, int, Result], None]
Returned = Callable[[Mapping[str, Any]], None]  # results in logical form by name
RUNS: Mapping[str, int] = {"bring-up": 2, "standard": 3, "strict": 50}  # of a kernel on the same inputs


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
        verdict = Judgement("NOT_JUDGED", told(error))
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


def _moved(bench: Bench, here: Binding, call: Inputs, to: Array, outcome: Outcome) -> Outcome:
    """The outcome together with that of the same call among other rows, where the same kernel takes that."""
    op = call.contract.name
    try:
        there = bench.binding(call)
        if (here.choices[op].status, here.choices[op].owner) != (there.choices[op].status, there.choices[op].owner):
            return outcome
        results, *_ = once(there, call)
    except NotClaimed:
        return outcome
    except Exception as error:
        return Outcome(error=f"among other rows, one of them poisoned: {told(error)}")
    invariant = getattr(getattr(here, op), "batch_invariant", False)
    return replace(outcome, moved=brought_back(results, to), invariant=invariant)


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
        return Judgement("FAIL_ERROR", f"a wrong {fault} raised {told(error)}, expected a UsageError")
    text = str(error)
    if "\n" in text or op not in text:
        return Judgement("FAIL_ERROR", f"the message {text!r} is not one sentence that names {op}")
    return Judgement("PASS", note=text)
