"""Runs: the cases of ops on a backend, in worker processes or here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.domain import first_float
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.cases.plan import among, captured, cases, large
from porthal.conformance.cases.profiles import MODEL, profile_of
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.level import BRING_UP
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.journal import Journal
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import Result
from porthal.conformance.report.waivers import waive, waivers
from porthal.conformance.runner.check import Returned, check
from porthal.conformance.runner.peers import Peers
from porthal.conformance.runner.ranked import Ranked, everywhere, in_threads
from porthal.conformance.runner.remaining import Remaining
from porthal.conformance.runner.workers import Bounds, Pool, Setup
from porthal.hal import Backend, UsageError, contracts, create, operators
from porthal.hal.contract import Contract

Progress = Callable[[int, int, Result, float], None]


def run(
    backend: str | Backend,
    ops: Sequence[str] | None = None,
    level: str = BRING_UP.name,
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
    model: str = MODEL,
    peers: Peers | None = None,
) -> Report:
    """Every case of the ops (None: all) at a level, on one backend; `progress(done, of, result, left)` after each, with
    the seconds left as far as is known: cases that show how long an op takes come first.
    Raises UsageError for an unknown op, and for dtypes that choose nothing in one of the ops.

    A backend given by name runs in worker processes within `bounds`, unless `isolate` is False; an instance runs here.
    `journal` keeps each verdict as it comes, and with `resume` those already there are not run again.
    `properties` draws that many further cases per op, the same for the same `seed`, and reports the smallest that fails.
    `model` says whose sizes the large calls have: a directory with a config.json, or the name of a published model.
    A backend that is one of `peers` runs in its own interpreter.
    """
    known = operators()
    ops = list(ops or contracts())
    for op in ops:
        if op not in known:
            raise UsageError(f"unknown op {op!r}: known are {', '.join(known)}")
        _check_dtypes(known[op], dtypes or ())
    _check_model(model, level, ops)
    plan = [case for op in ops for case in cases(known[op], level, dtypes, model)]
    results: dict[str, Result] = {}
    one: Callable[[Case], Result]
    judged: Callable[[Sequence[Case]], Iterable[Result]]
    with ExitStack() as stack:
        if isinstance(backend, str) and isolate:
            python = peers.python(backend) if peers else ""
            alone = sum(not case.contract.collective for case in plan)
            pool = stack.enter_context(Pool(backend, level, emulated, bounds or Bounds(), alone, True, python))
            facts, one = pool.facts, pool.one
            judged = stack.enter_context(everywhere(pool, bounds or Bounds()))
        else:
            bindings = Bindings(create(backend, emulated) if isinstance(backend, str) else backend)
            facts = Facts.of(bindings.backend)
            one = _one_here(bindings, level)
            judged = lambda cases: map(one, cases)  # noqa: E731
        plan += asked(facts, plan, ops, level, dtypes)
        kept = stack.enter_context(closing(Journal(journal, facts, level, resume))) if journal else None
        if kept:
            known_results = {result.token: result for result in kept.known}
            results = {case.token: known_results[case.token] for case in plan if case.token in known_results}

        def settle(plan: Sequence[Case]) -> None:
            left = Remaining([case for case in plan if case.token not in results])
            for result in judged(left.cases):
                results[result.token] = result
                if kept:
                    kept.add(result)
                if progress:
                    progress(len(results), len(plan), result, left.after(result))

        settle(plan)
        plan = [each for case in plan for each in (case, *_further(case, results[case.token], facts))]
        settle(plan)
        plan = [case for case in plan if not (case.via and results[case.token].verdict == "UNCLAIMED")]
        drawn = _drawn([op for op in ops if op in contracts()], properties, seed, dtypes, one, progress) if properties else []
    ran = [*(results[case.token] for case in plan), *drawn]
    options = (bounds.options if bounds else "") + (peers.option(str(backend)) if peers else "")
    return Report.of(facts, level, ran, bounds=options, model=model)


def asked(
    facts: Facts, plan: Iterable[Case], ops: Sequence[str], level: str, dtypes: Sequence[str] | None = None
) -> list[Case]:
    """The calls that a backend is asked beside the plan of all: at the ends of what its kernels state, and captured ones,
    where it captures."""
    known, planned = operators(), {case.token for case in plan}
    ends = [case for case in map(Case.from_token, facts.edges) if case.op in ops and case.token not in planned]
    found = [case for case in ends if among(case, dtypes)]
    return found + [case for op in ops for case in (captured(known[op], level, dtypes) if facts.captures else ())]


def _one_here(bindings: Bindings, level: str) -> Callable[[Case], Result]:
    """One case in this process; of several ranks each is a thread."""

    def one(case: Case) -> Result:
        if not case.contract.collective:
            return check(case, bindings, level)
        start = time.monotonic()
        return Result.of(case, in_threads(case, bindings, level), None, time.monotonic() - start)

    return one


def _check_model(model: str, level: str, ops: Iterable[str]) -> None:
    """Raise UsageError for what is no model, and where a level affords no call in its sizes."""
    called = dict(profile_of(model).calls)
    for op in ops:
        contract = operators()[op]
        if op in called and contract.independent and not large(contract, level, model):
            raise UsageError(
                f"{model} calls {op} in sizes of which no part fits {level} in time and memory: take a higher level, or others"
            )


def _check_dtypes(contract: Contract, dtypes: Sequence[str]) -> None:
    """Raise UsageError where a dtype that is asked for chooses nothing in an op that is named."""
    permitted = contract.dtypes.get(first_float(contract), ())
    for wanted in dtypes:
        if not permitted:
            raise UsageError(f"dtype {wanted} does not apply to {contract.name}, whose dtypes are fixed: leave it out")
        if wanted not in permitted:
            raise UsageError(f"dtype {wanted} does not apply to {contract.name}, expected one of {', '.join(permitted)}")


def _further(case: Case, ran: Result, facts: Facts) -> Iterable[Case]:
    """The case on every other provider that the backend has for its op; those that do not take it are left out later."""
    own = facts.kernels.get(case.op, ())
    return [case.through(provider) for provider in own if provider != ran.provider] if len(own) > 1 and not case.fault else []


def _drawn(
    ops: Iterable[str],
    n: int,
    seed: int,
    dtypes: Sequence[str] | None,
    one: Callable[[Case], Result],
    progress: Progress | None,
) -> list[Result]:
    """Results of property-based cases, op by op."""
    from porthal.conformance.runner.properties import search  # needs hypothesis

    found: list[Result] = []
    began = time.monotonic()
    for at, op in enumerate(names := list(ops)):
        found += search(contracts()[op], n, one, seed, dtypes)
        if progress and found:
            each = (time.monotonic() - began) / (at + 1)
            progress((at + 1) * n, len(names) * n, found[-1], each * (len(names) - at - 1))
    return found


def replay(
    call: str | Inputs,
    backend: str | Backend,
    level: str = BRING_UP.name,
    *,
    isolate: bool = True,
    emulated: bool = False,
    bounds: Bounds | None = None,
    returned: Returned = lambda results: None,
    peers: Peers | None = None,
) -> Result:
    """One case again, bit for bit, by its token or with given inputs; `Result.explain()` says in words what came out.

    Isolated and waived as in `run`, which gives the same verdict within the same `bounds`. `returned` gets the results,
    where there are any.
    """
    case, inputs = (call.case, call) if isinstance(call, Inputs) else (Case.from_token(call), None)
    if isinstance(backend, str) and isolate:
        python = peers.python(backend) if peers else ""
        if case.contract.collective:
            setup = Setup(backend, level, emulated, (bounds or Bounds()).memory, python=python)
            with closing(Ranked(setup, bounds or Bounds())) as ranked:
                return waive(ranked.one(case), waivers(create(backend, emulated)))
        with Pool(backend, level, emulated, bounds or Bounds(), 1, python=python) as pool:
            return waive(pool.one(case, inputs, returned), pool.facts.waivers)
    bindings = Bindings(create(backend, emulated) if isinstance(backend, str) else backend)
    if case.contract.collective:
        return waive(_one_here(bindings, level)(case), waivers(bindings.backend))
    return waive(check(case, bindings, level, inputs, returned=returned), waivers(bindings.backend))
