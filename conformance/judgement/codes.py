"""Codes and scales: each code is a discrete choice, judged at the scale that the chip gave."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from porthal.conformance.cases.inputs import Inputs, written_slots
from porthal.conformance.judgement.golden import Spread
from porthal.conformance.level import Level
from porthal.conformance.verdicts import Failed, Judgement
from porthal.hal import Pages, Scheme, scheme_of
from porthal.hal.dtypes import UNIT_ROUNDOFF
from porthal.hal.operands.pages import SCALE


class Coded(NamedTuple):
    """A part of a result that is codes: its key among the spreads, and the names of codes and scales in the result."""

    key: str
    result: str
    scheme: Scheme
    parts: Mapping[str, str]

    @property
    def keys(self) -> list[str]:
        return [f"{self.result}.{part}" for part in self.parts.values()]


def coded(inputs: Inputs, spreads: Collection[str]) -> Iterator[Coded]:
    """What among the results is codes that stand for numbers of these spreads; copied codes are not."""
    for result in inputs.contract.signature.results:
        if result.kind == "Quantised":
            scheme = scheme_of(inputs.attrs["scheme"])
            yield Coded(f"{result.name}.codes", result.name, scheme, {"codes": "codes", "scale": "scale"})
        elif result.kind == "Pages" and (held := inputs.operands[result.name].spec.quantised):
            field, scheme = held
            if (key := f"{result.name}.{field}") in spreads:
                yield Coded(key, result.name, scheme, {"codes": field, "scale": field + SCALE})


def judge_codes(inputs: Inputs, part: Coded, got: Mapping[str, Any], spread: Spread, limit: Level) -> Judgement:
    """Codes and scales of the rows that a call writes against the numbers that they stand for; raises Failed."""
    parts = {name: got[held] for name, held in part.parts.items()}
    before, slack = inputs.operands.get(part.result), limit.pointwise * spread.most
    if isinstance(before, Pages):
        written = written_slots(inputs, before)
        parts = {name: array[written] for name, array in parts.items()}
        if not inputs.contract.exact:  # the numbers may be rounded to the cache's dtype first
            slack = slack + limit.pointwise * UNIT_ROUNDOFF[before.spec.dtype] * np.abs(spread.value)
    if wrong := part.scheme.misfit(spread.value, parts, slack):
        name, at, why = wrong
        where = f"{part.result}.{part.parts[name]}{list(at)}"
        raise Failed("FAIL_VALUE", f"{where} {why} under {part.scheme.name}", at=where)
    return Judgement("PASS", at=part.key)
