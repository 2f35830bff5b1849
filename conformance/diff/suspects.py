"""Which operand of few bits a wrong result comes from: its scales, or its codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from porthal.hal import Pages, Scheme, Weight, scheme_of
from porthal.hal.operands.pages import SCALE
from porthal.hal.scheme import HELD, NONE

ONE = {"int8": 1, "int4": 1, "float8_e4m3fn": 0x38, "float4_e2m1fn": 2, "float8_e8m0fnu": 127}  # the code that says 1


def suspect(operands: Mapping[str, Any], right: Callable[[Mapping[str, Any]], bool]) -> str:
    """What is wrong, where that can be told, as the end of a sentence: the call is made again with all scales of one operand
    1, or all its codes, and `right` says whether the result is then right. "" where neither is so."""
    for name, value in operands.items():
        for what, changed in _plainer(value):
            if right({**operands, name: changed}):
                return f"; with all {what} of {name} 1 it is right"
    return ""


def _plainer(value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, (Weight, Pages)) or value.scheme in (None, NONE):
        return
    scheme, parts = scheme_of(str(value.scheme)), value.parts()
    field = value.spec.fields[0][0] if isinstance(value, Pages) else ""
    codes, scales = (field, [field + SCALE]) if field else ("codes", [n for n in parts if n != "codes"])
    made: Any = type(value)
    yield "scales", made.of(value.spec, parts | {name: _ones(scheme, name, parts[name]) for name in scales})
    yield "codes", made.of(value.spec, parts | {codes: np.full_like(parts[codes], ONE[scheme.codes])})


def _ones(scheme: Scheme, name: str, scale: Any) -> Any:
    one = ONE[scheme.scale] if scheme.scale in HELD and name != "whole" else 1
    return np.full_like(scale, one)
