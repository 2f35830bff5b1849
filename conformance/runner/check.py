"""One case: its inputs built, a kernel bound, the call executed, what came back judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from porthal.conformance.cases.capture import calls
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.cases.steps import first
from porthal.conformance.execution.bindings import Bindings, Bound
from porthal.conformance.execution.call import execute
from porthal.conformance.execution.capture import replayed, uncapturable
from porthal.conformance.execution.faults import refusal_of
from porthal.conformance.execution.outcome import raised
from porthal.conformance.execution.sequence import steps
from porthal.conformance.execution.traits import left_out
from porthal.conformance.judgement.call import judge, watched
from porthal.conformance.judgement.judge import judge_refusal
from porthal.conformance.level import BRING_UP, level_of
from porthal.conformance.report.results import Result
from porthal.conformance.runner.proven import Proven
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import Choice, NotClaimed

Returned = Callable[[Mapping[str, Any]], None]  # results in logical form by name


class Returns(dict[str, Any]):
    """The results of one step of a program, and what it was called with."""

    def __init__(self, results: Mapping[str, Any], inputs: Inputs) -> None:
        super().__init__(results)
        self.inputs = inputs

    def __reduce__(self) -> tuple[Any, ...]:
        return Returns, (dict(self), self.inputs)


def check(
    case: Case,
    bindings: Bindings,
    level: str = BRING_UP.name,
    inputs: Inputs | None = None,
    chosen: Callable[[Choice], None] = lambda choice: None,
    returned: Returned = lambda results: None,
    proven: Proven | None = None,
) -> Result:
    """One case's verdict. `inputs` replace the case's own; `chosen` gets the kernel's choice before it is called,
    `returned` the results before they are judged; what is `proven` of a base is not run again."""
    started, bound = time.perf_counter(), None
    if proven and (known := proven.recall(case)):
        return known
    try:
        inputs = first(case) if case.seq else inputs or build(case)
        bound = bindings.bound(inputs, checked=bool(case.fault))
        chosen(bound.choice)
        if why := left_out(case, bindings.backend) or (case.capture and uncapturable(bound)):
            raise Failed("LEFT_OUT", why)
        if case.seq:
            bound, judged = _in_steps(bindings, bound, case, level, returned)
        else:
            judged = _refused(bound, inputs) if case.fault else _judged(bindings, bound, inputs, level, returned)
    except NotClaimed as refusal:
        judged = Judgement("UNCLAIMED", str(refusal))
    except Failed as failed:
        judged = failed.judgement
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the suite's own or the reference's fault: never a statement about the chip
        judged = Judgement("NOT_JUDGED", raised(error))
    whose = (bound.choice, bound.foreign, bound.batch_invariant) if bound else (None, (), False)
    choice, foreign, invariant = whose
    result = Result.of(case, judged, choice, time.perf_counter() - started, foreign, invariant)
    if proven and bound:
        proven.keep(case, bound, result)
    return result


def _judged(bindings: Bindings, bound: Bound, inputs: Inputs, level: str, returned: Returned) -> Judgement:
    if inputs.case.capture:
        return _replayed(bound, inputs.case, level)
    outcome = execute(bindings, bound, inputs, level_of(level).runs)
    returned(outcome.results)
    return judge(inputs, outcome, level, bound.tie)


def _replayed(bound: Bound, case: Case, level: str) -> Judgement:
    """The judgement of the first replay that does not pass, else of the one with the largest error."""
    found = []
    for inputs, outcome in replayed(bound, calls(case)):
        judged = judge(inputs, outcome, level, bound.tie)
        if judged.verdict != "PASS":
            where = "when captured" if inputs.case.capture else f"replayed as {inputs.case.token}"
            return replace(judged, message=f"{where}: {judged.message}")
        found.append(judged)
    return max(found, key=lambda judged: judged.worst)


def _in_steps(bindings: Bindings, bound: Bound, case: Case, level: str, returned: Returned) -> tuple[Bound, Judgement]:
    """A program's first step that fails, or its worst; bound to a kernel that is not the chip's own if any step was."""
    found = [Judgement("PASS")]
    for n, step in enumerate(steps(bindings, case), 1):
        if step.inputs.contract.name == case.op and step.bound.choice.status != bound.choice.status == "own":
            bound = step.bound
        judged = judge(step.inputs, step.outcome, level, step.bound.tie) if step.judged else watched(step.inputs, step.outcome)
        if judged.verdict != "PASS":
            returned(Returns(step.outcome.results, step.inputs))
            where = f"step {n} ({step.label}): " if n > 1 else ""  # the first is a plain call, and fails like one
            return bound, replace(judged, message=where + judged.message)
        found.append(judged)
    returned(Returns(step.outcome.results, step.inputs))
    worst = max(found, key=lambda judged: judged.worst)
    notes = "; ".join(dict.fromkeys(judged.note for judged in found if judged.note))
    return bound, replace(worst, ratio=max(j.ratio for j in found), z=max((j.z for j in found), key=abs), note=notes)


def _refused(bound: Bound, inputs: Inputs) -> Judgement:
    return judge_refusal(inputs, refusal_of(bound.binding, inputs))
