"""Composites in one call have the bits of their parts in calls of their own."""

import numpy as np
import pytest

pytest.importorskip("porthal.backends.cpu._native", reason="the native module is not built; run `pip install .`")

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.hal import Operand, contracts, create


def placed(cpu, value):
    return value.place(cpu) if isinstance(value, Operand) else value


@pytest.mark.parametrize("op", ["index_prolog", "mla_output", "mla_prolog", "mtp_input"])
def test_a_composite_is_its_parts(op):
    cpu, contract = create("cpu"), contracts()[op]
    for case in [c for c in cases(contract) if not c.fault and ("T", 7) in c.dims][:6]:
        given, results = build(case), []
        for function in (getattr(cpu, op), lambda *a, **k: contract.decomposition(cpu, *a, **k)):
            found = function(*(placed(cpu, v) for v in given.operands.values()), **given.attrs)
            flat = []
            for value in found if isinstance(found, tuple) else (found,):
                flat += cpu.to_logical(value).values() if isinstance(value, Operand) else [value]
            results.append([np.asarray(x).tobytes() for x in flat])
        assert results[0] == results[1], case


@pytest.mark.parametrize(
    "token",
    [
        # columns of a head share roundings: that errors of few rows agree is told by heads, not by columns
        "mla_prolog,T=3,H=264,Q=19,N=96,D=64,C=264,R=50,theta=100000000.0,eps=1.37e-06,h:fp16,kv_norm:fp32,q_a%fp8_block,"
        "q_b%fp8_block,kv_a%fp8_block,w_uk%fp8_block,batch=1/9+2*1/48,block_size=257,0",
        # numbers of two heads in the middle between two codes, whose effects cancel where both are rounded alike
        "indexer_scores,T=1024,G=5,D=128,scale=0.015625000000000003,iq:bf16,w:bf16,keys~seesaw,keys%int8_keys,"
        "batch=1023*1/3+1/3/1,block_size=3,view=columns,0",
    ],
)
def test_what_a_right_kernel_was_accused_of(token):
    assert check(Case.from_token(token), Bindings(create("cpu")), "standard").verdict == "PASS"
