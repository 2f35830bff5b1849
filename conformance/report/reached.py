"""What a backend has reached: the level of every op in the domain that GLM-5 needs, and of a whole profile.

The domain belongs to the contract: its dims and attributes at GLM-5's values (the first of each entry in `cases`), any
number of rows, and bfloat16 in the operand whose dtype is open; the others have their first dtype in the contract. A
backend that claims less shows the fraction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.domain import first_float
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import cases, large
from porthal.conformance.cases.profiles import MODEL
from porthal.conformance.execution.bindings import parts
from porthal.conformance.report.results import Result
from porthal.hal import UsageError, operators
from porthal.hal.contract import Contract

DTYPE = "bfloat16"
NONE = "none"


@dataclass(frozen=True)
class Reached:
    """An op's level, or "none" and why; of the required cases, how many own kernels claimed and passed."""

    level: str
    why: str
    claimed: int
    passed: int
    required: int

    def __str__(self) -> str:
        return f"{self.level} ({self.why})" if self.why else self.level

    @property
    def fraction(self) -> str:
        """Of the required cases, those that own kernels passed."""
        return f"{self.passed}/{self.required}"


def profiles() -> tuple[str, ...]:
    """The uses of a model that contracts belong to."""
    return tuple(dict.fromkeys(profile for contract in operators().values() for profile in contract.profiles))


def called(profile: str) -> tuple[str, ...]:
    """The ops that a use calls; what they are composed of belongs to them."""
    if profile not in profiles():
        raise UsageError(f"unknown profile {profile!r}: expected one of {', '.join(profiles())}")
    return tuple(op for op, contract in operators().items() if profile in contract.profiles)


def members(profile: str) -> list[str]:
    """The contracts of a profile: what it calls, each followed by what that is composed of."""
    return list(dict.fromkeys(op for call in called(profile) for op in (call, *parts_of(call))))


def shared(ops: Sequence[str]) -> str:
    """The first profile that all of these belong to, else inference."""
    return next((name for name in profiles() if set(ops) <= set(members(name))), "inference")


@cache
def parts_of(op: str) -> tuple[str, ...]:
    """What a composite is composed of, itself first."""
    contract = operators()[op]
    if not contract.decomposition:
        return ()
    return tuple(parts(build(min((c for c in cases(contract) if not c.fault), key=elements))))


def required(contract: Contract, level: str, model: str = MODEL) -> list[Case]:
    """The cases of a level that lie in the domain, and the calls in the model's own sizes."""
    within = [*filter(is_required, cases(contract, level, model=model)), *large(contract, level, model)]
    return list({case.token: case for case in within}.values())


def is_required(case: Case) -> bool:
    """Whether a case has the dims and dtype that GLM-5 needs; no chip needs to take a scheme."""
    contract, rows = case.contract, case.contract.rows
    if case.fault or case.schemes:
        return False
    facts = case.attributes | dict(case.dims)
    if any(facts.get(name, values[0]) != values[0] for name, values in contract.cases.items() if name != rows):
        return False
    first = first_float(contract)
    production = Case(case.op, dtypes=((first, DTYPE),) if first else ())
    return all(
        case.dtype(o.name) == production.dtype(o.name) for o in contract.signature.operands if o.name in contract.dtypes
    )


def reached(op: str, level: str, results: Sequence[Result], model: str = MODEL) -> Reached:
    """The level of one op: reached when own kernels passed all required cases, or compositions of own kernels alone, and
    nothing of the op failed, in that domain or outside it, by whichever provider; a waiver does not change that.
    """
    mine = [r for r in results if r.op == op]
    left = {r.token for r in mine if r.verdict == "LEFT_OUT"}
    wanted = {case.token for case in required(operators()[op], level, model)} - left
    within = [r for r in mine if r.token in wanted]
    own = [r for r in within if r.own and r.verdict != "UNCLAIMED"]
    passed = sum(r.verdict == "PASS" for r in own)
    counted = len(own), passed, len(wanted)
    if any(r.failed for r in mine):
        return Reached(NONE, "failed", *counted)
    if any(r.own and r.waived not in ("", "UNCLAIMED") for r in mine):
        return Reached(NONE, "waived", *counted)
    if wanted and passed == len(wanted):
        return Reached(level, "", *counted)
    return Reached(NONE, _why(own, within, len(wanted), mine), *counted)


def _why(own: Sequence[Result], within: Sequence[Result], wanted: int, mine: Sequence[Result]) -> str:
    if not wanted:
        return "GLM-5's dims are too large for this level"
    if len(within) < wanted:
        return "not all run" if mine else "not run"
    if own:
        return "narrow"
    status = Counter("not claimed" if r.status == "missing" else r.status for r in within).most_common(1)[0][0]
    return "composed of inherited" if status == "composed" else status


def overall(levels: Mapping[str, Reached], level: str, profile: str) -> str:
    """The worst level over what a profile calls."""
    calls = called(profile)
    short = [op for op in calls if op not in levels or levels[op].level == NONE]
    if not short:
        return level
    return f"{NONE}: {len(calls) - len(short)} of {len(calls)} ops have reached {level}"
