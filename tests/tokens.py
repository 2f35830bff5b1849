"""Texts that are nearly case tokens, and what must come of any text."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import strategies as st

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.domain import SELECTIONS
from porthal.conformance.cases.legal import FAR, VIEWS, elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.cases.values import RECIPES
from porthal.conformance.report.results import Result
from porthal.conformance.verdicts import Judgement
from porthal.hal import UsageError, contracts

VALUES = st.sampled_from(
    ["", "0", "1", "7", "-1", "1e999", "nan", "²", "True", *VIEWS, FAR, "mixed", "crowd", "0/0", "1/5+1/300/2", "3/2"]
)  # fmt: skip


@cache
def planned() -> list[str]:
    return [case.token for contract in contracts().values() for case in cases(contract)]


@cache
def parts() -> Any:
    found = sorted({part for token in planned() for part in token.split(",")})
    names = sorted({part.partition("=")[0] for part in found if "=" in part})
    operands = sorted({o.name for c in contracts().values() for o in c.signature.operands})
    return (
        st.sampled_from(found)
        | st.builds("{}={}".format, st.sampled_from(names), VALUES | st.text(max_size=5))
        | st.builds("{}~{}".format, st.sampled_from(operands), st.sampled_from([*RECIPES, *SELECTIONS]))
        | st.text(max_size=8)
    )


@st.composite
def edited(draw: Any) -> str:
    """A token with parts replaced, added, dropped or doubled."""
    found = draw(st.sampled_from(planned())).split(",")
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(found) - 1))
        found[at : at + draw(st.integers(0, 1))] = draw(st.lists(parts(), max_size=1))
    return ",".join(found)


def texts() -> Any:
    return edited() | st.text()


def passed(case: Case) -> Result:
    """As if the case had been run: only builds it."""
    inputs = build(case)
    assert Case.from_token(case.token) == case
    assert all(inputs.spec.dims.get(name, size) == size for name, size in case.dims), case.token
    return Result.of(case, Judgement("PASS"), None, 0.0)


def is_case_or_refused(text: str) -> bool:
    """Whether a text is refused in one sentence, or a case that can be built."""
    try:
        case = Case.from_token(text)
    except UsageError as error:
        return "\n" not in str(error)
    return elements(case) >= 2**18 or passed(case).verdict == "PASS"
