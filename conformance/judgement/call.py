"""Whether what a kernel did with a call is what the contract says: plain arrays in, a judgement out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.execution.outcome import Outcome, difference
from porthal.conformance.judgement.copies import CopiesJudge
from porthal.conformance.judgement.golden import Golden
from porthal.conformance.judgement.judge import judged
from porthal.conformance.level import BRING_UP, Level, level_of
from porthal.conformance.verdicts import Failed, Judgement


def judge(inputs: Inputs, outcome: Outcome, level: str = BRING_UP.name, tie: str = "lowest") -> Judgement:
    """Compare what a kernel did with what the contract says; `tie` is the kernel's declared order of ties."""
    if outcome.error:
        return Judgement("FAIL_ERROR", outcome.error)
    try:
        holds = _judge_of(inputs, level_of(level), tie)
        judgement = holds(outcome)
        _check_moved(holds, outcome)
        return judgement
    except Failed as failed:
        return failed.judgement


def _judge_of(inputs: Inputs, limit: Level, tie: str) -> Callable[[Outcome], Judgement]:
    """What judges results of this call."""
    if inputs.copies:
        return CopiesJudge(inputs, inputs.copies, limit, tie)
    golden = Golden(inputs)
    return lambda outcome: judged(golden, outcome, limit, tie)[0]


def _check_moved(holds: Callable[[Outcome], Judgement], outcome: Outcome) -> None:
    """Results of the same rows among others: the bits may differ, if these results pass too."""
    if not outcome.moved or not (change := difference(outcome.results, outcome.moved)):
        return
    if outcome.invariant:
        raise Failed("FAIL_VALUE", f"{change} among other rows, though the kernel declares that its results do not change")
    try:
        holds(replace(outcome, results=outcome.moved, again=outcome.moved))
    except Failed as failed:
        message = f"among other rows, one of them poisoned: {failed.judgement.message}"
        raise Failed(**vars(replace(failed.judgement, message=message))) from None
