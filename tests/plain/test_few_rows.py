"""With few rows the direction of a rounding is told from its elements, and what is told of too few numbers is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.outcome import Outcome
from porthal.conformance.judgement.call import judge
from porthal.conformance.judgement.golden import Golden
from porthal.conformance.judgement.measures import FEW
from porthal.conformance.level import LEVELS
from porthal.conformance.report.report import Report
from porthal.conformance.runner.check import check
from porthal.conformance.verdicts import Judgement
from porthal.hal import narrow, widen

CALLS = [
    "rms_norm,T={},H=768,x:{},0",
    "layer_norm,T={},H=768,x:{},0",
    "silu_mul,T={},I=768,x:{},0",
    "add,T={},H=768,a:{},0",
    "linear,T={},K=96,N=576,x:{},0",
    "head_linear,T={},N=8,K=64,M=64,x:{},0",
    "rope,T={},N=8,D=64,theta=10000.0,layout=half,start=0,width=64,x:{},batch=mixed,block_size=64,0",
    "moe_unpermute,T={},H=512,k=8,sorted:{},0",
    "mla_output,T={},N=2,C=64,V=64,H=512,o:{},0",
]


def returned(token: str, rounding: str, honest: bool = False) -> Judgement:
    """What is said of the reference's values, or of those that a chip rounds wherever it may, rounded in this way."""
    golden = Golden(build(Case.from_token(token)))
    ((name, (_, kind)),) = golden.shapes.items()
    values = next(golden.rounding_runs())[name] if honest else golden.spread()[name].value
    return judge(golden.inputs, Outcome(*[{name: rounded(values, kind, rounding)}] * 2), "bring-up")


def rounded(values: np.ndarray, kind: str, rounding: str) -> np.ndarray:
    y = narrow(values, kind)
    bits, size, true = y.view(np.uint16).copy(), np.abs(widen(y)), np.abs(values)
    if rounding == "toward":
        bits[size > true] -= 1
    if rounding == "away from":
        bits[size < true] += 1
    return bits.view(y.dtype)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_one_row_tells_the_direction_of_a_rounding(call: str, rows: int, kind: str) -> None:
    token = call.format(rows, kind)
    for direction in ("toward", "away from"):
        said = returned(token, direction)
        assert said.verdict == "FAIL_VALUE" and f" is rounded {direction} zero: " in said.message
    for honest in (False, True):
        assert returned(token, "to nearest", honest).verdict == "PASS"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "call",
    [
        "rms_norm,T=2,H=768,x:bf16,x~equal,{}",  # all that is rounded before the weight is rounded alike
        "sparse_mla,T=1,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:fp16,batch=mixed,block_size=64,{}",  # a head's sum
        "layer_norm,T=1,H=768,x:fp16,x~plateau,{}",
    ],
)
def test_what_a_row_shares_with_permission_is_no_direction(call: str, seed: int) -> None:
    said = returned(call.format(seed), "to nearest", honest=True)
    assert said.verdict == "PASS", said.message


@pytest.mark.parametrize("rows", [2, 7, 17])
def test_few_rows_tell_that_a_parameter_was_rounded(rows: int) -> None:
    golden = Golden(build(Case.from_token(f"rms_norm,T={rows},H=6144,x:bf16,weight:fp32,0")))
    right = golden.spread()["y"].value
    golden.operands = golden.operands | {"weight": widen(narrow(golden.operands["weight"], "bfloat16"))}
    for values, verdict in ((right, "PASS"), (golden.call(golden.contract.reference), "FAIL_VALUE")):
        said = judge(golden.inputs, Outcome(*[{"y": narrow(values, "bfloat16")}] * 2), "bring-up")
        assert said.verdict == verdict, said
    assert "has the same error in all rows of a column" in said.message


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("token", "few"),
    [
        ("add,T=1,H=96,a:bf16,0", ("whole", "direction", "column")),
        ("add,T=1,H=6144,a:bf16,0", ("column",)),
        ("add,T=2,H=6144,a:bf16,0", ()),
        ("add,T=64,H=40,a:bf16,0", ("row", "column")),
        ("add,T=64,H=7,a:bf16,a~integer,b~integer,0", ()),  # judged exactly
    ],
)
def test_too_few_numbers_are_named(token: str, few: tuple[str, ...], level: str) -> None:
    backend = Reference()
    result = check(Case.from_token(token), Bindings(backend), level)
    assert (result.verdict, result.few) == ("PASS", few)
    report = Report.of(backend, level, [result, replace(result, verdict="FAIL_VALUE")])
    words = ", ".join(f"{FEW[test]} in 1" for test in few)
    assert report.too_few == ([f"not judged in passed cases, of too few numbers: {words}"] if few else [])
    assert Report.from_json(report.json()).results[0].few == few
