"""Composites in one call have the bits of their parts in calls of their own."""

import numpy as np
import pytest

pytest.importorskip("porthal.backends.cpu._native", reason="the native module is not built; run `pip install .`")

from porthal.conformance.cases.copies import build
from porthal.conformance.cases.plan import cases
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
