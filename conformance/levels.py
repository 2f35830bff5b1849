"""What a backend has reached: the level of every op in the domain that GLM-5 needs, and of a whole profile.

The domain belongs to the contract: its dims and attributes at GLM-5's values (the first of each entry in `cases`), any
number of rows, and bfloat16 in the operand whose dtype is open, which the others follow as the contract names first. A
backend that claims less shows the fraction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from porthal.conformance.cases import Case, elements, first_float, rows_symbol
from porthal.conformance.plan import cases
from porthal.hal import UsageError, contracts
from porthal.hal.contract import Contract

if TYPE_CHECKING:
    from porthal.conformance.report import Result

DTYPE = "bfloat16"
NONE = "none"
# The ops that a use calls; what they are composed of belongs to them.
PROFILES: Mapping[str, tuple[str, ...]] = {
    "inference": (
        *("embedding", "rms_norm", "mla_prolog", "index_prolog", "indexer_topk", "sparse_mla", "mla_output"),
        *("add_rms_norm", "linear", "silu_mul", "moe_route", "moe_layer", "take_rows"),
        *("argmax", "sample", "mtp_input", "speculative_verify"),
    ),
    "moe": ("moe_route", "moe_layer"),
    "distributed": (),
    "training": (),
}


@dataclass(frozen=True)
class Reached:
    """An op's level, or "none" and why; of the required cases, those that own kernels claimed, and that these passed."""

    level: str
    why: str
    claimed: int
    passed: int
    required: int

    def __str__(self) -> str:
        return f"{self.level} ({self.why})" if self.why else self.level

    @property
    def fraction(self) -> str:
        return f"{self.claimed}/{self.required}"


def members(profile: str) -> list[str]:
    """The contracts of a profile: what it calls, each followed by what that is composed of."""
    if profile not in PROFILES:
        raise UsageError(f"unknown profile {profile!r}: expected one of {', '.join(PROFILES)}")
    return list(dict.fromkeys(op for call in PROFILES[profile] for op in (call, *_parts(call))))


@cache
def _parts(op: str) -> tuple[str, ...]:
    from porthal.conformance.inputs import build
    from porthal.conformance.runner import parts

    contract = contracts()[op]
    if not contract.decomposition:
        return ()
    return tuple(parts(build(min((c for c in cases(contract) if not c.fault), key=elements))))


def required(contract: Contract, level: str) -> list[Case]:
    """The cases of a level that lie in the domain."""
    return [case for case in cases(contract, level) if is_required(case)]  # type: ignore[arg-type]


def is_required(case: Case) -> bool:
    """Whether a case lies in the domain that GLM-5 needs."""
    contract, rows = case.contract, rows_symbol(case.contract)
    facts = {a.name: a.default for a in contract.attributes.values()} | dict(case.attrs) | dict(case.dims)
    if any(facts.get(name, values[0]) != values[0] for name, values in contract.cases.items() if name != rows):
        return False
    first = first_float(contract)
    served = Case(case.op, dtypes=((first, DTYPE),) if first else ())
    return all(
        case.dtype(o.name) == served.dtype(o.name) for o in contract.signature.operands if o.name in contract.dtypes
    )


def reached(op: str, level: str, results: Sequence[Result]) -> Reached:
    """The level of one op: reached when own kernels passed all required cases, or compositions of nothing but own."""
    wanted = {case.token for case in required(contracts()[op], level)}
    within = [r for r in results if r.op == op and r.token in wanted]
    own = [r for r in within if r.own and r.verdict != "UNCLAIMED"]
    passed = sum(r.verdict == "PASS" for r in own)
    counted = len(own), passed, len(wanted)
    if wanted and passed == len(wanted):
        return Reached(level, "", *counted)
    return Reached(NONE, _why(own, within, len(wanted), [r for r in results if r.op == op]), *counted)


def _why(own: Sequence[Result], within: Sequence[Result], wanted: int, all_results: Sequence[Result]) -> str:
    if not wanted:
        return "GLM-5's dims are too large for this level"
    if len(within) < wanted:
        return "not all run" if all_results else "not run"
    if verdicts := Counter(r.verdict for r in own if r.verdict != "PASS"):
        return "waived" if set(verdicts) == {"WAIVED"} else "failed"
    if own:
        return "narrow"
    status = Counter("not claimed" if r.status == "missing" else r.status for r in within).most_common(1)[0][0]
    return "composed of inherited" if status == "composed" else status


def overall(levels: Mapping[str, Reached], level: str, profile: str) -> str:
    """The worst level over what a profile calls."""
    calls = PROFILES[profile]
    short = [op for op in calls if op not in levels or levels[op].level == NONE]
    if not short:
        return level
    return f"{NONE}: {len(calls) - len(short)} of {len(calls)} ops have reached {level}"
