"""Whether what a kernel did with a call is what the contract says: plain arrays in, a judgement out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.execution.outcome import Outcome, difference
from porthal.conformance.judgement.choices import other_ties
from porthal.conformance.judgement.copies import CopiesJudge
from porthal.conformance.judgement.golden import Golden
from porthal.conformance.judgement.judge import check_form, check_kept, judged
from porthal.conformance.level import BRING_UP, Level, level_of
from porthal.conformance.verdicts import NOT_READ, Failed, Judgement


def judge(inputs: Inputs, outcome: Outcome, level: str = BRING_UP.name, tie: str = "lowest") -> Judgement:
    """Compare what a kernel did with what the contract says; `tie` is the kernel's declared order of ties."""
    if outcome.error:
        return Judgement("FAIL_ERROR", outcome.error)
    try:
        holds = _judge_of(inputs, level_of(level), tie)
        judgement = holds(outcome)
        _check_promises(inputs, outcome)
        _check_moved(holds, outcome)
        if outcome.unread:
            said = [judgement.note, f"{NOT_READ}: {', '.join(outcome.unread)}"]
            judgement = replace(judgement, note="; ".join(filter(None, said)))
        return judgement
    except Failed as failed:
        return failed.judgement


def watched(inputs: Inputs, outcome: Outcome) -> Judgement:
    """Whether results have their form and nothing else has changed, whatever their values."""
    if outcome.error:
        return Judgement("FAIL_ERROR", outcome.error)
    try:
        check_form(inputs, outcome.results)
        check_kept(outcome)
    except Failed as failed:
        return failed.judgement
    return Judgement("PASS")


def _judge_of(inputs: Inputs, limit: Level, tie: str) -> Callable[[Outcome], Judgement]:
    """What judges results of this call."""
    if inputs.copies:
        return CopiesJudge(inputs, inputs.copies, limit, tie)
    golden = Golden(inputs)
    return lambda outcome: judged(golden, outcome, limit, tie)[0]


def _check_promises(inputs: Inputs, outcome: Outcome) -> None:
    """What may not depend on the batch at all: bits where that is declared, and which of equal entries are chosen."""
    for results, where in ((outcome.moved, "among other rows"), (outcome.apart, "in a call of fewer rows")):
        if not results:
            continue
        before = {name: outcome.results[name] for name in results}
        if outcome.invariant and (change := difference(before, results)):
            raise Failed("FAIL_VALUE", f"{change} {where}, though the kernel declares that its results do not change")
        if inputs.contract.choice and (change := other_ties(inputs, outcome.results, results)):
            raise Failed("FAIL_VALUE", f"{change} {where}: whatever the order of ties is, it may not depend on the batch")


def _check_moved(holds: Callable[[Outcome], Judgement], outcome: Outcome) -> None:
    """Results of the same rows among others: the bits may differ, if these results pass too."""
    if not outcome.moved or not difference(outcome.results, outcome.moved):
        return
    try:
        holds(replace(outcome, results=outcome.moved, again=outcome.moved))
    except Failed as failed:
        message = f"among other rows, one of them poisoned: {failed.judgement.message}"
        raise Failed(**vars(replace(failed.judgement, message=message))) from None
