"""One case: its inputs built, a kernel bound, the call executed, what came back judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.execution.bindings import Bindings, Bound
from porthal.conformance.execution.call import execute
from porthal.conformance.execution.faults import refusal_of
from porthal.conformance.execution.outcome import raised
from porthal.conformance.execution.traits import left_out
from porthal.conformance.judgement.call import judge
from porthal.conformance.judgement.judge import judge_refusal
from porthal.conformance.level import BRING_UP, level_of
from porthal.conformance.report.results import Result
from porthal.conformance.runner.proven import Proven
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import Choice, NotClaimed

Returned = Callable[[Mapping[str, Any]], None]  # results in logical form by name


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
        inputs = inputs or build(case)
        bound = bindings.bound(inputs, checked=bool(case.fault))
        chosen(bound.choice)
        if why := left_out(case, bindings.backend):
            raise Failed("LEFT_OUT", why)
        judged = _refused(bound, inputs) if case.fault else _judged(bindings, bound, inputs, level, returned)
    except NotClaimed as refusal:
        judged = Judgement("UNCLAIMED", str(refusal))
    except Failed as failed:
        judged = failed.judgement
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the suite's own or the reference's fault: never a statement about the chip
        judged = Judgement("NOT_JUDGED", raised(error))
    choice, foreign = (bound.choice, bound.foreign) if bound else (None, ())
    result = Result.of(case, judged, choice, time.perf_counter() - started, foreign)
    if proven and bound:
        proven.keep(case, bound, result)
    return result


def _judged(bindings: Bindings, bound: Bound, inputs: Inputs, level: str, returned: Returned) -> Judgement:
    outcome = execute(bindings, bound, inputs, level_of(level).runs)
    returned(outcome.results)
    return judge(inputs, outcome, level, bound.tie)


def _refused(bound: Bound, inputs: Inputs) -> Judgement:
    return judge_refusal(inputs, refusal_of(bound.binding, inputs))
